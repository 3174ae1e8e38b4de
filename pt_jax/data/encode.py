"""Rows to tokens and masks, through the tokenizer and its chat template."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Example:
    """tokens: [T] int32. mask: [T] bool, the tokens that are scored. source: "FILE:LINE" of the row."""

    tokens: np.ndarray
    mask: np.ndarray
    source: str = ""


def supervised(tokenizer, row: dict) -> Example:
    """A text, messages or completion row: which tokens are there, and which of them a loss scores.

    A text is scored whole and ends with the end token. Of messages the assistant's turns are scored with the token
    that ends them, of a prompt and completion the completion; by the template's ``{% generation %}`` marks, or, where
    it has none, by what each answer adds to the conversation before it.

    Raises:
      ValueError: nothing would be scored, or the template rewrites the conversation so that the answer cannot be
        told from the prompt.
    """
    if row["kind"] == "text":
        tokens = [*_plain(tokenizer, row["text"]), tokenizer.eos_token_id]
        return _example(tokens, np.ones(len(tokens), bool), row)
    if row["kind"] == "messages":
        return _example(*_conversation(tokenizer, row["messages"], 0, row["source"]), row)
    return _answer(tokenizer, row, row["completion"])


def preference(tokenizer, row: dict) -> tuple[Example, Example]:
    """A preference row as (chosen, rejected), both with the prompt, of which nothing is scored."""
    return _answer(tokenizer, row, row["chosen"]), _answer(tokenizer, row, row["rejected"])


def prompt(tokenizer, row: dict) -> np.ndarray:
    """The tokens that a completion follows: [T] int32."""
    text = row["prompt"]
    tokens = _plain(tokenizer, text) if isinstance(text, str) else _render(tokenizer, text, row["source"], True)[0]
    return np.asarray(tokens, np.int32)


def _answer(tokenizer, row, answer) -> Example:
    before = prompt(tokenizer, row)
    if isinstance(answer, str):
        # The prompt is tokenised alone, as it will be when a completion is sampled after it.
        after = tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"] + [tokenizer.eos_token_id]
        return _example([*before, *after], np.arange(len(before) + len(after)) >= len(before), row)
    messages = row["prompt"] + answer
    return _example(*_conversation(tokenizer, messages, len(row["prompt"]), row["source"]), row)


def _conversation(tokenizer, messages, first, source):
    """Tokens of a conversation, and a mask of its assistant turns from message ``first`` on."""
    tokens, marked = _render(tokenizer, messages, source, False)
    if marked is None:
        marked = _by_prefix(tokenizer, messages, tokens, source)
    if first:
        start = len(_starts_with(tokenizer, messages[:first], tokens, source, True))
        marked = marked & (np.arange(len(tokens)) >= start)
    return tokens, marked


def _by_prefix(tokenizer, messages, tokens, source):
    mask = np.zeros(len(tokens), bool)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            start = len(_starts_with(tokenizer, messages[:i], tokens, source, True))
            mask[start : len(_starts_with(tokenizer, messages[: i + 1], tokens, source, False))] = True
    return mask


def _starts_with(tokenizer, messages, tokens, source, generation_prompt):
    start, _ = _render(tokenizer, messages, source, generation_prompt)
    if tokens[: len(start)] != start:
        raise ValueError(
            f"{source}: the chat template writes the first {len(messages)} messages differently when more follow, so "
            "the answer cannot be told from the prompt; use a template with {% generation %} marks"
        )
    return start


def _render(tokenizer, messages, source, generation_prompt):
    """Tokens of the messages, and the mask of the template's generation marks (None where it has none)."""
    template = tokenizer.chat_template
    if template is None:
        raise ValueError(f"{source}: is a conversation, but the tokenizer has no chat template; give plain strings")
    marks = "{% generation" in template or "{%- generation" in template
    try:
        out = tokenizer.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=generation_prompt,
            return_assistant_tokens_mask=marks,
            # whoever calls checks lengths, in words of this library
            tokenizer_kwargs={"verbose": False, "return_offsets_mapping": marks},
        )
    except Exception as e:  # templates are programs of their authors and raise what they like
        raise ValueError(f"{source}: the chat template fails ({type(e).__name__}: {e})") from e
    return list(out["input_ids"]), _whole(out["assistant_masks"], out["offset_mapping"]) if marks else None


def _whole(mask, offsets):
    """A mask that ends within no character: transformers leaves out all but the first token of a mark's last one."""
    mask = np.asarray(mask, bool)
    for i in range(1, len(mask)):
        mask[i] |= mask[i - 1] and offsets[i][0] < offsets[i - 1][1]
    return mask


def _plain(tokenizer, text):
    """A string's tokens with what the tokenizer puts in front, and without an end token, which text goes on after."""
    tokens = tokenizer(text, verbose=False)["input_ids"]
    return tokens[:-1] if tokens and tokens[-1] == tokenizer.eos_token_id else tokens


def _example(tokens, mask, row) -> Example:
    if not mask.any():
        raise ValueError(f"{row['source']}: has nothing to score: no assistant turn, or an empty one")
    return Example(np.asarray(tokens, np.int32), np.asarray(mask, bool), row["source"])
