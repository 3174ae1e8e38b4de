"""What is scored is what the assistant wrote, read back from the tokens; everything else is context."""

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pt_jax.data import encode, tokenizers
from pt_jax.recipes import sft

TOKENIZER = tokenizers.train_bpe(["user assistant system what is 2+2? The answer is 4.\n\n"] * 4, vocab=320)
END, BOS = TOKENIZER.eos_token_id, TOKENIZER.bos_token_id


def with_template(template):
    tokenizer = copy.copy(TOKENIZER)
    tokenizer.chat_template = template
    return tokenizer


UNMARKED = TOKENIZER.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# What an answer adds to a conversation: without marks the line break after the end of a turn is in it.
WAYS = {"marked": (TOKENIZER, "<|im_end|>"), "unmarked": (with_template(UNMARKED), "<|im_end|>\n")}
EITHER_WAY = pytest.mark.parametrize(("tokenizer", "end"), WAYS.values(), ids=WAYS)

CHAT = [
    {"role": "system", "content": "be nice"},
    {"role": "user", "content": "héllo 世界 🙂"},
    {"role": "assistant", "content": " ok 🙂"},
    {"role": "user", "content": "assistant? The answer is 4."},  # said by the user, though it reads like an answer
    {"role": "assistant", "content": "世界\n\n12é"},
]


def row(**columns):
    kind = next(k for k in ("messages", "text", "chosen", "completion", "answer") if k in columns)
    kind = {"chosen": "preference", "answer": "question"}.get(kind, kind)
    return columns | {"kind": kind, "source": "rows.jsonl:7"}


