"""The table of ``divergences``, claim by claim, against exact enumeration over a small categorical."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st

from pt_jax import divergences

LOGITS = np.array([0.9, -1.3, 0.35, 2.0, -0.4])  # of the policy
REF_LOGITS = np.array([-0.2, 0.7, 0.35, 1.1, -2.0])
EVERY = np.ones((1, 5), bool)


def log_softmax(z):
    return z - np.log(np.exp(z).sum())


def kl(logits, ref_logits):
    """KL(policy || reference) and its gradient in the policy's logits: p_v (log p_v / q_v - KL)."""
    gap = log_softmax(logits) - log_softmax(ref_logits)
    p = np.exp(log_softmax(logits))
    return p @ gap, p * (gap - p @ gap)


def reverse_kl(logits, ref_logits):
    """KL(reference || policy) and its gradient in the policy's logits: p_v - q_v."""
    p, q = np.exp(log_softmax(logits)), np.exp(log_softmax(ref_logits))
    return q @ np.log(q / p), p - q


def gradient_in_the_reward(estimator):
    """The value as a number that multiplies grad log p(token), over infinitely many tokens: sum_v p_v k_v (e_v - p)."""
    logp, ref = log_softmax(LOGITS)[None], log_softmax(REF_LOGITS)[None]
    value = np.asarray(estimator(logp.astype(np.float32), ref.astype(np.float32), EVERY)[0], np.float64)
    p = np.exp(logp[0])
    return p * (value - p @ value)


def mean_and_gradient(estimator, ref_logits=REF_LOGITS):
    """Over infinitely many tokens drawn from the policy, the draw itself being no part of the gradient.

    The row holds every token once, each weighted by how often the policy draws it.
    """
    drawn = np.exp(log_softmax(LOGITS))[None].astype(np.float32)
    ref_logps = log_softmax(ref_logits)[None].astype(np.float32)

    def mean(logits):
        return jnp.sum(drawn * estimator(jax.nn.log_softmax(logits)[None], ref_logps, EVERY))

    return jax.jit(jax.value_and_grad(mean))(jnp.asarray(LOGITS, jnp.float32))


def test_the_mean_of_k1_is_exactly_the_kl():
    np.testing.assert_allclose(mean_and_gradient(divergences.k1)[0], kl(LOGITS, REF_LOGITS)[0], rtol=1e-5)


def test_the_mean_of_k3_is_exactly_the_kl():
    np.testing.assert_allclose(mean_and_gradient(divergences.k3)[0], kl(LOGITS, REF_LOGITS)[0], rtol=1e-5)


def test_the_mean_of_k2_is_biased_and_less_so_near_the_reference():
    share = []
    for distance in (1.0, 0.1, 0.01):
        ref_logits = LOGITS + distance * (REF_LOGITS - LOGITS)
        exact = kl(LOGITS, ref_logits)[0]
        share.append(abs(mean_and_gradient(divergences.k2, ref_logits)[0] / exact - 1))
    assert share[0] > 0.1
    assert share[1] < share[0] / 5
    assert share[2] < 0.01


def test_the_gradient_of_k1_is_zero_on_average():
    """The classic: k1 put into the loss as a penalty is noise."""
    np.testing.assert_allclose(mean_and_gradient(divergences.k1)[1], 0, atol=1e-6)


def test_the_gradient_of_k1_does_not_know_the_reference():
    slopes = jax.grad(lambda x, ref: divergences.k1(x, ref, EVERY).sum())
    x = jnp.asarray(LOGITS[None], jnp.float32)
    np.testing.assert_array_equal(slopes(x, x + 1.0), slopes(x, x - 3.0))


def test_the_gradient_of_k2_is_that_of_the_kl():
    np.testing.assert_allclose(mean_and_gradient(divergences.k2)[1], kl(LOGITS, REF_LOGITS)[1], rtol=1e-4)


def test_the_gradient_of_k3_is_that_of_the_reverse_kl_and_not_of_the_kl():
    got = mean_and_gradient(divergences.k3)[1]
    np.testing.assert_allclose(got, reverse_kl(LOGITS, REF_LOGITS)[1], rtol=1e-4, atol=1e-6)
    assert np.abs(got - kl(LOGITS, REF_LOGITS)[1]).max() > 0.1


