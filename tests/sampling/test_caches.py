"""Whatever the cache is, a ring, int8, or shared by a group, the engines draw the same samples from it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pt_jax.models import Config, Execution, bind, init, init_cache
from pt_jax.sampling import Draft, Sampling, beam_search, sample, sample_queue, sample_until, speculate, stream, text

SIZES = {"vocab": 29, "width": 16, "heads": 4, "kv_heads": 2, "head_width": 4, "hidden": 32, "eps": 1e-3, "tied": False}
CONFIGS = {
    "no window": Config(**SIZES, layers=2),
    "all windows": Config(**SIZES, layers=2, windows=(4, 4)),
    "windows in turns": Config(**SIZES, layers=4, windows=(5, 0) * 2, local_rope_base=50.0),
    "windows and experts": Config(
        **SIZES, layers=2, windows=(0, 4), experts=4, expert_hidden=8, expert_layers=(False, True)
    ),
}
KEEP = {kind: ("routes", "position") if config.experts else ("position",) for kind, config in CONFIGS.items()}
P, T, N, G = 4, 34, 40, 2
RNG = np.random.default_rng(3)
PROMPTS = RNG.integers(0, 29, (P, T)).astype(np.int32)
SEEN = np.arange(T) >= np.array([[0], [33], [20], [3]])
EVERYTHING = Sampling(
    0.9, top_p=0.97, min_p=0.001, min_length=12, end_tokens=(3, 8), repetition_penalty=1.1, frequency_penalty=-0.3
)
# Tiny programs compile longer than they run: half as long like this.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def weights(config):
    return jax.tree.map(lambda x: x * 12 if x.ndim > 2 or x.shape[0] == 29 else x, init(config, jax.random.key(0)))


def drawn(by, kind, cache_dtype=None, forced=None, **more):
    program = compiled(by, kind, cache_dtype, *sorted(more.items()))
    out = program(weights(CONFIGS[kind]), PROMPTS, SEEN, {} if forced is None else {"forced": forced})
    return jax.tree.map(np.asarray, out[0] if by in (speculate, beam_search) else out)


@functools.cache
def compiled(by, kind, cache_dtype, *more):
    bound = bind(CONFIGS[kind], Execution(cache_dtype=cache_dtype))
    settings = {"apply": bound.apply, "init_cache": bound.init_cache, "length": N, "pad_token": 3, "end_tokens": (3, 8)}
    settings |= ({} if by is beam_search else {"group": G, "how": EVERYTHING}) | dict(more)
    key = () if by is beam_search else (jax.random.key(5),)
    run = lambda params, prompts, seen, arrays: by(params, prompts, seen, *key, **settings, **arrays)
    return run if by is sample_until else jit(run)


@functools.cache
def keeps_all(kind):
    """A cache without rings: of every layer all columns are there."""
    return functools.partial(init_cache, CONFIGS[kind], slack=T + N)


@functools.cache
def plain(kind):
    """Of a cache that keeps everything, a copy for each row."""
    out = drawn(sample, kind, init_cache=keeps_all(kind), shared_prefix=False, keep=KEEP[kind])
    assert len(set(out.alive.sum(1))) > 2 and out.ended.any() and out.alive.sum(1).max() > 20
    return out


def assert_same(got, expected):
    for name in ("tokens", "alive", "ended"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), err_msg=name)
    np.testing.assert_allclose(got.logps, expected.logps, rtol=0, atol=1e-5)


# ---- rings, and prompts that are there once


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_ring_and_a_shared_prompt_change_no_sample(kind):
    """Rings turn in the prompt and behind it. With penalties, which look back at it, and the experts' routes."""
    got, expected = drawn(sample, kind, keep=KEEP[kind]), plain(kind)
    assert_same(got, expected)
    for name in KEEP[kind]:
        read = np.concatenate([np.repeat(SEEN, G, 0), np.pad(expected.alive[:, 1:], ((0, 0), (0, 1)))], 1)
        axis = 0 if name == "position" else 1  # routes are [M, B, S, K]
        a, b = (np.moveaxis(np.asarray(x.kept[name]), axis, 0) for x in (got, expected))
        read = read if name == "position" else np.broadcast_to(read[:, None, :, None], a.shape)
        np.testing.assert_array_equal(a[read], b[read])


