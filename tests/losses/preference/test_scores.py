import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pt_jax.losses import preference
from pt_jax.losses.preference import scores

# f'(r) of each divergence D_f(policy || reference) = E_ref[f(r)], as the paper's table has it
SLOPES_OF_F = {
    "reverse_kl": (scores.reverse_kl, lambda r: np.log(r)),
    "forward_kl": (scores.forward_kl, lambda r: 1 - 1 / r),
    "jensen_shannon": (scores.jensen_shannon, lambda r: np.log(2 * r / (1 + r))),
    **{
        f"alpha_{a}": (functools.partial(scores.alpha_divergence, alpha=a), lambda r, a=a: (1 - r**-a) / a)
        for a in (0.5, 0.9, -1.0)
    },
}
EVERY = pytest.mark.parametrize(("score", "slope_of_f"), SLOPES_OF_F.values(), ids=SLOPES_OF_F.keys())
FAST = {name: jax.jit(score) for name, (score, _) in SLOPES_OF_F.items()}


@pytest.mark.parametrize("name", sorted(SLOPES_OF_F))
@given(u=st.lists(st.floats(-4, 4), min_size=3, max_size=3))
def test_the_score_is_the_slope_of_the_divergence(name, u):
    got = FAST[name](np.array(u, np.float32))
    np.testing.assert_allclose(
        got, SLOPES_OF_F[name][1](np.exp(np.float32(u).astype(np.float64))), rtol=1e-5, atol=1e-6
    )


@EVERY
def test_the_gradient_is_the_slope_of_the_score(slope, score, slope_of_f):
    u = np.array([-2.0, -0.3, 0.0, 0.7, 3.0])
    expected = slope(lambda u: slope_of_f(np.exp(u)).sum(), u)
    np.testing.assert_allclose(jax.grad(lambda u: score(u).sum())(np.float32(u)), expected, rtol=1e-5)


@EVERY
def test_a_policy_that_is_the_reference_feels_no_difference(score, slope_of_f):
    """f''(1) = 1 for all but one: to first order around the reference they are one loss."""
    np.testing.assert_array_equal(score(np.zeros(1, np.float32)), 0)
    expected = 0.5 if score is scores.jensen_shannon else 1
    np.testing.assert_allclose(jax.grad(lambda u: score(u).sum())(np.zeros(1, np.float32)), expected, rtol=1e-6)


def test_the_divergence_is_what_its_score_integrates_to():
    """sum_y p_ref f(p / p_ref), with f the integral of the score by r, is the KL and the Jensen-Shannon divergence."""
    p, q = np.array([0.2, 0.5, 0.3]), np.array([0.6, 0.1, 0.3])

    def divergence(score):
        total = 0.0
        for a, b in zip(p, q):
            r = np.linspace(1, a / b, 20001)
            total += b * np.trapezoid(np.asarray(score(np.log(r).astype(np.float32)), np.float64), r)
        return total

    m = (p + q) / 2
    kl = lambda a, b: (a * np.log(a / b)).sum()
    np.testing.assert_allclose(divergence(scores.reverse_kl), kl(p, q), rtol=1e-4)
    np.testing.assert_allclose(divergence(scores.forward_kl), kl(q, p), rtol=1e-4)
    np.testing.assert_allclose(divergence(scores.jensen_shannon), kl(p, m) + kl(q, m), rtol=1e-4)


def test_alpha_runs_from_the_reverse_to_the_forward_kl():
    u = np.array([-3.0, -0.1, 0.0, 2.0], np.float32)
    np.testing.assert_array_equal(scores.alpha_divergence(u, alpha=0.0), scores.reverse_kl(u))
    np.testing.assert_allclose(scores.alpha_divergence(u, alpha=1e-6), scores.reverse_kl(u), rtol=1e-5)
    np.testing.assert_array_equal(scores.alpha_divergence(u, alpha=1.0), scores.forward_kl(u))


@pytest.mark.parametrize("alpha", [0.0, 1e-6])
def test_the_gradient_is_finite_where_alpha_vanishes(alpha):
    u = np.array([-30.0, 0.0, 2.0], np.float32)
    by_u, by_alpha = jax.grad(lambda u, a: scores.alpha_divergence(u, alpha=a).sum(), (0, 1))(u, jnp.float32(alpha))
    np.testing.assert_allclose(by_u, 1, rtol=1e-4)
    assert np.isfinite(by_alpha)


@pytest.mark.parametrize("score", [scores.forward_kl, functools.partial(scores.alpha_divergence, alpha=0.9)])
@pytest.mark.parametrize("u", [-50.0, -79.0, -100.0, -1e4, 100.0])
def test_far_log_ratios_keep_a_finite_value_and_a_gradient(score, u):
    """exp(100) is not a float32; a cap would take the gradient, the overflow would make it NaN."""
    pair = np.full(1, u, np.float32), np.full(1, u - 1, np.float32), *np.zeros((2, 1), np.float32)
    loss = lambda *pair: preference.dpo(*pair, score=score).sum()
    value, slopes = jax.value_and_grad(loss, (0, 1))(*pair)
    assert np.isfinite(value) and np.isfinite(slopes).all()
    assert u > 0 or min(np.abs(np.concatenate(jax.vmap(jax.grad(lambda u: score(u[None])[0]))(pair[0])[None]))) > 0


@pytest.mark.parametrize(
    "loss", [preference.dpo, preference.robust_dpo, preference.hinge, preference.ipo, preference.exo,
             preference.discopop]
)  # fmt: skip
def test_a_loss_on_pairs_is_one_of_scores(loss):
    """With score, the loss is what it would be had the log-ratios been the scores."""
    pair = np.array([[-3.0, -1.0], [-2.0, -2.5], [-2.5, -1.5], [-2.2, -1.0]], np.float32)
    c, r = (
        np.float32(SLOPES_OF_F["forward_kl"][1](np.exp(np.float64(x)))) for x in (pair[0] - pair[2], pair[1] - pair[3])
    )
    got = loss(*pair, score=scores.forward_kl)
    np.testing.assert_allclose(got, loss(c, r, np.zeros_like(c), np.zeros_like(r)), rtol=1e-5)
    assert not np.allclose(got, loss(*pair))