def test_k3_plus_has_the_mean_of_k3_and_the_gradient_of_k2():
    mean, gradient = mean_and_gradient(divergences.k3_plus)
    expected_mean, expected = kl(LOGITS, REF_LOGITS)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4)


def test_in_the_reward_k1_has_exactly_the_gradient_of_the_kl():
    np.testing.assert_allclose(gradient_in_the_reward(divergences.k1), kl(LOGITS, REF_LOGITS)[1], rtol=1e-5)


def test_in_the_reward_k2_is_biased():
    assert np.abs(gradient_in_the_reward(divergences.k2) - kl(LOGITS, REF_LOGITS)[1]).max() > 0.1


@pytest.mark.parametrize("estimator", [divergences.k3, divergences.k3_plus])
def test_in_the_reward_k3_is_biased_by_the_gradient_of_the_reverse_kl(estimator):
    bias = gradient_in_the_reward(estimator) - kl(LOGITS, REF_LOGITS)[1]
    np.testing.assert_allclose(bias, -reverse_kl(LOGITS, REF_LOGITS)[1], rtol=1e-4, atol=1e-6)
    assert np.abs(bias).max() > 0.1


@pytest.mark.parametrize("estimator", [divergences.k2, divergences.k3, divergences.k3_plus])
def test_a_step_down_the_gradient_comes_nearer_to_the_reference(estimator):
    step = LOGITS - 0.1 * np.asarray(mean_and_gradient(estimator)[1], np.float64)
    assert kl(step, REF_LOGITS)[0] < kl(LOGITS, REF_LOGITS)[0]


def by_the_equation(name, logps, ref_logps, mask):
    out = np.zeros(mask.shape)
    for i in zip(*np.nonzero(mask)):
        r = np.exp(np.float64(ref_logps[i]) - np.float64(logps[i]))
        k3 = r - 1 - np.log(r)
        out[i] = {"k1": -np.log(r), "k2": np.log(r) ** 2 / 2, "k3": k3, "k3_plus": k3}[name]
    return out