def spans(example):
    """The scored runs of tokens, each decoded for itself: half a character would show."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], example.mask, [0]])))
    return [TOKENIZER.decode(example.tokens[a:b]) for a, b in edges.reshape(-1, 2)]


@EITHER_WAY
def test_of_messages_the_turns_of_the_assistant_are_scored_with_their_end(tokenizer, end):
    got = encode.supervised(tokenizer, row(messages=CHAT))
    assert TOKENIZER.decode(got.tokens) == TOKENIZER.apply_chat_template(CHAT, tokenize=False)
    assert spans(got) == [" ok 🙂" + end, "世界\n\n12é" + end]
    assert (got.tokens.dtype, got.mask.dtype, got.source) == (np.int32, bool, "rows.jsonl:7")
    assert got.tokens.shape == got.mask.shape


characters = st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("🙂世é\n 1"))
text = st.text(characters, max_size=12).filter(lambda t: not any(s in t for s in tokenizers.SPECIAL))


@given(st.lists(st.tuples(text, text), min_size=1, max_size=3))
def test_whatever_is_said_the_answers_alone_are_scored(turns):
    chat = [{"role": role, "content": said} for turn in turns for role, said in zip(("user", "assistant"), turn)]
    got = encode.supervised(TOKENIZER, row(messages=chat))
    assert spans(got) == [answer + "<|im_end|>" for _, answer in turns]
    assert TOKENIZER.decode(got.tokens) == TOKENIZER.apply_chat_template(chat, tokenize=False)


@EITHER_WAY
def test_of_a_prompt_and_completion_the_completion_alone_is_scored(tokenizer, end):
    """The prompt has a turn of the assistant, which is context here."""
    got = encode.supervised(tokenizer, row(prompt=CHAT[:4], completion=CHAT[4:]))
    assert spans(got) == ["世界\n\n12é" + end]
    whole = encode.supervised(tokenizer, row(messages=CHAT))
    np.testing.assert_array_equal(got.tokens, whole.tokens)


@EITHER_WAY
def test_a_completion_of_several_turns_has_each_answer_scored(tokenizer, end):
    got = encode.supervised(tokenizer, row(prompt=CHAT[:2], completion=CHAT[2:]))
    assert spans(got) == [" ok 🙂" + end, "世界\n\n12é" + end]


@EITHER_WAY
def test_a_preference_is_two_answers_to_one_prompt(tokenizer, end):
    other = [{"role": "assistant", "content": "🙂"}]
    r = row(prompt=CHAT[:4], chosen=CHAT[4:], rejected=other)
    chosen, rejected = encode.preference(tokenizer, r)
    assert (spans(chosen), spans(rejected)) == (["世界\n\n12é" + end], ["🙂" + end])
    before = encode.prompt(tokenizer, r)
    for example in (chosen, rejected):
        np.testing.assert_array_equal(example.tokens[: len(before)], before)
        np.testing.assert_array_equal(np.flatnonzero(example.mask)[0], len(before))


@EITHER_WAY
@pytest.mark.parametrize("columns", [
    {"prompt": CHAT[:2], "completion": CHAT[2:3]}, {"prompt": "what is 2", "completion": "+2? 🙂"},
])  # fmt: skip
def test_the_prompt_of_sampling_is_how_the_example_begins(tokenizer, end, columns):
    """The answer is scored from the very place where it is sampled."""
    r = row(**columns)
    before, example = encode.prompt(tokenizer, r), encode.supervised(tokenizer, r)
    assert before.dtype == np.int32
    np.testing.assert_array_equal(example.tokens[: len(before)], before)
    # a template may write a line break after the end of the turn
    assert example.mask[:-1].tolist() == [i >= len(before) for i in range(len(example.tokens) - 1)]


def test_strings_are_taken_as_they_stand():
    got = encode.supervised(TOKENIZER, row(prompt="2 + 2 =", completion=" 4 🙂"))
    assert TOKENIZER.decode(got.tokens) == "<s>2 + 2 = 4 🙂<|im_end|>"
    assert spans(got) == [" 4 🙂<|im_end|>"]
    assert (got.tokens == BOS).sum() == 1
    chosen, rejected = encode.preference(TOKENIZER, row(prompt="2 + 2 =", chosen=" 4", rejected=" 5"))
    assert (TOKENIZER.decode(chosen.tokens), spans(chosen)) == ("<s>2 + 2 = 4<|im_end|>", [" 4<|im_end|>"])
    assert (TOKENIZER.decode(rejected.tokens), spans(rejected)) == ("<s>2 + 2 = 5<|im_end|>", [" 5<|im_end|>"])
    assert TOKENIZER.decode(encode.prompt(TOKENIZER, row(prompt="2 + 2 =", answer=4))) == "<s>2 + 2 ="


def test_a_text_is_scored_whole_with_an_end():
    got = encode.supervised(TOKENIZER, row(text="héllo 🙂"))
    assert TOKENIZER.decode(got.tokens) == "<s>héllo 🙂<|im_end|>"
    assert got.mask.all()


def test_a_tokenizer_that_ends_every_text_ends_it_once_and_never_a_prompt():
    from tokenizers import processors

    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|im_end|>", special_tokens=[("<s>", BOS), ("<|im_end|>", END)]
    )
    assert tokenizer("a")["input_ids"][-1] == END
    assert TOKENIZER.decode(encode.supervised(tokenizer, row(text="ab")).tokens) == "<s>ab<|im_end|>"
    got = encode.supervised(tokenizer, row(prompt="a", completion="b"))
    assert TOKENIZER.decode(got.tokens) == "<s>ab<|im_end|>"


@EITHER_WAY
def test_the_end_is_scored_when_it_is_also_the_padding(tokenizer, end):
    same = copy.deepcopy(tokenizer)
    same.pad_token = same.eos_token
    got, expected = (encode.supervised(t, row(messages=CHAT)) for t in (same, tokenizer))
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_array_equal(got.mask, expected.mask)
    assert got.mask[got.tokens == END].sum() == 2  # those of the assistant; system and user have three more
    batch = sft.make_batch([got], pad_token=tokenizers.pad_id(same))
    filled = batch["tokens"].shape[1] - len(got.tokens)
    assert filled > 0
    assert batch["mask"].sum() == got.mask.sum()
    assert batch["seen"].sum() == len(got.tokens)


def test_token_0_is_a_token():
    """Here it is the padding's, written by an assistant."""
    got = encode.supervised(TOKENIZER, row(prompt="a", completion="b<pad>c"))
    assert TOKENIZER.pad_token_id == 0
    assert got.mask[got.tokens == 0].tolist() == [True]
    batch = sft.make_batch([got], pad_token=0)
    assert batch["mask"][0, : len(got.tokens)].tolist() == got.mask.tolist()
    assert batch["seen"][0, : len(got.tokens)].all()


FORGETFUL = UNMARKED.replace(
    "{{- message['content'] + '<|im_end|>' }}{%- else",
    "{{- (message['content'] if loop.last else message['content'].split('</think>')[-1]) + '<|im_end|>' }}{%- else",
)