@pytest.mark.parametrize(
    ("by", "more"),
    [
        (sample_queue, {"slots": 5}), (sample_until, {}), (sample_until, {"shared_prefix": False}),
        (speculate, {"ahead": 4}), (speculate, {"ahead": 4, "shared_prefix": False}),
    ],
    ids=["queue", "until", "until, copies", "guesses", "guesses, copies"],
)  # fmt: skip
def test_every_engine_draws_from_rings_what_it_draws_from_a_whole_cache(by, more):
    assert_same(drawn(by, "windows in turns", **more), plain("windows in turns"))


@pytest.mark.parametrize("by", [sample_until, speculate], ids=["until", "guesses"])
def test_engines_choose_the_experts_that_the_plain_loop_chooses(by):
    """With the experts' own loops under those of the rows; and what is kept, of a prompt that is there once."""
    kept = KEEP["windows and experts"] if by is sample_until else ()
    got, expected = drawn(by, "windows and experts", **({"keep": kept} if kept else {})), plain("windows and experts")
    assert_same(got, expected)
    if kept:
        read = np.concatenate([np.repeat(SEEN, G, 0), np.pad(expected.alive[:, 1:], ((0, 0), (0, 1)))], 1)
        np.testing.assert_array_equal(got.kept["routes"][0][read], expected.kept["routes"][0][read])


def test_a_draft_may_have_experts():
    """And guesses what it would say by itself: it is the model."""
    kind = "windows and experts"
    model, params = bind(CONFIGS[kind]), weights(CONFIGS[kind])
    ask = jit(lambda params: speculate(
        params, PROMPTS, SEEN, jax.random.key(5), apply=model.apply, init_cache=model.init_cache, length=N,
        pad_token=3, end_tokens=(3, 8), group=G, how=EVERYTHING, ahead=4, draft=Draft(params, *model),
    ))  # fmt: skip
    out, reads = jax.tree.map(np.asarray, ask(params))
    assert_same(out, plain(kind))
    np.testing.assert_array_equal(reads, np.ceil(plain(kind).alive.sum(1) / 5))


def test_beams_are_found_in_rings():
    """With the prompt there once, and with a copy for each beam and no ring."""
    got = drawn(beam_search, "all windows", beams=3)
    expected = drawn(beam_search, "all windows", beams=3, init_cache=keeps_all("all windows"), shared_prefix=False)
    assert_same(got, expected)
    assert expected.alive.sum(1).max() > 24


# ---- int8


@pytest.fixture(scope="module")
def rounded():
    """Samples from an int8 cache, and their replay by the same program."""
    first = drawn(sample, "windows in turns", "int8", forced=np.full((P * G, N), -1, np.int32))
    return first, drawn(sample, "windows in turns", "int8", forced=first.tokens)


def test_a_replay_from_an_int8_cache_has_the_same_bits(rounded):
    """Of rings and shared prompts, too: what is rounded once is rounded the same way again."""
    for name in ("tokens", "logps", "alive", "ended"):
        np.testing.assert_array_equal(*(getattr(x, name) for x in rounded), err_msg=name)
    exact = plain("windows in turns")
    assert (np.abs(rounded[0].logps - exact.logps) > 1e-5).any()  # and they are not those of a float cache


@pytest.mark.slow
@pytest.mark.parametrize(
    ("by", "more"),
    [(sample, {"shared_prefix": False}), (sample_queue, {"slots": 5}), (speculate, {"ahead": 4})],
    ids=["copies", "queue", "guesses"],
)
def test_every_engine_reads_an_int8_cache_alike(by, more):
    """Tokens that one engine drew have the same log-probabilities by another. Where a number lies between two parts of
    127, rounding errors decide which it becomes, so a few are off by more than 1e-5."""
    out = drawn(by, "windows in turns", "int8", **more)
    again = drawn(sample, "windows in turns", "int8", forced=np.where(out.alive, out.tokens, np.int32(-1)))
    error = np.abs(again.logps - out.logps)[out.alive]
    assert np.median(error) < 1e-5 and error.mean() < 2e-3 and error.max() < 0.2, (error.mean(), error.max())


# ---- memory