class DivergencesTest(parameterized.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    @parameterized.parameters("k1", "k2", "k3", "k3_plus")
    def test_the_equation(self, name):
        mask = np.array([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
        rng = np.random.default_rng(0)
        logps = np.where(mask, -rng.uniform(0.05, 3, mask.shape), np.nan).astype(np.float32)
        ref_logps = np.where(mask, logps + rng.uniform(np.log(0.3), np.log(3), mask.shape), 1e9).astype(np.float32)
        got = self.variant(getattr(divergences, name))(logps, ref_logps, mask)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, by_the_equation(name, logps, ref_logps, mask), rtol=1e-5, atol=1e-6)


SLOPES = {
    "k1": np.ones_like,
    "k2": lambda log_r: -log_r,
    "k3": lambda log_r: 1 - np.exp(log_r),
    "k3_plus": lambda log_r: -log_r,
}


@given(gaps=st.lists(st.floats(np.log(0.1), np.log(10)), min_size=6, max_size=6))
@pytest.mark.parametrize("name", ["k1", "k2", "k3", "k3_plus"])
def test_the_equation_and_its_slope_hold_for_any_ratio(name, gaps):
    logps = np.linspace(-4, -0.1, 6, dtype=np.float32).reshape(2, 3)
    ref_logps = logps + np.array(gaps, np.float32).reshape(2, 3)
    mask = np.array([[True, True, False], [True, False, True]])
    fn = getattr(divergences, name)
    np.testing.assert_allclose(
        fn(logps, ref_logps, mask), by_the_equation(name, logps, ref_logps, mask), rtol=1e-4, atol=1e-6
    )
    log_r = ref_logps.astype(np.float64) - logps
    expected = np.where(mask, SLOPES[name](log_r), 0)
    got = jax.grad(lambda x: fn(x, ref_logps, mask).sum())(logps)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


@given(st.lists(st.floats(-20, 20, width=32), min_size=6, max_size=6))
def test_k2_and_k3_are_never_negative(gaps):
    gaps = np.array([gaps], np.float32)
    for fn in (divergences.k2, divergences.k3, divergences.k3_plus):
        assert (fn(np.zeros_like(gaps), gaps, np.ones((1, 6), bool)) >= 0).all()


def test_k3_of_a_policy_close_by_does_not_round_to_zero():
    """exp(x) - 1 - x loses all digits at x = 1e-4 in float32; the answer is x^2 / 2."""
    got = divergences.k3(jnp.zeros((1, 1)), jnp.full((1, 1), 1e-3), EVERY[:, :1])
    np.testing.assert_allclose(got, 5e-7, rtol=1e-2)


ESTIMATORS = [divergences.k1, divergences.k2, divergences.k3, divergences.k3_plus]


@pytest.mark.parametrize("fn", ESTIMATORS)
def test_a_token_that_both_forbid_is_no_distance(fn):
    both = np.array([[-np.inf, -1.0]], np.float32)
    value, slope = jax.value_and_grad(lambda x: fn(x, both, EVERY[:, :2]).sum())(both)
    assert value == 0
    assert np.isfinite(slope).all()


@pytest.mark.parametrize("fn", ESTIMATORS)
def test_a_token_that_one_forbids_is_infinitely_far_and_leaves_the_others_their_gradient(fn):
    one, other = np.array([[-np.inf, -1.0, -2.0]], np.float32), np.array([[-1.0, -np.inf, -1.0]], np.float32)
    value = np.asarray(fn(one, other, EVERY[:, :3]))
    assert np.isinf(value[0, :2]).all() and np.isfinite(value[0, 2])
    slope = jax.grad(lambda x: fn(x, other, EVERY[:, :3]).sum())(one)
    assert np.isfinite(slope).all()
    np.testing.assert_allclose(slope[0, 2], SLOPES[fn.__name__](np.float64(1.0)), rtol=1e-5)


@pytest.mark.parametrize("gap", [50.0, -50.0])
@pytest.mark.parametrize("fn", ESTIMATORS)
def test_nothing_is_clamped_at_fifty_nats(fn, gap):
    """A clamp of the log-ratio to 20, or of k3 to 10, is in other frameworks; it takes the gradient away in silence."""
    x, ref = np.zeros((1, 1), np.float32), np.full((1, 1), gap, np.float32)
    value, slope = jax.value_and_grad(lambda x: fn(x, ref, EVERY[:, :1]).sum())(x)
    np.testing.assert_allclose(value, by_the_equation(fn.__name__, x, ref, EVERY[:, :1])[0, 0], rtol=1e-5)
    np.testing.assert_allclose(slope, SLOPES[fn.__name__](ref.astype(np.float64)), rtol=1e-5)


@pytest.mark.parametrize("fn", [divergences.k1, divergences.k2, divergences.k3])
def test_a_wrong_shape_is_told(fn):
    with pytest.raises(ValueError, match=r"ref_logps has shape \(3, 4\), expected \[B, T\] with T=5"):
        fn(np.zeros((3, 5)), np.zeros((3, 4)), np.ones((3, 5), bool))
    with pytest.raises(ValueError, match=r"mask has shape \(5,\), expected \[B, T\]"):
        fn(np.zeros((3, 5)), np.zeros((3, 5)), np.ones(5, bool))


# ---- exactly, over the vocabulary

B, T, V = 3, 4, 5
MASK = np.array([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 1]], bool)
ROWS = np.pad(MASK[:, 1:], ((0, 0), (0, 1)))  # the rows of logits that predict a scored token


def batch(seed):
    """Logits of policy and reference, NaN in the rows that predict nothing scored."""
    rng = np.random.default_rng(seed)
    return [np.where(ROWS[..., None], 2 * rng.normal(size=(B, T, V)), np.nan).astype(np.float32) for _ in range(2)]


def exactly(fn, logits, ref_logits, mask):
    """fn(log p, log q) for each scored token, from the row before it."""
    out = np.zeros(mask.shape)
    for b, t in zip(*np.nonzero(mask)):
        if t:
            out[b, t] = fn(*(log_softmax(np.float64(x[b, t - 1])) for x in (logits, ref_logits)))
    return out


def kl_of(p, q):
    return sum(np.exp(x) * (x - y) for x, y in zip(p, q) if x > -np.inf)


def jsd_of(p, q, beta):
    m = np.log(beta * np.exp(q) + (1 - beta) * np.exp(p))
    return beta * kl_of(q, m) + (1 - beta) * kl_of(p, m) if 0 < beta < 1 else kl_of(p, q) if beta else kl_of(q, p)


EXACT = {
    divergences.kl_to_reference: kl_of,
    divergences.kl_from_reference: lambda p, q: kl_of(q, p),
    divergences.generalized_jsd: lambda p, q: jsd_of(p, q, 0.5),
}
JITTED = {fn: jax.jit(fn) for fn in EXACT}
JSD = jax.jit(divergences.generalized_jsd)
every_exact = pytest.mark.parametrize("fn", EXACT, ids=lambda fn: fn.__name__)


@every_exact
@given(seed=st.integers(0, 1000))
def test_the_exact_divergence_is_the_equation(fn, seed):
    logits, ref_logits = batch(seed)
    got = JITTED[fn](logits, ref_logits, MASK)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, exactly(EXACT[fn], logits, ref_logits, MASK), rtol=1e-5, atol=1e-6)


