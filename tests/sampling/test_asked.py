"""What cannot be sampled is refused with a sentence, by every engine, before anything is compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pt_jax.models import Config, bind, init, init_cache
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


ONE = jnp.zeros((1, 1, V))


def without_rows(rows, length):
    """A cache with an array of a slot a token that all rows share."""
    return init_cache(CONFIG, rows, length) | {"at": jnp.zeros(length)}


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
        ({"prompts": PROMPTS.astype(np.uint16)}, "prompts is of type uint16; give int32"),
        ({"prompts": PROMPTS.astype(np.float32)}, "prompts is of type float32; give int32"),
        ({"prompts": PROMPTS.tolist()}, r"prompts is a list; give an array \[P, T\] of int32"),
        ({"end_tokens": 3}, r"end_tokens must be ids in a tuple, such as \(2,\), or \(\) for none, got 3"),
        ({"end_tokens": (None,)}, r"end_tokens must be ids in a tuple, .* got \(None,\)"),
        ({"end_tokens": "</s>"}, "end_tokens must be ids in a tuple, .* got '</s>'"),
        ({"end_tokens": (3.0,)}, "end_tokens must be ids in a tuple"),
        ({"pad_token": None}, "pad_token must be an id, got None; an end token will do"),
        ({"pad_token": 0.5}, "pad_token must be an id, got 0.5"),
        ({"length": 6.0}, "length must be a whole number above 0, got 6.0"),
        ({"length": np.uint32(6)}, r"length must be a whole number above 0, got np.uint32\(6\)"),
        ({"apply": None}, "apply must be a function, such as models.bind.config. has, got None"),
        ({"init_cache": []}, r"init_cache must be a function, such as models.bind.config. has, got \[\]"),
        ({"length": True}, "length must be a whole number above 0, got True"),
        ({"group": "2"}, "group must be a whole number above 0, got '2'"),
        ({"limits": np.array([2.5, 3.0])}, "limits is of type float64; give int32"),
        ({"prompt_ids": np.array([0.5, 1.0])}, "prompt_ids is of type float64; give int32"),
        ({"prompt_ids": np.arange(3)}, r"prompt_ids has shape \(3,\), expected \[P\] with P=2"),
        ({"how": Sampling(temperature=None)}, "temperature must be at least 0 and finite, got None"),
        ({"how": Sampling(top_k="all")}, "top_k must be at least 1, got all"),
        ({"how": Sampling(allowed=np.array([3, 4]))}, r"allowed must be \[V\] bool, True for the tokens that"),
        ({"how": 0.7}, "how must be a Sampling, such as Sampling\\(temperature=0.7\\), got 0.7"),
        ({"how": Sampling(min_length=2, end_tokens=4)}, "end token 3 may come before min_length=2 tokens, as Samp"),
        ({"how": Sampling(min_length=2, end_tokens=(3.7,))}, r"Sampling's end_tokens must be ids .* got \(3.7,\)"),
        ({"how": Sampling(min_length=2, end_tokens="a")}, "Sampling's end_tokens must be ids in a tuple, .* got 'a'"),
        (
            {"how": Sampling(min_length=np.array([1, 4]), end_tokens=(3,)), "limits": np.array([1, 3])},
            "min_length=4 is more than the 3 tokens",
        ),
        ({"prompts": PROMPTS[:0], "seen": SEEN[:0]}, "prompts has no row; give one prompt at least"),
        ({"pad_token": V}, "pad_token has the id 11, but the model knows 11 tokens"),
        ({"pad_token": -1}, "pad_token has the id -1, but the model knows 11 tokens"),
        ({"pad_token": 2**40}, "pad_token (must be an id, got|has the id) 1099511627776"),
        ({"end_tokens": (2**40,)}, r"end_tokens must be ids in a tuple, .* got \(1099511627776,\)"),
        ({"end_tokens": np.array([3, 2**40])}, "end_tokens must be ids in a tuple"),
        ({"prompt_ids": np.array([1, 2**33 + 1])}, "prompt_ids has the number 8589934593, which is none of int32"),
        ({"init_cache": functools.partial(init_cache, CONFIG), "length": LONGEST - 4}, "has positions for 12 together"),
        ({"init_cache": lambda *size: init_cache(CONFIG, *size), "length": LONGEST - 4}, "has positions for 12"),
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
        (sample, {"forced": np.full((2, N), -5)}, "forced has the id -5; give -1 where a token is to be drawn"),
        (sample, {"forced": np.full((2, N), 2**32)}, "forced has the number 4294967296, which is none of int32"),
        (sample, {"keep": [["k"]]}, r"keep must be names in a tuple, .* got \(\['k'\],\)"),
        (sample, {"keep": ("room",), "group": 2}, "keep names 'room', which is no array of the cache"),
        (sample, {"init_cache": without_rows, "keep": ("at",), "group": 2}, "keep names 'at', which has no slot for"),
        (
            sample,
            {"init_cache": lambda *size: jnp.zeros(size), "apply": lambda params, tokens, seen, cache: (ONE, cache),
             "keep": ("k",)},
            "keep names 'k', which is no array of the cache; those are none",
        ),
        (stream, {"chunk": "8"}, "chunk must be a whole number above 0, got '8'"),
        (speculate, {"init_cache": lambda *size: {}}, "ahead=4 for a cache that is none of models.init_cache: give"),
        (beam_search, {"beams": 2, "how": Sampling(np.ones(4))}, r"temperature has shape \(4, 1\); beams have no row"),
        (beam_search, {"beams": 2, "pad_token": V}, "pad_token has the id 11"),
        (beam_search, {"beams": 2, "prompts": PROMPTS[:0], "seen": SEEN[:0]}, "prompts has no row"),
        (sample, {"alternatives": V + 1}, "alternatives=12 is more than the 11 tokens that the model knows"),
        (sample, {"alternatives": -1}, r"alternatives must be in \[0, inf\), got -1"),
        (ENGINES["queue"], {"alternatives": V + 1}, "alternatives=12 is more than the 11 tokens"),
        (stream, {"keep": ("nothing",)}, "keep names 'nothing', which is no array of the cache"),
        (beam_search, {"beams": 2, "length_penalty": None}, "length_penalty must be a finite number, got None"),
        (sample, {"alternatives": 1.5}, "alternatives must be a whole number, how many of the likeliest tokens, got 1"),
        (sample, {"forced": np.full((2, N), 1.0)}, "forced is of type float64; give int32"),
        (sample, {"keep": "k"}, r"keep must be names in a tuple, such as \('routes',\), got 'k'"),
        (stream, {"keep": None}, "keep must be names in a tuple, .* got None"),
        (speculate, {"forget": "all"}, "forget must be a function"),
        (stream, {"chunk": 2.0}, "chunk must be a whole number above 0, got 2.0"),
        (stream, {"until": "stop"}, "until must be a function of a row's tokens, .* got 'stop'"),
        (speculate, {"ahead": 2.5}, "ahead must be a whole number above 0, got 2.5"),
        (speculate, {"draft": (PARAMS, *MODEL)}, r"draft must be a Draft\(params, apply, init_cache\), got tuple"),
        (sample_queue, {"slots": 2.5}, "slots must be a whole number above 0, got 2.5"),
        (sample_queue, {"slots": 2, "together": 0.5}, "together must be a whole number above 0, got 0.5"),
        (beam_search, {"beams": 2.5}, "beams must be a whole number above 0, got 2.5"),
        (beam_search, {"beams": 2, "length_penalty": np.nan}, "length_penalty must be a finite number, got nan"),
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
    is the limit, stops that are given as an array or a set, limits as a list, ids of another type of whole numbers;
    and what is traced has no numbers to look at."""
    tokens = LONGEST - 5
    how = Sampling(min_length=tokens, end_tokens=(3, 4), allowed=np.arange(V) != 4)
    out = ask(sample, prompts=OLD, length=tokens, end_tokens=np.array([3, -1, 4]), how=how, apply=MODEL.apply)
    same = ask(
        sample, prompts=OLD.astype(np.int64), length=tokens, end_tokens={3, 4}, how=how, apply=MODEL.apply,
        limits=[tokens, tokens], pad_token=np.uint8(3),
    )  # fmt: skip
    np.testing.assert_array_equal(same.tokens, out.tokens)
    assert out.alive.all() and np.isfinite(out.logps).all()  # behind the last position there would be no number
    traced = jax.jit(lambda prompts, seen, how: ask(sample, prompts, seen, how=how, apply=MODEL.apply).tokens)
    assert traced(PROMPTS, SEEN, Sampling(temperature=0.0)).shape == (2, N)
