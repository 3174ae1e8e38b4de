"""What cannot be sampled is refused with a sentence, by every engine, before anything is compiled."""

import functools

import jax
import numpy as np
import pytest

from pt_jax.models import Config, bind, init
from pt_jax.sampling import Draft, Sampling, beam_search, sample, sample_queue, sample_until, speculate, stream

V, N, LONGEST = 11, 6, 12
CONFIG = Config(
    vocab=V, layers=1, width=8, heads=1, kv_heads=1, head_width=8, hidden=8, learned_positions=True, norm="layer",
    qk_norm=False, max_length=LONGEST,
)  # fmt: skip
MODEL, PARAMS = bind(CONFIG), init(CONFIG, jax.random.key(0))
PROMPTS = np.array([[0, 0, 5, 6, 7], [3, 1, 2, 0, 4]], np.int32)
SEEN = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], bool)


def never(params, tokens, seen, cache):
    """The model, which may be traced for its shapes and not be run."""
    assert isinstance(tokens, jax.core.Tracer) and tokens.shape == (1, 1), "something is compiled before the check"
    return MODEL.apply(params, tokens, seen, cache)


def ask(by, prompts=PROMPTS, seen=SEEN, params=PARAMS, **more):
    more = {"apply": never, "init_cache": MODEL.init_cache, "length": N, "end_tokens": (3,), "pad_token": 3} | more
    key = () if by is beam_search else (jax.random.key(0),)
    return by(params, prompts, seen, *key, **more)


ENGINES = {
    "sample": sample, "queue": functools.partial(sample_queue, slots=2), "until": sample_until, "stream": stream,
    "speculate": speculate,
}  # fmt: skip
OLD = PROMPTS.copy()
OLD[0, :2] = 99  # padding is nothing that is read


@pytest.mark.parametrize("by", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"prompts": np.where(PROMPTS == 7, V, PROMPTS)}, "prompts has the id 11, but the model knows 11 tokens, 0 to"),
        ({"prompts": np.where(PROMPTS == 7, -1, PROMPTS)}, "prompts has the id -1, but the model knows 11 tokens"),
        ({"end_tokens": (3, 50)}, "end_tokens has the id 50, but the model knows 11 tokens"),
        ({"how": Sampling(min_length=1, end_tokens=(3, 12))}, "how.end_tokens has the id 12"),
        ({"length": LONGEST - 4}, "prompt 1 has 5 tokens and its completion up to 8, but the model has positions"),
        ({"how": Sampling(min_length=N + 1, end_tokens=(3,))}, "min_length=7 is more than the 6 tokens that a row may"),
        ({"limits": np.array([6, 2]), "how": Sampling(min_length=3, end_tokens=(3,))}, "min_length=3 is more than"),
        ({"end_tokens": (3, 4), "how": Sampling(min_length=3, end_tokens=(3,))}, "end token 4 may come before"),
        ({"how": Sampling(allowed=np.arange(V) != 3)}, r"allowed forbids every end token of \[3\]; give"),
        (
            {"how": Sampling(allowed=np.arange(V) == 3, min_length=1, end_tokens=(3,))},
            "allowed permits end tokens alone, and min_length holds them back",
        ),
        ({"how": Sampling(temperature=np.nan)}, "temperature must be at least 0 and finite, got nan"),
        ({"how": Sampling(top_p=0.0)}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"seen": SEEN & (np.arange(2) > 0)[:, None]}, "prompt 0 is empty or not left-padded"),
        ({"seen": SEEN.astype(int)}, "seen is of type int64; give bool"),
    ],
)  # fmt: skip
def test_a_sentence_says_what_is_wrong(by, more, message):
    with pytest.raises(ValueError, match=message):
        ask(by, **more)


@pytest.mark.parametrize(
    ("by", "more", "message"),
    [
        (sample, {"forced": np.full((2, N), V)}, "forced has the id 11, but the model knows 11"),
        (stream, {"forced": np.full((2, N), V)}, "forced has the id 11, but the model knows 11"),
        (sample, {"alternatives": V + 1}, "alternatives=12 is more than the 11 tokens that the model knows"),
        (sample, {"alternatives": -1}, r"alternatives must be in \[0, inf\), got -1"),
        (ENGINES["queue"], {"alternatives": V + 1}, "alternatives=12 is more than the 11 tokens"),
        (stream, {"keep": ("nothing",)}, "keep names 'nothing', which is no array of the cache"),
        (beam_search, {"beams": 2, "end_tokens": (V,)}, "end_tokens has the id 11"),
        (beam_search, {"beams": 2, "length": LONGEST}, "but the model has positions for 12"),
    ],
)  # fmt: skip
def test_what_only_some_can_do_is_refused_by_them(by, more, message):
    with pytest.raises(ValueError, match=message):
        ask(by, **more)


def test_a_draft_has_the_vocabulary_of_the_model():
    other = Config(vocab=V + 1, layers=1, width=8, heads=1, kv_heads=1, head_width=8, hidden=8)
    draft = Draft(init(other, jax.random.key(0)), *bind(other))
    with pytest.raises(ValueError, match="draft knows 12 tokens and the model 11; they must have the same vocabulary"):
        ask(speculate, draft=draft)


def test_what_is_right_is_not_refused():
    """Texts as long as the positions, ids in padding that mean nothing, an end that never comes, a least length that
    is the limit, stops that are given as an array; and what is traced has no numbers to look at."""
    tokens = LONGEST - 5
    how = Sampling(min_length=tokens, end_tokens=(3, 4), allowed=np.arange(V) != 4)
    out = ask(sample, prompts=OLD, length=tokens, end_tokens=np.array([3, -1, 4]), how=how, apply=MODEL.apply)
    assert out.alive.all() and np.isfinite(out.logps).all()  # behind the last position there would be no number
    traced = jax.jit(lambda prompts, seen, how: ask(sample, prompts, seen, how=how, apply=MODEL.apply).tokens)
    assert traced(PROMPTS, SEEN, Sampling(temperature=0.0)).shape == (2, N)
