"""Tokenizers: train a small one, load anybody's."""

import pathlib

SPECIAL = ("<pad>", "<s>", "<|im_start|>", "<|im_end|>")

# ChatML, with the assistant's turns marked for the loss and the end of a turn inside the mark
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{% generation %}{{- message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{%- else %}{{- message['content'] + '<|im_end|>' }}{%- endif %}"
    "{{- '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def train_bpe(texts, *, vocab: int, max_length: int = 2048):
    """A byte-level BPE tokenizer with a chat template: it can write any text, and nothing is downloaded.

    Digits are tokens of their own, as in Llama's and Qwen's tokenizers. A text begins with ``<s>``; ``<|im_end|>``
    ends a text and a turn.

    Args:
      texts: strings to learn the merges from.
      vocab: number of tokens, at least 260: 256 bytes and 4 special tokens.
      max_length: the longest text of the model it is for.

    Returns:
      A transformers tokenizer.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab < 256 + len(SPECIAL):
        raise ValueError(
            f"vocab must be at least {256 + len(SPECIAL)} (256 bytes, {len(SPECIAL)} special), got {vocab}"
        )
    core = Tokenizer(models.BPE())
    # one digit each, with the space before it, so that "3 + 4" is three tokens
    split = pre_tokenizers.Split(Regex(r" ?\d"), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=max_length,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def load(path):
    """The tokenizer of a local model folder.

    Raises:
      ValueError: the folder has none, or it has no end token.
    """
    from transformers import AutoTokenizer

    folder = pathlib.Path(path)
    if not (folder / "tokenizer_config.json").is_file() and not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder}: has no tokenizer.json or tokenizer_config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as e:  # transformers raises what its file readers raise
        raise ValueError(f"{folder}: the tokenizer cannot be read ({type(e).__name__}: {e})") from e
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{folder}: the tokenizer has no eos_token, so an answer could not end")
    return tokenizer


def pad_id(tokenizer) -> int:
    """The id to fill rows with; the end token's where there is none, which is harmless: masks come from lengths."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def turn_ends(tokenizer) -> tuple[int, ...]:
    """The special token with which the chat template ends an assistant's turn, when it does.

    It need not be the tokenizer's end token: base models are often given a template whose turns end with another.
    """
    said = "An answer."
    turns = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": said}]
    try:
        after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(said)[2]
    except Exception:  # no template, or one that wants other turns: templates raise what they like
        return ()
    first = tokenizer(after, add_special_tokens=False)["input_ids"][:1]
    return tuple(i for i in first if i in tokenizer.added_tokens_decoder and tokenizer.added_tokens_decoder[i].special)
