"""Distillation on sampled tokens: the equations one token at a time, and their means by enumeration."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pt_jax import divergences
from pt_jax.losses import distillation
from pt_jax.losses import on_policy_distillation as opd

MASK = np.array([[0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1], [1, 0, 0, 1, 1, 1]], bool)


def batch(seed, count=2):
    """Log-probabilities apart by ratios in [0.1, 10], NaN where not scored."""
    rng = np.random.default_rng(seed)
    base = -rng.uniform(0.1, 4, MASK.shape)
    apart = lambda: base + rng.uniform(np.log(0.1), np.log(10), MASK.shape)
    return [np.where(MASK, apart(), np.nan).astype(np.float32) for _ in range(count)]


# ---- the oracle: a row, then a token, at a time


def rows_of(fn, *arrays):
    """fn(a row's scored entries of each) -> its results, back in place."""
    out = np.zeros(MASK.shape)
    for b in range(len(MASK)):
        out[b, MASK[b]] = fn(*(np.float64(x[b, MASK[b]]) for x in arrays))
    return out


def returns(s, t, gamma, normalised):
    a, out = t - s, []
    for i in range(len(a)):
        powers = [gamma**j for j in range(len(a) - i)]
        out.append(np.dot(powers, a[i:]) / (sum(powers) if normalised else 1))
    return out


def importance_weighted(s, t, gamma):
    a = t - s
    return [(1 + gamma * (1 - np.abs(a[:i]).sum() / np.abs(a).sum())) * a[i] for i in range(len(a))]


JITTED = {
    name: jax.jit(getattr(opd, name))
    for name in ("opd_advantages", "reward_to_go", "mean_reward_to_go", "iw_opd_advantages", "clipped_importance")
}


@given(seed=st.integers(0, 1000))
def test_the_advantage_is_how_much_likelier_the_teacher_finds_it(seed):
    logps, teacher_logps = batch(seed)
    got = JITTED["opd_advantages"](logps, teacher_logps, MASK)
    np.testing.assert_allclose(got, rows_of(lambda s, t: t - s, logps, teacher_logps), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["reward_to_go", "mean_reward_to_go"])
@given(seed=st.integers(0, 1000), gamma=st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_the_return_is_the_equation_over_scored_tokens(name, seed, gamma):
    logps, teacher_logps = batch(seed)
    got = JITTED[name](logps, teacher_logps, MASK, gamma=gamma)
    expected = rows_of(lambda s, t: returns(s, t, gamma, name == "mean_reward_to_go"), logps, teacher_logps)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@given(seed=st.integers(0, 1000), gamma=st.sampled_from([0.0, 0.5, 2.0]))
def test_the_importance_weight_is_the_equation(seed, gamma):
    logps, teacher_logps = batch(seed)
    got = JITTED["iw_opd_advantages"](logps, teacher_logps, MASK, gamma=gamma)
    expected = rows_of(lambda s, t: importance_weighted(s, t, gamma), logps, teacher_logps)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@given(seed=st.integers(0, 1000), clip=st.sampled_from([0.5, 2.0, 5.0]))
def test_the_clipped_importance_is_the_equation(seed, clip):
    losses, logps, old_logps = batch(seed, 3)
    got = JITTED["clipped_importance"](losses, logps, old_logps, MASK, clip=clip)
    expected = rows_of(lambda x, new, old: x * np.minimum(np.exp(new - old), clip), losses, logps, old_logps)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_the_losses_are_minus_advantage_times_log_probability():
    logps, teacher_logps, old_logps = batch(0, 3)
    got = opd.sampled_reverse_kl(logps, teacher_logps, MASK)
    np.testing.assert_allclose(got, rows_of(lambda s, t: (s - t) * s, logps, teacher_logps), rtol=1e-4, atol=1e-6)
    got = opd.iw_opd(logps, old_logps, teacher_logps, MASK, gamma=0.7)
    expected = lambda s, old, t: -np.array(importance_weighted(old, t, 0.7)) * s
    np.testing.assert_allclose(got, rows_of(expected, logps, old_logps, teacher_logps), rtol=1e-4, atol=1e-6)


# ---- what flows where


@pytest.mark.parametrize("name", ["opd_advantages", "reward_to_go", "mean_reward_to_go", "iw_opd_advantages"])
def test_no_gradient_flows_through_an_advantage(name):
    for slopes in jax.grad(lambda s, t: getattr(opd, name)(s, t, MASK).sum(), (0, 1))(*batch(1)):
        np.testing.assert_array_equal(slopes, 0)


def test_the_gradient_of_a_loss_is_minus_its_advantage():
    logps, teacher_logps, old_logps = batch(2, 3)
    slopes = jax.grad(lambda *x: opd.iw_opd(*x, MASK).sum(), (0, 1, 2))(logps, old_logps, teacher_logps)
    advantages = opd.iw_opd_advantages(old_logps, teacher_logps, MASK)
    np.testing.assert_allclose(slopes[0], -advantages, rtol=1e-6)
    for none in slopes[1:]:
        np.testing.assert_array_equal(none, 0)
    slopes = jax.grad(lambda *x: opd.clipped_importance(*x, MASK).sum(), (0, 1, 2))(logps, old_logps, teacher_logps)
    assert (np.asarray(slopes[0])[MASK] > 0).all()  # the factor itself
    for none in slopes[1:]:
        np.testing.assert_array_equal(none, 0)


def test_the_gradient_of_sampled_reverse_kl_is_that_of_k2():
    logps, teacher_logps = batch(3)
    got, expected = (
        jax.grad(lambda x, fn=fn: fn(x, teacher_logps, MASK).sum())(logps)
        for fn in (opd.sampled_reverse_kl, divergences.k2)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


LOGITS = np.array([0.9, -1.3, 0.35, 2.0, -0.4], np.float32)
TEACHER = np.array([-0.2, 0.7, 0.35, 1.1, -2.0], np.float32)
EVERY = np.ones((1, 5), bool)


def exact_gradient(loss):
    two = lambda z: jnp.stack([z, z])[None]
    total = lambda z: loss(two(z), two(TEACHER), np.array([[False, True]])).sum()
    return jax.jit(jax.grad(total))(jnp.asarray(LOGITS))


def test_over_tokens_of_the_student_the_gradient_is_that_of_the_reverse_kl():
    """Every token once, weighed by how often the student draws it."""
    drawn = jax.nn.softmax(LOGITS)[None]
    sampled = lambda z: opd.sampled_reverse_kl(jax.nn.log_softmax(z)[None], jax.nn.log_softmax(TEACHER)[None], EVERY)
    got = jax.jit(jax.grad(lambda z: jnp.sum(drawn * sampled(z))))(jnp.asarray(LOGITS))
    np.testing.assert_allclose(got, exact_gradient(distillation.reverse_kl), rtol=1e-4, atol=1e-6)


def test_over_tokens_of_an_older_student_it_takes_the_importance():
    """Without the factor the gradient is another one; with it, as long as it is not clipped, it is the right one."""
    old = jax.nn.log_softmax(np.array([0.5, -0.5, 0.0, 1.5, 0.0], np.float32))[None]
    drawn, teacher = jnp.exp(old), jax.nn.log_softmax(TEACHER)[None]

    @functools.partial(jax.jit, static_argnums=1)
    @jax.grad
    def gradient(z, clip):
        logps = jax.nn.log_softmax(z)[None]
        loss = opd.sampled_reverse_kl(logps, teacher, EVERY)
        return jnp.sum(drawn * (opd.clipped_importance(loss, logps, old, EVERY, clip=clip) if clip else loss))

    exact = exact_gradient(distillation.reverse_kl)
    np.testing.assert_allclose(gradient(jnp.asarray(LOGITS), 100.0), exact, rtol=1e-4, atol=1e-6)
    assert np.abs(gradient(jnp.asarray(LOGITS), None) - exact).max() > 0.01


def test_the_mean_advantage_over_tokens_of_the_student_is_minus_the_reverse_kl():
    drawn, teacher = jax.nn.log_softmax(LOGITS)[None], jax.nn.log_softmax(TEACHER)[None]
    mean = jnp.sum(jnp.exp(drawn) * opd.opd_advantages(drawn, teacher, EVERY))
    logits = [np.stack([x, x])[None] for x in (LOGITS, TEACHER)]
    exact = distillation.reverse_kl(*logits, np.array([[False, True]]))[0, 1]
    np.testing.assert_allclose(mean, -exact, rtol=1e-5)


def test_the_return_of_two_tokens_has_the_gradient_of_the_kl_of_the_sequence():
    """The first token earns where it leads: without the later log-ratios the gradient is a part of the right one."""
    first, teacher_first = LOGITS[:2], TEACHER[:2]
    second, teacher_second = np.float32([[0.3, -0.8], [-1.0, 0.4]]), np.float32([[-0.4, 0.1], [1.2, -0.3]])
    ratios = lambda a, b: jax.nn.log_softmax(a) - jax.nn.log_softmax(b)

    def sequence_kl(z):
        p = jax.nn.softmax(z)
        later = (jax.nn.softmax(second) * ratios(second, teacher_second)).sum(-1)
        return jnp.sum(p * (ratios(z, teacher_first) + later))

    def surrogate(z, advantages):
        """All four sequences, weighed by how often they are drawn."""
        x, y = np.divmod(np.arange(4), 2)
        now = jnp.stack([jax.nn.log_softmax(z)[x], jax.nn.log_softmax(second)[x, y]], 1)
        teacher = jnp.stack([jax.nn.log_softmax(teacher_first)[x], jax.nn.log_softmax(teacher_second)[x, y]], 1)
        drawn = jax.lax.stop_gradient(jnp.exp(now.sum(1, keepdims=True)))
        return -jnp.sum(drawn * advantages(now, teacher, np.ones((4, 2), bool)) * now)

    exact = jax.jit(jax.grad(sequence_kl))(jnp.asarray(first))
    gradient = jax.jit(jax.grad(surrogate), static_argnums=1)
    np.testing.assert_allclose(gradient(jnp.asarray(first), opd.reward_to_go), exact, rtol=1e-4, atol=1e-6)
    assert np.abs(gradient(jnp.asarray(first), opd.opd_advantages) - exact).max() > 0.05


# ---- limits and corners


def test_without_discount_of_the_present_it_is_the_advantage_of_the_token():
    logps, teacher_logps = batch(4)
    expected = opd.opd_advantages(logps, teacher_logps, MASK)
    for fn in (opd.reward_to_go, opd.mean_reward_to_go, opd.trl_reward_to_go, opd.trl_mean_reward_to_go):
        np.testing.assert_allclose(fn(logps, teacher_logps, MASK, gamma=0.0), expected, rtol=1e-6)
    np.testing.assert_allclose(opd.iw_opd_advantages(logps, teacher_logps, MASK, gamma=0.0), expected, rtol=1e-6)


def test_the_mean_of_a_constant_gap_is_the_gap():
    """Length normalisation: being short or early in the row is no merit."""
    logps = np.zeros(MASK.shape, np.float32)
    got = opd.mean_reward_to_go(logps, logps + np.float32(0.7), MASK, gamma=0.9)
    np.testing.assert_allclose(got, np.where(MASK, 0.7, 0), rtol=1e-6)


def test_the_weight_falls_from_one_plus_gamma_and_stays_above_one():
    logps, teacher_logps = batch(5)
    weight = np.asarray(opd.iw_opd_advantages(logps, teacher_logps, MASK, gamma=0.5)) / np.asarray(
        np.where(MASK, opd.opd_advantages(logps, teacher_logps, MASK), 1)
    )
    for row, mask in zip(weight, MASK):
        if mask.any():
            np.testing.assert_allclose(row[mask][0], 1.5, rtol=1e-5)
            assert (np.diff(row[mask]) <= 1e-6).all() and (row[mask] > 1).all()


def test_a_row_that_agrees_with_the_teacher_has_no_nan():
    logps, _ = batch(6)
    for fn in (opd.iw_opd_advantages, opd.mean_reward_to_go):
        np.testing.assert_array_equal(fn(logps, logps, MASK), 0)
    slopes = jax.grad(lambda x: opd.iw_opd(x, logps, logps, MASK).sum())(logps)
    np.testing.assert_array_equal(slopes, 0)


def test_a_ratio_that_overflows_is_the_clip():
    x = np.zeros((1, 1), np.float32)
    got = opd.clipped_importance(x + 1, x + 200, x, np.ones((1, 1), bool))
    np.testing.assert_allclose(got, 2.0, rtol=1e-6)


# ---- TRL's


def trl_returns(logps, teacher_logps, mask, gamma, normalised):
    """As its code goes: a row from the first token of the answer to the end of the padding."""
    rewards = np.where(mask, np.float64(teacher_logps) - logps, 0)
    if gamma == 0:
        return rewards
    powers = gamma ** np.arange(rewards.shape[1])
    out = np.cumsum((rewards * powers)[:, ::-1], 1)[:, ::-1]
    return out / np.cumsum((np.where(mask, 1, 1e-4) * powers)[:, ::-1], 1)[:, ::-1] if normalised else out


@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
def test_trl_discounts_from_the_start_of_the_answer(gamma):
    answer = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], bool)
    logps, teacher_logps = np.random.default_rng(7).normal(size=(2, *answer.shape)).astype(np.float32)
    prompt = lambda x: np.pad(x, ((0, 0), (2, 0)))  # whatever stands before the answer
    for fn, normalised in ((opd.trl_reward_to_go, False), (opd.trl_mean_reward_to_go, True)):
        expected = np.where(answer, trl_returns(logps, teacher_logps, answer, gamma, normalised), 0)
        got = fn(*(prompt(x) for x in (logps, teacher_logps, answer)), gamma=gamma)
        np.testing.assert_allclose(got[:, 2:], expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(got[:, :2], 0)


def test_trl_shrinks_late_tokens_by_the_discount_and_the_paper_does_not():
    mask = np.ones((1, 6), bool)
    logps, teacher_logps = np.random.default_rng(8).normal(size=(2, 1, 6)).astype(np.float32)
    theirs = opd.trl_reward_to_go(logps, teacher_logps, mask, gamma=0.5)
    ours = opd.reward_to_go(logps, teacher_logps, mask, gamma=0.5)
    np.testing.assert_allclose(theirs, ours * 0.5 ** np.arange(6, dtype=np.float32)[None], rtol=1e-5)


def test_trl_counts_padding():
    logps, teacher_logps = np.random.default_rng(9).normal(size=(2, 1, 3)).astype(np.float32)
    values = {}
    for fn in (opd.mean_reward_to_go, opd.trl_mean_reward_to_go):
        widths = [((0, 0), (0, padding)) for padding in (0, 1000)]
        jitted = jax.jit(fn)
        short, long = (jitted(*(np.pad(x, w) for x in (logps, teacher_logps, np.ones((1, 3), bool)))) for w in widths)
        values[fn] = short, long[:, :3]
    np.testing.assert_allclose(*values[opd.mean_reward_to_go], rtol=1e-6)
    short, long = values[opd.trl_mean_reward_to_go]
    np.testing.assert_allclose(short, values[opd.mean_reward_to_go][0], rtol=1e-6)
    np.testing.assert_allclose(long[0, 0], short[0, 0] * 3 / (3 + 1000 * 1e-4), rtol=1e-4)


@pytest.mark.parametrize("name", ["reward_to_go", "mean_reward_to_go", "trl_reward_to_go", "trl_mean_reward_to_go"])
@pytest.mark.parametrize("gamma", [-0.1, 1.5])
def test_a_discount_out_of_range_is_refused(name, gamma):
    with pytest.raises(ValueError, match=rf"gamma must be in \[0, 1\], got {gamma}"):
        getattr(opd, name)(*batch(0), MASK, gamma=gamma)


def test_a_weight_or_a_clip_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"gamma must be in \[0.0, inf\), got -1.0"):
        opd.iw_opd_advantages(*batch(0), MASK, gamma=-1.0)
    with pytest.raises(ValueError, match=r"clip must be above 0, got 0.0"):
        opd.clipped_importance(*batch(0, 3), MASK, clip=0.0)