@given(seed=st.integers(0, 1000), beta=st.sampled_from([0.0, 1.0, 0.1, 0.5, 0.9]))
def test_the_generalised_jsd_is_the_equation_for_a_traced_beta(seed, beta):
    logits, ref_logits = batch(seed)
    expected = exactly(lambda p, q: jsd_of(p, q, beta), logits, ref_logits, MASK)
    np.testing.assert_allclose(JSD(logits, ref_logits, MASK, beta=beta), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("fn", "options"),
    [
        *((fn, {}) for fn in EXACT),
        *((divergences.generalized_jsd, {"beta": beta}) for beta in (0.0, 0.1, 1.0)),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_the_gradient_of_the_exact_divergence_is_that_of_the_equation(fn, options, slope):
    logits, ref_logits = batch(0)
    w = np.linspace(-1, 2, B * T).reshape(B, T)
    equation = (lambda p, q: jsd_of(p, q, options["beta"])) if options else EXACT[fn]
    total = lambda a, b: np.sum(w * exactly(equation, a, b, MASK))
    got = jax.jit(jax.grad(lambda a, b: jnp.sum(w.astype(np.float32) * fn(a, b, MASK, **options)), (0, 1)))(
        logits, ref_logits
    )
    np.testing.assert_allclose(got[0], slope(lambda a: total(a, ref_logits), logits), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got[1], slope(lambda b: total(logits, b), ref_logits), rtol=1e-4, atol=1e-6)


def test_only_the_row_before_a_token_speaks_of_it():
    logits, ref_logits = (np.nan_to_num(x) for x in batch(3))
    changed = logits.copy()
    changed[2, 2] *= 0.5
    every = np.ones_like(MASK)
    for fn in JITTED.values():
        differ = np.asarray(fn(logits, ref_logits, every)) != np.asarray(fn(changed, ref_logits, every))
        assert [tuple(map(int, x)) for x in np.argwhere(differ)] == [(2, 3)]


def test_the_estimators_estimate_the_exact_divergence():
    """Of one token, by enumeration: the module's table and its exact part speak of the same thing."""
    two = [np.stack([x, x])[None].astype(np.float32) for x in (LOGITS, REF_LOGITS)]
    exact = divergences.kl_to_reference(*two, np.array([[False, True]]))[0, 1]
    np.testing.assert_allclose(mean_and_gradient(divergences.k3)[0], exact, rtol=1e-5)


def test_the_jsd_of_a_half_is_symmetric_and_of_beta_mirrors():
    logits, ref_logits = batch(4)
    np.testing.assert_allclose(JSD(logits, ref_logits, MASK), JSD(ref_logits, logits, MASK), rtol=1e-5)
    np.testing.assert_allclose(
        JSD(logits, ref_logits, MASK, beta=0.2), JSD(ref_logits, logits, MASK, beta=0.8), rtol=1e-5
    )


def test_the_ends_of_the_jsd_are_what_its_slope_tends_to():
    logits, ref_logits = batch(5)
    for beta, end in ((1e-3, 0.0), (1 - 1e-3, 1.0)):
        inside = np.asarray(JSD(logits, ref_logits, MASK, beta=beta)) / min(beta, 1 - beta)
        np.testing.assert_allclose(inside, JSD(logits, ref_logits, MASK, beta=end), rtol=0.05)
    np.testing.assert_array_equal(
        JSD(logits, ref_logits, MASK, beta=0.0), JITTED[divergences.kl_from_reference](logits, ref_logits, MASK)
    )
    np.testing.assert_array_equal(
        JSD(logits, ref_logits, MASK, beta=1.0), JITTED[divergences.kl_to_reference](logits, ref_logits, MASK)
    )


def test_the_jsd_is_bounded_by_the_entropy_of_beta():
    apart = np.where(np.arange(V) < 2, 60.0, -60.0).astype(np.float32) * np.ones((1, 2, 1), np.float32)
    for beta in (0.1, 0.5):
        bound = -beta * np.log(beta) - (1 - beta) * np.log(1 - beta)
        got = divergences.generalized_jsd(apart, -apart, np.array([[False, True]]), beta=beta)[0, 1]
        np.testing.assert_allclose(got, bound, rtol=1e-5)


def test_the_shares_of_the_jsd_sum_to_it_and_are_0_where_not_scored():
    logits, ref_logits = batch(6)
    shares = divergences.generalized_jsd_shares(logits, ref_logits, MASK, beta=0.3)
    assert shares.shape == (B, T, V)
    np.testing.assert_allclose(shares.sum(-1), JSD(logits, ref_logits, MASK, beta=0.3), rtol=1e-6)
    assert (np.asarray(shares)[~MASK] == 0).all()


FORBIDDEN = {  # by policy, by reference -> KL(p || q), KL(q || p) are finite
    "both": ([2], [2], True, True),
    "policy": ([1], [], True, False),
    "reference": ([], [1], False, True),
    "each another": ([1], [2], False, False),
}


@pytest.mark.parametrize("case", FORBIDDEN)
def test_logits_of_minus_infinity_have_a_value_that_is_told_and_a_finite_gradient(case):
    by_policy, by_reference, to_finite, from_finite = FORBIDDEN[case]
    logits, ref_logits = (np.nan_to_num(x) for x in batch(7))
    logits[..., by_policy], ref_logits[..., by_reference] = -np.inf, -np.inf
    finite = {"kl_to_reference": to_finite, "kl_from_reference": from_finite, "generalized_jsd": True}
    for fn, jitted in JITTED.items():
        value = np.asarray(jitted(logits, ref_logits, MASK))
        assert not np.isnan(value).any()
        assert np.isfinite(value).all() == finite[fn.__name__]
        if finite[fn.__name__]:
            with np.errstate(divide="ignore"):
                np.testing.assert_allclose(value, exactly(EXACT[fn], logits, ref_logits, MASK), rtol=1e-5)
        for slopes in jax.grad(lambda a, b, fn=fn: fn(a, b, MASK).sum(), (0, 1))(logits, ref_logits):
            assert np.isfinite(slopes).all()


def test_a_probability_that_rounds_to_0_is_not_0():
    """p = exp(-200) is 0 in float32; against a q of 0 the divergence is infinite all the same, and no NaN."""
    p = np.array([[[0.0, -200.0], [0, 0]]], np.float32)
    q = np.array([[[0.0, -np.inf], [0, 0]]], np.float32)
    assert divergences.kl_to_reference(p, q, np.array([[False, True]]))[0, 1] == np.inf
    np.testing.assert_allclose(divergences.kl_from_reference(p, q, np.array([[False, True]])), 0, atol=1e-6)


def test_what_is_the_same_has_no_divergence_and_no_gradient():
    logits, _ = batch(8)
    for fn in JITTED:
        value, slopes = jax.value_and_grad(lambda a, fn=fn: fn(a, logits, MASK).sum())(logits)
        np.testing.assert_allclose(value, 0, atol=1e-6)
        np.testing.assert_allclose(slopes, 0, atol=1e-6)


@pytest.mark.parametrize("beta", [-0.1, 1.1, float("nan")])
def test_a_share_outside_0_to_1_is_refused(beta):
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\], got"):
        divergences.generalized_jsd(*batch(0), MASK, beta=beta)


def test_logits_of_whole_numbers_and_of_another_vocabulary_are_refused():
    logits, _ = batch(0)
    with pytest.raises(ValueError, match="ref_logits must be of a float type, got int32"):
        divergences.kl_to_reference(logits, np.zeros((B, T, V), np.int32), MASK)
    with pytest.raises(ValueError, match=r"ref_logits has shape \(3, 4, 6\), expected \[B, T, V\] with V=5"):
        divergences.kl_from_reference(logits, np.zeros((B, T, V + 1), np.float32), MASK)
