"""The sampler against the scorer, and what a sample must not depend on: its batch, its padding, its group, the day."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from pt_jax.models import Config, bind, init
from pt_jax.sampling import Sampling, decode, sample, sample_queue, sample_until, transform

CONFIG = Config(
    vocab=29, layers=2, width=16, heads=4, kv_heads=2, head_width=4, hidden=32, eps=1e-3, tied=False, qk_norm=False
)
MODEL = bind(CONFIG)
PROMPTS = [[5, 6, 7, 8, 9, 10, 3], [4], [0, 0, 11], [2, 22, 4, 4]]  # 0 is an ordinary token
P, T, N, V = len(PROMPTS), 8, 12, CONFIG.vocab
NEVER = (-1,)


def weights(seed=0):
    """Large enough that the model prefers something."""
    return jax.tree.map(lambda x: x * 12 if x.ndim > 2 or x.shape[0] == V else x, init(CONFIG, jax.random.key(seed)))


PARAMS = weights()


def padded(rows, length=T, fill=1):
    tokens, seen = np.full((len(rows), length), fill, np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :], seen[i, length - len(row) :] = row, True
    return tokens, seen


class Model(NamedTuple):
    apply: object
    init_cache: object


# Tiny programs compile longer than they run: half as long like this.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
NAMES = ("apply", "init_cache", "length", "group")
compiled = jit(lambda params, prompts, seen, key, more, **fixed: sample(params, prompts, seen, key, **more, **fixed),
               static_argnames=NAMES)  # fmt: skip


def completions(
    rows=PROMPTS, *, params=PARAMS, length=T, seed=0, fill=1, model=MODEL, group=1, n=N, by=compiled, **more
):
    """``sample`` with the settings of most tests, as numpy arrays."""
    more = {"end_tokens": NEVER, "pad_token": 0} | more
    fixed = {"apply": model.apply, "init_cache": model.init_cache, "length": n, "group": group}
    arguments = params, *padded(rows, length, fill), jax.random.key(seed)
    out = by(*arguments, more, **fixed) if by is compiled else by(*arguments, **more, **fixed)
    return jax.tree.map(np.asarray, out)


@functools.partial(jit, static_argnames=("apply", "length"))
def scores(params, tokens, seen, how, *, apply, length):
    """Logits of the sampled distribution and log-probabilities of the last ``length`` columns, teacher-forced."""
    logits = transform(apply(params, tokens, seen, None)[0][:, -length - 1 : -1], how)
    return logits, jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, -length:, None], 2)[..., 0]


def scored(out, rows=PROMPTS, *, params=PARAMS, group=1, how=None, model=MODEL):
    prompts, seen = (np.repeat(x, group, 0) for x in padded(rows))
    tokens, seen = np.concatenate([prompts, out.tokens], 1), np.concatenate([seen, out.alive], 1)
    how = Sampling() if how is None else how
    return jax.tree.map(np.asarray, scores(params, tokens, seen, how, apply=model.apply, length=out.tokens.shape[1]))


def assert_same(a, b):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.alive, b.alive)
    np.testing.assert_allclose(a.logps, b.logps, rtol=0, atol=1e-5)


def part(out, rows):
    return jax.tree.map(lambda x: x[rows], out)


def beginning(out, n):
    return out.replace(**{name: getattr(out, name)[:, :n] for name in ("tokens", "logps", "alive")})


# ---- the scorer agrees


@pytest.mark.parametrize(
    "how",
    [
        Sampling(), Sampling(0.5, V, 1.0, 0.0), Sampling(1.0, 4, 1.0, 0.0), Sampling(2.0, V, 0.7, 0.0),
        Sampling(1.0, V, 1.0, 0.2), Sampling(1.3, 6, 0.9, 0.05), Sampling(0.0, V, 1.0, 0.0),
    ],
    ids=lambda h: f"{h.temperature}-{h.top_k}-{h.top_p}-{h.min_p}",
)  # fmt: skip
def test_log_probabilities_are_those_of_the_teacher(how):
    """With padding that is an ordinary token and may be an end token as well: nothing reads masks off ids."""
    first = completions(group=3, how=how, pad_token=4)
    end = int(first.tokens[0, 3])
    for pad in (end, 4):
        out = completions(group=3, how=how, pad_token=pad, end_tokens=(end,), fill=pad)
        assert out.alive.sum() < out.alive.size
        logits, logps = scored(out, group=3, how=how)
        np.testing.assert_allclose(out.logps[out.alive], logps[out.alive], rtol=0, atol=1e-5)
        drawn = np.take_along_axis(logits, out.tokens[..., None], 2)[..., 0]
        assert np.isfinite(drawn[out.alive]).all() and (out.logps[out.alive] <= 0).all()
        if how.temperature == 0:
            np.testing.assert_array_equal(out.tokens[out.alive], logits.argmax(-1)[out.alive])


def test_the_pad_token_may_be_sampled():
    """It is a token like any other then: alive, with its log-probability, and the row goes on."""
    plain = completions(group=3)
    pad = int(np.bincount(plain.tokens[:, 1:-1].ravel()).argmax())
    out = completions(group=3, pad_token=pad, fill=pad)
    assert_same(out, plain)
    assert out.alive.all() and (out.tokens[:, 1:-1] == pad).any() and (out.logps < 0).all()


def test_the_tokens_come_from_the_model():
    """Of the first token, given the prompt, over many samples."""
    out = completions([PROMPTS[0]], group=4000, length=T, seed=3)
    expected = np.exp(np.asarray(jax.nn.log_softmax(scored(part(out, [0]), [PROMPTS[0]])[0][0, 0]), np.float64))
    count, often = np.bincount(out.tokens[:, 0], minlength=V), expected * 4000 > 5
    assert (
        scipy.stats.chisquare(count[often], expected[often] / expected[often].sum() * count[often].sum()).pvalue > 1e-3
    )


def coin(params, tokens, seen, cache):
    """A model that knows nothing: four tokens, equally likely."""
    return jnp.zeros((*tokens.shape, 4)), cache


def test_positions_samples_and_prompts_have_random_numbers_of_their_own():
    nothing = Model(coin, lambda rows, length: jnp.zeros((rows, length)))
    out = completions([[1]] * 24, params={}, model=nothing, group=24, length=2, seed=1)
    tokens = out.tokens.reshape(24, 24, N)
    for axis, step in ((0, 1), (1, 1), (2, 1), (2, 2), (0, 5)):
        a, b = np.delete(tokens, range(step), axis), np.delete(tokens, range(-step, 0), axis)
        table = np.histogram2d(a.ravel(), b.ravel(), bins=4)[0]
        assert scipy.stats.chi2_contingency(table).pvalue > 1e-3, f"axis {axis}, {step} apart"
    assert scipy.stats.chisquare(np.bincount(tokens.ravel())).pvalue > 1e-3
    np.testing.assert_allclose(out.logps, -np.log(4), rtol=1e-6)


# ---- what a sample does not depend on

IDS = np.array([10, 3, 7, 0])


@pytest.fixture(scope="module")
def base():
    return completions(group=2, prompt_ids=IDS)


def test_order_does_not_matter(base):
    order = np.array([2, 0, 3, 1])
    out = completions([PROMPTS[i] for i in order], group=2, prompt_ids=IDS[order])
    assert_same(out, part(base, (order[:, None] * 2 + np.arange(2)).ravel()))


def test_company_does_not_matter(base):
    for rows in ([0, 1], [2, 3]):
        out = completions([PROMPTS[i] for i in rows], group=2, prompt_ids=IDS[rows])
        assert_same(out, part(base, slice(2 * rows[0], 2 * rows[0] + 4)))


def test_padding_does_not_matter(base):
    assert_same(completions(group=2, prompt_ids=IDS, length=T + 5, fill=9), base)


def test_a_larger_group_has_the_same_first_samples(base):
    out = completions(group=5, prompt_ids=IDS)
    assert_same(part(out, (np.arange(P)[:, None] * 5 + np.arange(2)).ravel()), base)


def test_a_larger_limit_has_the_same_beginning(base):
    out = completions(group=2, prompt_ids=IDS, n=N + 3)
    assert_same(beginning(out, N), base)


def test_samples_of_a_group_of_prompts_and_of_keys_differ(base):
    assert len({row.tobytes() for row in base.tokens}) == 2 * P
    other_key = completions(group=2, prompt_ids=IDS, seed=1)
    other_ids = completions(group=2, prompt_ids=IDS + 1)
    alike = completions([PROMPTS[0]] * P, group=2, prompt_ids=IDS)
    assert (other_key.tokens != base.tokens).any(1).all() and (other_ids.tokens != base.tokens).any(1).all()
    assert len({row.tobytes() for row in alike.tokens}) == 2 * P  # the same prompt, under other ids
    same_ids = completions([PROMPTS[0]] * P, group=2, prompt_ids=np.array([7, 7, 8, 7]))
    assert_same(part(same_ids, [0, 1, 0, 1]), part(same_ids, [2, 3, 6, 7]))


def test_prompts_are_numbered_when_no_ids_are_given():
    assert_same(completions(group=2), completions(group=2, prompt_ids=np.arange(P)))


# ---- the end


@pytest.fixture(scope="module")
def counted():
    """A model that counts how often it is traced, and with how many rows and columns."""
    traces = []

    def apply(params, tokens, seen, cache):
        traces.append(tokens.shape)
        return MODEL.apply(params, tokens, seen, cache)

    return functools.partial(completions, model=Model(apply, MODEL.init_cache), by=sample, group=4), traces


def ended(plain, ends, pad):
    """What the tokens of rows that never end become when these tokens end them."""
    is_end = np.isin(plain.tokens, ends)
    alive = np.cumsum(is_end, 1) - is_end == 0
    return np.where(alive, plain.tokens, pad), np.where(alive, plain.logps, 0), alive


def test_an_end_token_belongs_to_the_completion_and_nothing_comes_after_it(counted):
    sampled, traces = counted
    plain = sampled(end_tokens=(-1, -1))
    common = np.bincount(plain.tokens.ravel(), minlength=V).argsort()[::-1]
    traced = len(traces)
    # each prompt is read once for its group, its end with each answer; and once it is seen how many tokens there are
    assert set(traces) == {(P, T - 1), (4 * P, 1), (1, 1)} and traces.count((1, 1)) == 1
    for ends in [(common[0], common[1]), (common[2], -1), (common[0], common[0]), (-1, -1), (0, 1)]:
        for pad in (0, common[0], common[3]):
            out = sampled(end_tokens=[int(e) for e in ends], pad_token=int(pad))
            tokens, logps, alive = ended(plain, ends, pad)
            np.testing.assert_array_equal(out.tokens, tokens)
            np.testing.assert_array_equal(out.alive, alive)
            np.testing.assert_allclose(out.logps, logps, rtol=0, atol=1e-6)
            assert (out.logps[~alive] == 0).all()
    assert len(set(ended(plain, common[:2], 0)[2].sum(1))) > 3  # rows end at many places
    assert len(traces) == traced


def test_other_numbers_take_effect_and_are_not_another_program(counted):
    sample_at, traces = counted
    sampled = lambda t, k, **more: sample_at(how=Sampling(t, k, 1.0, 0.0), **more)
    hot = sampled(1.0, V)
    traced = len(traces)
    greedy = sampled(0.0, V)
    assert (greedy.tokens != hot.tokens).any()
    np.testing.assert_array_equal(greedy.logps, 0)
    np.testing.assert_array_equal(sampled(1.0, 1).tokens, greedy.tokens)
    assert (sampled(1.0, V, seed=4).tokens != hot.tokens).any()
    new = sampled(0.0, V, params=weights(5)).tokens
    assert len(traces) == traced
    assert (new != greedy.tokens).any()


def test_new_weights_are_sampled_from_at_once():
    """Every call samples from the parameters that it is given: greedy, it takes the likeliest token of those."""
    how = Sampling(0.0, V, 1.0, 0.0)
    for seed in (0, 5, 6, 0):
        out = completions(params=weights(seed), group=3, how=how)
        logits, _ = scored(out, params=weights(seed), group=3, how=how)
        np.testing.assert_array_equal(out.tokens, logits.argmax(-1))


def test_one_token_is_a_completion(base):
    out = completions(group=2, prompt_ids=IDS, end_tokens=(), n=1)
    assert_same(out, beginning(base, 1))
    assert out.tokens.shape == out.logps.shape == out.alive.shape == (2 * P, 1)


def test_the_results_have_the_dtypes_that_training_takes(base):
    assert (base.tokens.dtype, base.logps.dtype, base.alive.dtype) == (np.int32, np.float32, bool)
    assert base.tokens.shape == (2 * P, N)


# ---- groups


def test_a_group_that_shares_its_prompt_is_that_prompt_repeated():
    """Greedy, as the random numbers of a group and of repeated prompts differ by design."""
    how = Sampling(0.0, V, 1.0, 0.0)
    shared = completions(group=3, how=how)
    repeated = completions([p for p in PROMPTS for _ in range(3)], how=how)
    assert_same(shared, repeated)
    assert len({row.tobytes() for row in repeated.tokens}) == P


# ---- other models


class Fading(nn.Module):
    """A recurrent model: a sum of embeddings that fades. Its state has features first, rows last."""

    @nn.compact
    def __call__(self, tokens, seen, state):
        x = nn.Embed(V, 6, embedding_init=nn.initializers.normal(2.0))(tokens)

        def step(state, xs):
            x, seen = xs
            state = jnp.where(seen[None, :], 0.7 * state + x.T, state)
            return state, state.T

        state, h = jax.lax.scan(step, state, (x.swapaxes(0, 1), seen.T))
        return nn.Dense(V, kernel_init=nn.initializers.normal(1.0))(jnp.tanh(h.swapaxes(0, 1))), state


def test_a_linen_model_with_a_cache_of_another_layout():
    linen = Fading()
    fresh = lambda rows, length: {"state": jnp.zeros((6, rows)), "read": jnp.int32(0), "room": jnp.zeros((length, 2))}

    def apply(params, tokens, seen, cache):
        cache = fresh(len(tokens), 1) if cache is None else cache
        logits, state = linen.apply(params, tokens, seen, cache["state"])
        return logits, cache | {"state": state, "read": cache["read"] + tokens.shape[1]}

    model = Model(apply, fresh)
    params = jit(linen.init)(jax.random.key(0), *padded(PROMPTS), jnp.zeros((6, P)))
    out = completions(params=params, model=model, group=3, end_tokens=(4, 9))
    assert (~out.alive).sum() > 0
    _, logps = scored(out, params=params, group=3, model=model)
    np.testing.assert_allclose(out.logps[out.alive], logps[out.alive], rtol=0, atol=1e-5)
    for by in (functools.partial(sample_queue, slots=5), functools.partial(sample_until, chunk=5)):
        assert_same(completions(params=params, model=model, group=3, end_tokens=(4, 9), by=by), out)


def test_a_function_without_a_memory_is_a_model():
    """It says what is before it, which is also who is scored where: one column off, and no number is right."""
    repeats = Model(
        lambda params, tokens, seen, cache: (5.0 * jax.nn.one_hot(tokens, V), cache), lambda rows, length: {}
    )
    forced = np.random.default_rng(0).integers(0, 3, (P, N)).astype(np.int32)
    before = np.concatenate([padded(PROMPTS)[0][:, -1:], forced[:, :-1]], 1)
    again = 5 - np.log(np.exp(5) + V - 1)
    expected = np.where(forced == before, again, again - 5)
    for by in (compiled, sample_until):
        out = completions(params={}, model=repeats, forced=forced, by=by)
        np.testing.assert_array_equal(out.tokens, forced)
        np.testing.assert_allclose(out.logps, expected, rtol=0, atol=1e-5)
    assert_same(completions(params={}, model=repeats, by=functools.partial(sample_queue, slots=2)),
                completions(params={}, model=repeats))  # fmt: skip


def test_sampling_is_a_function_that_may_be_jitted():
    """With padding that is known, too; all other tests but few hand it in as an argument of a jitted function."""
    prompts, seen = padded(PROMPTS)

    @jit
    def inside(params, prompts, key):
        settings = {"apply": MODEL.apply, "init_cache": MODEL.init_cache, "length": N, "group": 2}
        return sample(params, prompts, seen, key, end_tokens=NEVER, pad_token=0, **settings)

    out = jax.tree.map(np.asarray, inside(PARAMS, prompts, jax.random.key(0)))
    assert_same(out, completions(group=2))


# ---- mistakes


def test_prompts_that_cannot_be_are_refused():
    prompts, seen = padded(PROMPTS)
    ask = lambda prompts, seen, **more: sample(
        PARAMS, prompts, seen, jax.random.key(0), apply=pytest.fail, init_cache=pytest.fail,
        **{"length": 4, "end_tokens": NEVER, "pad_token": 0} | more,
    )  # fmt: skip
    right, gap, empty = seen.copy(), seen.copy(), seen.copy()
    right[1], gap[2, -2], empty[3] = seen[1, ::-1], False, False
    for bad, row in ((right, 1), (gap, 2), (empty, 3)):
        for array in (np.asarray, jnp.asarray):
            with pytest.raises(ValueError, match=rf"^prompt {row} is empty or not left-padded"):
                ask(prompts, array(bad))
    for wrong, message in [
        ((prompts[0], seen[0]), r"^prompts has shape \(8,\), expected \[P, T\]"),
        ((prompts, seen[:, 1:]), r"^seen has shape \(4, 7\), expected \[P, T\] with T=8 \(from prompts\)"),
        ((prompts, seen[:3]), r"^seen has shape \(3, 8\), expected \[P, T\] with P=4 \(from prompts\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            ask(*wrong)
    for more, message in [
        ({"prompt_ids": np.arange(3)}, r"^prompt_ids has shape \(3,\), expected \[P\] with P=4"),
        ({"length": 0}, r"^length must be above 0, got 0"),
        ({"group": 0}, r"^group must be above 0, got 0"),
        ({"how": Sampling(temperature=-1.0)}, r"^temperature must be at least 0"),
        ({"how": Sampling(top_p=0.0)}, r"^top_p must be above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            ask(prompts, seen, **more)


def test_prompts_without_any_column_are_refused():
    with pytest.raises(ValueError, match="prompt"):
        completions([[]], length=0, by=sample)


@pytest.mark.parametrize("piece", [2, 3, 7])
def test_a_prompt_that_is_read_in_pieces_gives_the_same_samples(piece, monkeypatch):
    """7 columns are read: three pieces and a rest, two and a rest, one."""
    expected = completions(group=2)
    monkeypatch.setattr(decode, "PIECE", piece)
    got = completions(group=2, by=lambda *given, **more: sample(*given, **more))
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_allclose(got.logps, expected.logps, rtol=0, atol=1e-5)
