import functools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pt_jax import advantages, divergences

nan = np.nan
B, T = 3, 6


def batches(data):
    """Rewards, values and a mask with holes and an empty row; rubbish where nothing is scored."""
    number = st.floats(-5, 5, width=16)
    rewards, values = np.array(data.draw(st.lists(number, min_size=36, max_size=36)), np.float32).reshape(2, B, T)
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=18, max_size=18))).reshape(B, T)
    mask[1] = False
    rubbish = data.draw(st.sampled_from([nan, np.inf, 1e9]))
    return (*(np.where(mask, x, rubbish).astype(np.float32) for x in (rewards, values)), mask)


def gae_of_the_compressed(rewards, values, mask, gamma, lam, bootstrap=(0.0,) * B):
    """Each row without what is not scored, in float64, by the double sum A_t = sum_k (gamma lam)^k d_{t+k}."""
    out = np.zeros(mask.shape)
    for i, scored in enumerate(mask):
        r, v = (x[i][scored].astype(np.float64) for x in (rewards, values))
        after = np.append(v, bootstrap[i])[1:]
        d = r + gamma * after - v
        n = np.broadcast_to(lam, B)[i] * gamma
        out[i, scored] = [sum(n**k * d[t + k] for k in range(len(d) - t)) for t in range(len(d))]
    return out


GAE = jax.jit(advantages.gae)
BOOTSTRAPPED = jax.jit(advantages.gae_bootstrapped)
ADAPTIVE = jax.jit(advantages.length_adaptive_gae)
TO_GO = jax.jit(advantages.reward_to_go)
discount = st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0])
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)


@given(st.data())
def test_gae_over_gaps_is_gae_of_the_row_without_them(data):
    rewards, values, mask = batches(data)
    gamma, lam = data.draw(discount), data.draw(discount)
    got, returns = GAE(rewards, values, mask, gamma=gamma, lam=lam)
    close(got, gae_of_the_compressed(rewards, values, mask, gamma, lam))
    close(returns, np.where(mask, np.asarray(got) + values, 0))


@given(st.data())
def test_a_row_that_was_cut_off_goes_on_at_its_bootstrap_value(data):
    rewards, values, mask = batches(data)
    gamma, lam = data.draw(discount), data.draw(discount)
    bootstrap = np.array(data.draw(st.lists(st.floats(-5, 5, width=16), min_size=B, max_size=B)), np.float32)
    got, returns = BOOTSTRAPPED(rewards, values, bootstrap, mask, gamma=gamma, lam=lam)
    close(got, gae_of_the_compressed(rewards, values, mask, gamma, lam, bootstrap))
    close(returns, np.where(mask, np.asarray(got) + values, 0))


def test_a_bootstrap_of_zero_is_none():
    rewards, values = np.random.default_rng(0).normal(size=(2, B, T)).astype(np.float32)
    mask = np.ones((B, T), bool)
    for got, expected in zip(BOOTSTRAPPED(rewards, values, np.zeros(B, np.float32), mask), GAE(rewards, values, mask)):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("filler", [0.0, 7.0, 1e9, nan])
def test_tool_tokens_in_a_row_change_nothing(filler):
    """Neither their values are bootstrapped from, nor does lambda count them as steps."""
    rewards, values = np.float32([[0.1, 0.2, 1.0]]), np.float32([[0.5, -0.3, 0.7]])
    plain, plain_returns = GAE(rewards, values, np.ones((1, 3), bool), gamma=0.9, lam=0.8)
    at = [1, 1, 2, 3, 3]
    wide = [np.insert(x, at, filler, axis=1) for x in (rewards, values)]
    mask = np.insert(np.ones((1, 3), bool), at, False, axis=1)
    got, returns = GAE(*wide, mask, gamma=0.9, lam=0.8)
    np.testing.assert_array_equal(np.asarray(got)[mask], plain[0])
    np.testing.assert_array_equal(np.asarray(returns)[mask], plain_returns[0])
    assert (np.asarray(got)[~mask] == 0).all() and (np.asarray(returns)[~mask] == 0).all()


@given(st.data())
def test_lambda_one_is_what_was_earned_less_the_value_and_lambda_zero_one_step(data):
    rewards, values, mask = batches(data)
    gamma = data.draw(discount)
    earned = np.asarray(TO_GO(rewards, mask, gamma=gamma))
    got, returns = GAE(rewards, values, mask, gamma=gamma, lam=1.0)
    close(got, np.where(mask, earned - values, 0))
    close(returns, earned)
    one_step, _ = GAE(rewards, values, mask, gamma=gamma, lam=0.0)
    for i, scored in enumerate(mask):
        r, v = rewards[i][scored], values[i][scored]
        close(np.asarray(one_step)[i][scored], r + gamma * np.append(v, 0)[1:] - v)


