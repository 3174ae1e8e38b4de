import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pt_jax.data import tokenizers

TEXTS = ["user assistant what is 12 + 34? The answer is 46.\n\n", "hello world, hello 世界"] * 3
TOKENIZER = tokenizers.train_bpe(TEXTS, vocab=320, max_length=99)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_can_be_written_and_comes_back(text):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.decode(ids) == text


def test_the_special_tokens_have_the_first_ids():
    assert TOKENIZER.convert_tokens_to_ids(list(tokenizers.SPECIAL)) == [0, 1, 2, 3]
    assert (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id) == (0, 1, 3)
    assert 260 < len(TOKENIZER) <= 320
    assert TOKENIZER.model_max_length == 99


def test_a_special_token_is_one_token_in_a_text():
    ids = TOKENIZER("a<|im_start|>b<|im_end|>", add_special_tokens=False)["input_ids"]
    assert [i for i in ids if i < 4] == [2, 3]
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "ab"


def test_a_text_begins_with_the_first_token_and_is_left_open():
    assert TOKENIZER("hello")["input_ids"][0] == 1
    assert 3 not in TOKENIZER("hello")["input_ids"]


def test_every_digit_is_a_token_of_its_own():
    pieces = [TOKENIZER.decode([i]) for i in TOKENIZER("12 + 34", add_special_tokens=False)["input_ids"]]
    assert pieces[:2] == ["1", "2"]
    assert pieces[-2:] == [" 3", "4"]
    vocabulary = [TOKENIZER.decode([i]) for i in range(len(TOKENIZER))]
    assert not [v for v in vocabulary if sum(c.isdigit() for c in v) > 1]


def test_common_texts_are_shorter_than_their_bytes():
    assert len(TOKENIZER("hello world", add_special_tokens=False)["input_ids"]) <= 4


def test_the_template_marks_the_answer_with_the_token_that_ends_it():
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert TOKENIZER.apply_chat_template(chat, tokenize=False) == (
        "<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n"
    )
    assert TOKENIZER.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True) == (
        "<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    out = TOKENIZER.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    scored = np.array(out["input_ids"])[np.array(out["assistant_masks"], bool)]
    assert TOKENIZER.decode(scored) == "ho<|im_end|>"
    assert out["input_ids"].count(1) == 1


def test_the_same_texts_give_the_same_tokenizer():
    assert tokenizers.train_bpe(TEXTS, vocab=320).get_vocab() == TOKENIZER.get_vocab()


def test_it_comes_back_from_its_folder(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    got = tokenizers.load(tmp_path)
    assert got.get_vocab() == TOKENIZER.get_vocab()
    assert got.chat_template == TOKENIZER.chat_template
    assert got.eos_token_id == 3
    assert got("hello 12 🙂")["input_ids"] == TOKENIZER("hello 12 🙂")["input_ids"]


@pytest.mark.parametrize("vocab", [0, 259])
def test_a_vocabulary_without_room_for_every_byte_is_refused(vocab):
    with pytest.raises(ValueError, match=rf"vocab must be at least 260 \(256 bytes, 4 special\), got {vocab}"):
        tokenizers.train_bpe(TEXTS, vocab=vocab)


def test_the_smallest_vocabulary_is_the_bytes():
    assert len(tokenizers.train_bpe(TEXTS, vocab=260)) == 260


@pytest.mark.parametrize("name", ["", "nowhere"])
def test_a_folder_without_a_tokenizer(tmp_path, name):
    """Without this check, a name that is no folder is looked for on the network."""
    with pytest.raises(ValueError, match=r"has no tokenizer.json or tokenizer_config.json"):
        tokenizers.load(tmp_path / name)


def test_a_folder_whose_files_are_broken(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"the tokenizer cannot be read \("):
        tokenizers.load(tmp_path)


def test_a_tokenizer_without_an_end_token(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "eos_token"}))
    with pytest.raises(ValueError, match=r"the tokenizer has no eos_token, so an answer could not end"):
        tokenizers.load(tmp_path)


def test_rows_are_filled_with_the_end_token_where_there_is_no_other(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    tokenizer = tokenizers.load(tmp_path)
    assert tokenizers.pad_id(tokenizer) == 0  # an id like any other, not a missing one
    tokenizer.pad_token = None
    assert tokenizers.pad_id(tokenizer) == 3


def test_the_template_says_what_ends_a_turn():
    """Where it ends turns with a special token; the end token of texts need not be it."""
    tokenizer = tokenizers.train_bpe(TEXTS, vocab=300)
    tokenizer.eos_token = "<pad>"
    assert tokenizers.turn_ends(tokenizer) == (3,)
    body = "{% for m in messages %}" + "{{ m['content'] }}"
    for end, expected in (("<|im_start|>\n", (2,)), ("\n<|im_end|>", ()), ("", ()), (" ", ())):
        tokenizer.chat_template = body + end + "{% endfor %}"
        assert tokenizers.turn_ends(tokenizer) == expected, end
    for template in (None, "{{ raise_exception('no') }}"):
        tokenizer.chat_template = template
        assert tokenizers.turn_ends(tokenizer) == ()
