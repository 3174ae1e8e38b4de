"""From texts to texts: which rows are sampled under which ids, and what of a row becomes text."""

import types

import jax
import numpy as np
import pytest

from pt_jax.sampling import Completions, text


class Letters:
    """A tokenizer of the alphabet, with 0 as the special token."""

    def batch_decode(self, rows, skip_special_tokens):
        assert skip_special_tokens and all(isinstance(t, int) for row in rows for t in row)
        return ["".join(chr(96 + t) for t in row if t) for row in rows]


class Echo:
    """Completes a prompt with its last token, its id and its sample index, and remembers what it was asked."""

    def __init__(self):
        self.calls = []

    def __call__(self, params, tokens, seen, key, *, group, prompt_ids):
        self.calls.append(types.SimpleNamespace(params=params, tokens=tokens, seen=seen, key=key, ids=prompt_ids))
        j = np.tile(np.arange(group), len(tokens))
        columns = [np.repeat(tokens[:, -1], group), np.repeat(prompt_ids, group) + 1, j + 1]
        out = np.stack([*columns, np.full(len(tokens) * group, 26)], 1).astype(np.int32)
        return Completions(out, np.zeros(out.shape, np.float32), np.arange(4) < np.full((len(out), 1), 3))


def completions(tokens, alive):
    alive = np.array(alive, bool)
    return Completions(np.array(tokens, np.int32), np.zeros(alive.shape, np.float32), alive)


def test_prompts_are_padded_on_the_left_to_a_common_bucket():
    tokens, seen = text.pad_prompts([np.array([5, 6, 7]), np.array([0])], pad_token=9)
    assert tokens.tolist() == [[9] * 5 + [5, 6, 7], [9] * 7 + [0]]
    assert seen.tolist() == [[False] * 5 + [True] * 3, [False] * 7 + [True]]
    assert (tokens.dtype, seen.dtype) == (np.int32, bool)
    assert text.pad_prompts([[1] * 9], pad_token=0)[0].shape == (1, 16)
    assert text.pad_prompts([[1] * 9], pad_token=0, length=9)[0].shape == (1, 9)


def test_what_is_seen_does_not_depend_on_the_pad_token():
    """A prompt may hold the pad token, at its very beginning too."""
    for pad in (0, 5):
        _, seen = text.pad_prompts([np.array([5, 5]), np.array([0, 5, 0])], pad_token=pad, length=4)
        assert seen.sum(1).tolist() == [2, 3]


def test_a_prompt_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="row 1 has 4 tokens, more than the length of 3"):
        text.pad_prompts([[1], [1, 2, 3, 4]], pad_token=0, length=3)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (np.array([2**32 + 5]), "prompt 1 has the id 4294967301, which is in no vocabulary"),
        ([5, 5 - 2**32], "prompt 1 has the id -4294967291, which is in no vocabulary"),
        (np.array([[1, 2]]), r"prompt 1 has shape \(1, 2\); give an array of token ids \[T\]"),
        ("abc", "prompt 1 is of type <U3; give an array of token ids"),
    ],
)
def test_what_is_no_row_of_ids_is_refused(prompt, message):
    """And not cut to int32, which makes another token of it."""
    with pytest.raises(ValueError, match=message):
        text.pad_prompts([np.array([1]), prompt], pad_token=0)
    with pytest.raises(ValueError, match=message):
        text.complete(Echo(), None, Letters(), [np.array([1]), prompt], None, pad_token=0)


def test_stop_strings_may_come_one_after_the_other():
    """They are gone through more than once; what is left of them after the check was none."""
    out = completions([[8, 5, 12]], [[1, 1, 1]])
    assert text.to_texts(Letters(), out, iter(("l", "e"))) == ["h"]
    assert text.stop_at(Letters(), iter(("e",)))([8, 5, 12]) == 2
    prompts = [np.array([5]), np.array([4])]
    assert text.complete(Echo(), None, Letters(), prompts, None, pad_token=0, rows=1, stop=iter("b")) == ["eaa", "d"]


def test_a_text_is_what_is_alive():
    """The pad token inside of a completion is text, and after its end it is not."""
    out = completions([[3, 1, 3, 3], [1, 0, 2, 26], [26, 26, 26, 26]], [[1, 1, 1, 0], [1, 1, 1, 0], [1, 0, 0, 0]])
    assert text.to_texts(Letters(), out) == ["cac", "ab", "z"]
    assert text.to_texts(Letters(), jax.device_put(out)) == ["cac", "ab", "z"]


PROMPTS = [np.arange(1, 2 + i % 4) for i in range(7)]
LAST = [1 + i % 4 for i in range(7)]


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("group", [1, 3])
def test_every_prompt_is_completed_in_its_place_under_its_id(rows, group):
    """However many at a time: the texts, the ids, and so the random numbers, are the same."""
    sampler = Echo()
    got = text.complete(sampler, "params", Letters(), PROMPTS, "key", pad_token=0, rows=rows, group=group)
    letter = lambda i: chr(96 + i)
    assert got == [letter(LAST[i]) + letter(i + 1) + letter(j + 1) for i in range(7) for j in range(group)]
    assert {(c.params, c.key) for c in sampler.calls} == {("params", "key")}


def test_one_shape_for_all_calls():
    """The last ones are filled up with a prompt again, since another shape would be another program."""
    sampler = Echo()
    text.complete(sampler, {}, Letters(), PROMPTS, None, pad_token=0, rows=3)
    assert [c.tokens.shape for c in sampler.calls] == [(3, 8)] * 3
    assert [list(c.ids) for c in sampler.calls] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert all(c.seen[:, -1].all() for c in sampler.calls)


def test_few_prompts_are_not_filled_up():
    sampler = Echo()
    text.complete(sampler, {}, Letters(), PROMPTS[:2], None, pad_token=0)
    assert [c.tokens.shape for c in sampler.calls] == [(2, 8)]


def test_a_stop_string_is_not_taken_for_its_letters():
    out = completions([[8, 5, 12]], [[1, 1, 1]])
    for stop in ("xe", ("",)):
        with pytest.raises(ValueError, match="stop must be a tuple of strings that are not empty"):
            text.to_texts(Letters(), out, stop)
        with pytest.raises(ValueError, match="stop must be a tuple"):
            text.complete(Echo(), None, Letters(), [np.array([1])], None, pad_token=0, stop=stop)