def test_a_template_that_rewrites_history_is_refused_and_not_masked_wrongly():
    """Qwen3's drops the thoughts of all turns but the last: what comes before then depends on what comes after."""
    thoughts = [m | {"content": "hm</think>" + m["content"]} if m["role"] == "assistant" else m for m in CHAT]
    tokenizer = with_template(FORGETFUL)
    assert "hm" not in tokenizer.apply_chat_template(thoughts[:4], tokenize=False)
    for r in (row(messages=thoughts), row(prompt=thoughts[:2], completion=thoughts[2:])):
        with pytest.raises(ValueError, match=r"^rows.jsonl:7: the chat template writes the first 3 "
                                             r"messages differently when.*\{% generation %\} marks"):  # fmt: skip
            encode.supervised(tokenizer, r)
    # nothing is rewritten where nothing follows, and where there is nothing to forget
    one = encode.supervised(tokenizer, row(messages=thoughts[:3]))
    assert spans(one) == ["hm</think> ok 🙂<|im_end|>\n"]
    plain = encode.supervised(tokenizer, row(messages=CHAT))
    assert spans(plain) == [" ok 🙂<|im_end|>\n", "世界\n\n12é<|im_end|>\n"]


def test_a_template_that_rewrites_history_can_be_marked():
    marked = FORGETFUL.replace("{{- (message", "{% generation %}{{- (message").replace(
        "+ '<|im_end|>' }}{%- else", "+ '<|im_end|>' }}{% endgeneration %}{%- else"
    )
    thoughts = [m | {"content": "hm</think>" + m["content"]} if m["role"] == "assistant" else m for m in CHAT]
    got = encode.supervised(with_template(marked), row(messages=thoughts))
    assert spans(got) == [" ok 🙂<|im_end|>", "hm</think>世界\n\n12é<|im_end|>"]


def test_a_mark_that_ends_within_a_turn_has_every_byte_of_its_last_character():
    outside = TOKENIZER.chat_template.replace(
        "{{- message['content'] + '<|im_end|>' }}{% endgeneration %}",
        "{{- message['content'] }}{% endgeneration %}{{- '<|im_end|>' }}",
    )
    assert outside != TOKENIZER.chat_template
    got = encode.supervised(with_template(outside), row(messages=CHAT[:3]))
    assert spans(got) == [" ok 🙂"]


def test_a_conversation_needs_a_chat_template():
    tokenizer = with_template(None)
    for call, r in [
        (encode.supervised, row(messages=CHAT)),
        (encode.supervised, row(prompt=CHAT[:2], completion=CHAT[2:3])),
        (encode.preference, row(prompt=CHAT[:2], chosen=CHAT[2:3], rejected=CHAT[2:3])),
        (encode.prompt, row(prompt=CHAT[:2], answer="4")),
    ]:
        with pytest.raises(ValueError, match=r"^rows.jsonl:7: is a conversation, but the tokenizer has no chat"):
            call(tokenizer, r)
    assert encode.supervised(tokenizer, row(prompt="a", completion="b")).mask.sum() == 2  # strings need none


def test_a_template_that_fails_is_told_with_its_reason():
    tokenizer = with_template("{{ raise_exception('no system messages please') }}")
    with pytest.raises(ValueError, match=r"^rows.jsonl:7: the chat template fails .*no system messages please"):
        encode.supervised(tokenizer, row(messages=CHAT))


@EITHER_WAY
def test_a_long_row_is_the_callers_to_refuse(tokenizer, end):
    """transformers would warn of it on the terminal, once, before the sentence that names the row."""
    short = copy.deepcopy(tokenizer)
    short.model_max_length = 4
    for r in (row(messages=CHAT), row(prompt="what is 2+2?", completion="The answer is 4."), row(text="2+2 2+2")):
        assert len(encode.supervised(short, r).tokens) > 4
    assert not short.deprecation_warnings.get("sequence-length-is-longer-than-the-specified-maximum")


@EITHER_WAY
def test_a_row_without_anything_to_score_is_refused(tokenizer, end):
    with pytest.raises(ValueError, match=r"^rows.jsonl:7: has nothing to score: no assistant turn"):
        encode.supervised(tokenizer, row(messages=CHAT[:2]))