def test_a_stream_holds_a_prompt_once_for_its_group():
    """Between two pieces, when nothing but its state is there."""
    bound = bind(CONFIGS["no window"])
    sizes = {}
    for share in (False, True):
        before = sum(x.nbytes for x in jax.live_arrays())
        parts = stream(
            weights(CONFIGS["no window"]), PROMPTS, SEEN, jax.random.key(5), apply=bound.apply, group=8, chunk=4,
            init_cache=bound.init_cache, length=N, pad_token=3, end_tokens=(3, 8), shared_prefix=share,
        )  # fmt: skip
        next(parts)
        sizes[share] = sum(x.nbytes for x in jax.live_arrays()) - before
    of_prompts = P * (T - 1) * 2 * 2 * 2 * 4 * 4  # layers, keys and values, heads, width, float32
    assert sizes[False] - sizes[True] > 0.9 * (8 - 1) * of_prompts


def test_the_memory_of_a_prompt_is_divided_by_its_group():
    """And a ring takes that of its window."""
    sizes = {"vocab": 8, "layers": 24, "width": 8, "heads": 1, "kv_heads": 1, "head_width": 8, "hidden": 8}
    prompts, group, tokens = 2, 16, 257

    @functools.cache
    def memory(windows, by=sample, **more):
        config = Config(**sizes, windows=windows)
        bound, params = bind(config), jax.eval_shape(lambda: init(config, jax.random.key(0)))

        def ask(params, prompts, seen):
            key = () if by is beam_search else (jax.random.key(0),)
            return by(
                params, prompts, seen, *key, apply=bound.apply, init_cache=bound.init_cache, length=16,
                end_tokens=(-1,), pad_token=0, **({"group": group} if by is sample else {}), **more,
            )  # fmt: skip

        rows = (jax.ShapeDtypeStruct((prompts, tokens), x) for x in (jnp.int32, bool))
        return jit(ask).lower(params, *rows).compile().memory_analysis().temp_size_in_bytes

    of_rows = lambda rows, tokens: rows * tokens * 24 * 2 * 8 * 4  # layers, keys and values, width, float32
    copies, shared = memory((), shared_prefix=False), memory(())
    saved = of_rows(prompts * group, tokens) - of_rows(prompts, tokens)
    assert copies - shared > 0.9 * saved, (copies, shared, saved)
    for by, rows in ((beam_search, {"beams": group}), (speculate, {"group": group, "ahead": 2})):
        theirs = [memory((), by, **rows, shared_prefix=share) for share in (False, True)]
        assert theirs[0] - theirs[1] > 0.9 * saved, (by.__name__, theirs, saved)
    ring = memory((16,) * 24, shared_prefix=False)
    assert copies - ring > 0.9 * (of_rows(prompts * group, tokens) - of_rows(prompts * group, 16 + 16))


# ---- programs, and mistakes


def test_prompts_of_many_lengths_are_one_program():
    """As text.complete hands them on, in buckets; a prompt that is longer than its bucket is a second."""
    traces, bound = [], bind(CONFIGS["no window"])

    def apply(params, tokens, seen, cache):
        traces.append(tokens.shape)
        return bound.apply(params, tokens, seen, cache)

    sampler = functools.partial(
        sample, apply=apply, init_cache=bound.init_cache, length=4, end_tokens=(3,), pad_token=3, group=1
    )

    class Tokenizer:
        batch_decode = staticmethod(lambda rows, skip_special_tokens: [str(row) for row in rows])

    def ask(length):
        prompts = [PROMPTS[0, :length], PROMPTS[1, :2]]
        text.complete(sampler, weights(CONFIGS["no window"]), Tokenizer, prompts, jax.random.key(0), pad_token=3)
        return len(traces)

    first = ask(26)
    assert first > 0 and len({shape[1] for shape in traces}) == 2
    for length in (27, 30, 31, 32):
        assert ask(length) == first
    assert ask(33) > first


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        (
            "all windows",
            {"keep": ("near",)},
            "'near', which is no array of the cache; those are count, end, position",
        ),
        (
            "no window",
            {"keep": ("routes",)},
            "'routes', which is no array of the cache; those are count, end, k, position, v",
        ),
        ("no window", {"keep": ("count",)}, "keep names 'count', which has no slot for each token; give shared_prefix"),
    ],
)
def test_what_cannot_be_kept_is_a_sentence(kind, more, message):
    with pytest.raises(ValueError, match=message):
        drawn(sample, kind, **more)