@given(st.data())
def test_reward_to_go_is_the_discounted_sum_of_what_comes(data):
    rewards, _, mask = batches(data)
    gamma = data.draw(discount)
    expected = gae_of_the_compressed(rewards, np.where(mask, 0, rewards), mask, gamma, 1.0)
    close(TO_GO(rewards, mask, gamma=gamma), expected)


@given(st.data())
def test_long_answers_look_further_ahead(data):
    rewards, values, mask = batches(data)
    alpha = data.draw(st.sampled_from([0.1, 0.5, 2.0]))
    lam = np.maximum(1 - 1 / (alpha * np.maximum(mask.sum(1), 1)), 0)
    got, returns = ADAPTIVE(rewards, values, mask, gamma=0.9, alpha=alpha)
    close(got, gae_of_the_compressed(rewards, values, mask, 0.9, lam))
    close(returns, TO_GO(rewards, mask, gamma=0.9))


def test_the_adaptive_weights_sum_to_alpha_times_the_length():
    """The surprise at the last token, as it arrives at those before it: lam^t, whose sum tends to 1 / (1 - lam)."""
    n = 4000
    rewards = np.zeros((1, n), np.float32)
    rewards[0, -1] = 1
    got, _ = advantages.length_adaptive_gae(rewards, np.zeros_like(rewards), np.ones((1, n), bool), alpha=0.05)
    np.testing.assert_allclose(np.asarray(got, np.float64).sum(), 0.05 * n, rtol=1e-3)
    fixed, _ = advantages.gae(rewards, np.zeros_like(rewards), np.ones((1, n), bool), lam=0.95)
    np.testing.assert_allclose(np.asarray(fixed, np.float64).sum(), 20, rtol=1e-3)


def test_the_gradient_in_values_is_its_slope(slope):
    rng = np.random.default_rng(2)
    rewards, values, w = rng.normal(size=(3, B, T))
    mask = np.array([[1, 0, 1, 1, 0, 1], [0] * 6, [1] * 6], bool)
    expected = slope(lambda v: (w * gae_of_the_compressed(rewards, v, mask, 0.9, 0.8)).sum(), values)
    with jax.enable_x64(True):
        weighed = lambda v: (w * advantages.gae(rewards, v, mask, gamma=0.9, lam=0.8)[0]).sum()
        got = jax.jit(jax.grad(weighed))(np.where(mask, values, nan))
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-8)


@given(st.data())
def test_the_score_stands_on_the_last_scored_token(data):
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=18, max_size=18))).reshape(B, T)
    scores = np.float32([0.35, -2.0, 7.0])
    expected = np.zeros((B, T), np.float32)
    for i, scored in enumerate(mask):
        if scored.any():
            expected[i, np.flatnonzero(scored)[-1]] = scores[i]
    np.testing.assert_array_equal(AT_END(scores, mask), expected)


AT_END = jax.jit(advantages.score_at_end)


def penalised(kl):
    """Rewards of tokens and scores of answers with a penalty, compiled."""
    both = advantages.kl_penalised_rewards, advantages.kl_penalised_scores
    return [jax.jit(functools.partial(fn, kl_coef=0.3, kl=kl)) for fn in both]


@pytest.mark.parametrize(
    ("kl", "penalty"), [(divergences.k1, lambda x: x), (divergences.k3, lambda x: np.exp(-x) - 1 + x)]
)
def test_each_token_pays_for_leaving_the_reference_and_the_last_one_earns(kl, penalty):
    rng = np.random.default_rng(3)
    logps, ref_logps = -rng.uniform(0.1, 4, (2, B, T))
    mask = np.array([[1, 0, 1, 1, 0, 0], [0] * 6, [1] * 6], bool)
    scores = np.array([0.35, 9.0, nan], np.float32)
    expected = np.where(mask, -0.3 * penalty(logps - ref_logps), 0)
    of_tokens, of_answers = penalised(kl)
    noisy = [np.where(mask, x, nan).astype(np.float32) for x in (logps, ref_logps)]
    np.testing.assert_allclose(of_answers(scores, *noisy, mask), scores + expected.sum(1), rtol=1e-5)
    expected[0, 3] += scores[0]
    expected[2, 5] += scores[2]
    np.testing.assert_allclose(of_tokens(scores, *noisy, mask), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "bad"), [("gamma", 1.1), ("gamma", -0.1), ("gamma", nan), ("lam", 2.0), ("lam", nan)])
def test_a_discount_out_of_range_is_refused(name, bad):
    one = np.ones((1, 1), np.float32)
    with pytest.raises(ValueError, match=rf"{name} must be in"):
        advantages.gae(one, one, one == 1, **{name: bad})
