import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pt_jax import weights
from pt_jax.losses.preference import paired
from pt_jax.losses.preference import reference_free as rf

# Summed log-probabilities and lengths of answers that are short, long, sure, hopeless
CHOSEN = np.array([-35.2, -7.1, -0.4, -12.0], np.float32)
REJECTED = np.array([-41.0, -3.3, -9.5, -0.9], np.float32)
CHOSEN_LENGTH = np.array([20.0, 7.0, 1.0, 9.0], np.float32)
REJECTED_LENGTH = np.array([11.0, 8.0, 6.0, 2.0], np.float32)
PAIRS = (CHOSEN, REJECTED, CHOSEN_LENGTH, REJECTED_LENGTH)

# ---- the equations, in float64


def logistic(h, s=0.0):
    """-(1 - s) log sigmoid(h) - s log sigmoid(-h), with -log sigmoid(h) = log(1 + e^-h)."""
    return (1 - s) * np.logaddexp(0, -h) + s * np.logaddexp(0, h)


def power(x, alpha):
    return (1 - np.exp(-alpha * x)) / alpha if alpha else x


def odds(x):
    return np.log(np.exp(x) / (1 - np.exp(x)))


def of_sums(equation):
    return lambda c, r, nc, nr, **numbers: equation(c - r, **numbers)


def of_means(equation, shape=lambda x, alpha: x):
    def computed(c, r, nc, nr, alpha=0.0, **numbers):
        c, r = (shape(x / np.maximum(n, 1), alpha) for x, n in ((c, nc), (r, nr)))
        return equation(c - r, **numbers)

    return computed


def smoothed(d, beta, gamma=0.0, label_smoothing=0.0):
    return logistic(beta * d - gamma, label_smoothing)


def squared(d, beta):
    return (d - 1 / (2 * beta)) ** 2


def hinged(d, beta):
    return np.maximum(0, 1 - beta * d)


# loss -> its equation, the hyperparameters it is tried with, how many of the four arrays it takes
EQUATIONS = {
    "cpo": (of_sums(smoothed), {"beta": 0.3, "label_smoothing": 0.1}, 2),
    "tpo": (of_sums(smoothed), {"beta": 0.3, "label_smoothing": 0.1}, 2),
    "cpo_hinge": (of_sums(hinged), {"beta": 0.3}, 2),
    "cpo_ipo": (of_means(squared), {"beta": 0.3}, 4),
    "simpo": (of_means(smoothed), {"beta": 2.0, "gamma": 0.7, "label_smoothing": 0.1}, 4),
    "tpo_l": (of_means(smoothed), {"beta": 2.0, "gamma": 0.7, "label_smoothing": 0.1}, 4),
    "alphapo": (of_means(smoothed, power), {"beta": 2.0, "gamma": 0.7, "alpha": 0.4, "label_smoothing": 0.1}, 4),
    "orpo": (of_means(logistic, lambda x, _: odds(x)), {}, 4),
}


def slopes_of(fn):
    return jax.jit(jax.grad(lambda *pairs, **numbers: fn(*pairs, **numbers).sum(), (0, 1)))


JITTED = {name: jax.jit(getattr(rf, name)) for name in EQUATIONS}
SLOPES = {name: slopes_of(getattr(rf, name)) for name in EQUATIONS}
EVERY = pytest.mark.parametrize("name", EQUATIONS)
OF_MEANS = [name for name, (_, _, arrays) in EQUATIONS.items() if arrays == 4]


def evaluate(name, pairs=PAIRS, fns=JITTED, **other):
    _, numbers, arrays = EQUATIONS[name]
    return fns[name](*pairs[:arrays], **numbers | other)


@EVERY
@given(data=st.data())
def test_the_equation(name, data):
    equation, numbers, _ = EQUATIONS[name]
    numbers = {
        k: data.draw(st.sampled_from([0.0, 0.49] if k == "label_smoothing" else [x, 0.05])) for k, x in numbers.items()
    }
    if name == "alphapo":
        numbers["alpha"] = data.draw(st.sampled_from([-1.0, 0.0, 0.25, 1.0]))
    four = lambda values: np.array(data.draw(st.lists(values, min_size=4, max_size=4)), np.float32)
    pairs = [four(st.floats(-30, -0.015625, width=32)) for _ in range(2)]
    pairs += [four(st.integers(0, 40)) for _ in range(2)]  # 0: a row that only fills the batch
    expected = equation(*(x.astype(np.float64) for x in pairs), **numbers)
    np.testing.assert_allclose(evaluate(name, pairs, **numbers), expected, rtol=1e-4, atol=1e-5)


@EVERY
def test_the_gradient_is_the_slope(name, slope):
    equation, numbers, _ = EQUATIONS[name]
    for at, got in enumerate(evaluate(name, fns=SLOPES)):
        pairs = [x.astype(np.float64) for x in PAIRS]
        total = lambda x, at=at, pairs=pairs: equation(*pairs[:at], x, *pairs[at + 1 :], **numbers).sum()
        np.testing.assert_allclose(got, slope(total, pairs[at]), rtol=1e-4, atol=1e-6)


@EVERY
def test_descent_raises_the_chosen_and_lowers_the_rejected(name):
    chosen, rejected = evaluate(name, fns=SLOPES, **{k: 0.0 for k in EQUATIONS[name][1] if k == "label_smoothing"})
    pull = np.ones(4)
    if name == "cpo_hinge":  # rests where the margin is reached
        pull = 0.3 * (CHOSEN - REJECTED) < 1
    if name == "cpo_ipo":  # goes back where it is passed
        pull = np.sign(1 / 0.6 - (CHOSEN / CHOSEN_LENGTH - REJECTED / REJECTED_LENGTH))
    np.testing.assert_array_equal(np.sign(chosen), -1 * pull)
    np.testing.assert_array_equal(np.sign(rejected), pull)


# ---- what an answer's length does


@pytest.mark.parametrize("name", OF_MEANS)
def test_saying_it_twice_changes_nothing_where_the_mean_token_counts(name):
    twice = (2 * CHOSEN, REJECTED, 2 * CHOSEN_LENGTH, REJECTED_LENGTH)
    np.testing.assert_allclose(evaluate(name, twice), evaluate(name), rtol=1e-5)


@pytest.mark.parametrize("name", ["cpo", "tpo", "cpo_hinge"])
def test_saying_it_twice_counts_twice_where_the_sum_counts(name):
    twice = (2 * CHOSEN, REJECTED, 2 * CHOSEN_LENGTH, REJECTED_LENGTH)
    assert (evaluate(name, twice) > evaluate(name))[:1].all()


@pytest.mark.parametrize("name", OF_MEANS)
def test_tokens_that_say_nothing_dilute_the_mean(name):
    """Tokens of probability 1: sums do not see them, averages do."""
    diluted = (CHOSEN, REJECTED, CHOSEN_LENGTH + 10, REJECTED_LENGTH)
    assert (evaluate(name, diluted) != evaluate(name)).all()


@pytest.mark.parametrize("name", OF_MEANS)
def test_lengths_may_be_whole_numbers(name):
    whole = (CHOSEN, REJECTED, CHOSEN_LENGTH.astype(np.int32), REJECTED_LENGTH.astype(np.int32))
    got = evaluate(name, whole)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, evaluate(name))


@EVERY
def test_rows_that_fill_the_batch_change_nothing(name):
    """Answers without tokens and a log-probability of 100, at a weight of 0."""
    w = np.array([0.25] * 4 + [0] * 2, np.float32)
    numbers, arrays = EQUATIONS[name][1:]
    filled = [np.append(x, [fill] * 2).astype(np.float32) for x, fill in zip(PAIRS, (100.0, -100.0, 0.0, 0.0))]

    def mean(chosen, rejected, *lengths):
        return weights.weighted_sum(getattr(rf, name)(chosen, rejected, *lengths, **numbers), w[: len(chosen)])

    value, slopes = jax.value_and_grad(mean, (0, 1))(*filled[:arrays])
    expected, expected_slopes = jax.value_and_grad(mean, (0, 1))(*PAIRS[:arrays])
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for got, want in zip(slopes, expected_slopes):
        np.testing.assert_allclose(got[:4], want, rtol=1e-6)
        np.testing.assert_array_equal(got[4:], 0)


# ---- which is which


def test_cpo_is_dpo_with_a_reference_that_likes_all_alike():
    alike = np.full(4, -3.7, np.float32)
    np.testing.assert_allclose(
        evaluate("cpo"), paired.dpo(CHOSEN, REJECTED, alike, alike, beta=0.3, label_smoothing=0.1), rtol=1e-5
    )


def test_the_hinge_is_slic_in_other_units():
    np.testing.assert_allclose(
        evaluate("cpo_hinge", beta=0.25), 0.25 * paired.slic(CHOSEN, REJECTED, delta=4.0), rtol=1e-5
    )


def test_simpo_of_single_tokens_without_a_margin_is_cpo():
    one = np.ones(4, np.float32)
    simpo = evaluate("simpo", (CHOSEN, REJECTED, one, one), beta=0.3, gamma=0.0)
    np.testing.assert_allclose(simpo, evaluate("cpo"), rtol=1e-6)


def test_the_margin_of_simpo_is_gamma():
    """The loss is log 2 where the mean tokens are gamma / beta apart."""
    one = np.ones(1, np.float32)
    got = rf.simpo(-1 * one, -1.25 * one, one, one, beta=2.0, gamma=0.5)
    np.testing.assert_allclose(got, np.log(2), rtol=1e-6)


def test_triple_preference_is_told_from_cpo_and_simpo_by_the_likelihood_alone():
    np.testing.assert_array_equal(evaluate("tpo"), evaluate("cpo"))
    np.testing.assert_array_equal(evaluate("tpo_l"), evaluate("simpo"))


@pytest.mark.parametrize("fns", [JITTED, SLOPES], ids=["value", "gradient"])
def test_alphapo_at_alpha_zero_is_simpo(fns):
    got = evaluate("alphapo", fns=fns, alpha=0.0)
    for x, expected in zip(jax.tree.leaves(got), jax.tree.leaves(evaluate("simpo", fns=fns))):
        np.testing.assert_array_equal(x, expected)


# ---- the shape of AlphaPO's reward

NATS = np.array([-40.0, -5.0, -1.0, -0.01, -1e-4, 0.0], np.float32)
REWARD = jax.jit(rf.alpha_reward)


@pytest.mark.parametrize("alpha", [1.0, 0.25, 1e-2, 1e-4, 1e-8, 0.0, -1e-8, -1e-4, -0.25, -1.0])
def test_the_reward_keeps_its_digits_down_to_alpha_zero(alpha):
    x = NATS.astype(np.float64)
    expected = -np.expm1(-alpha * x) / alpha if alpha else x
    np.testing.assert_allclose(REWARD(NATS, alpha=alpha), expected, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.5, 1e-2, 1e-6, 0.0, -1e-6, -0.5])
def test_the_derivatives_of_the_reward_in_both_arguments(alpha):
    """r' = p^-alpha, r'' = -alpha p^-alpha; in alpha at 0 it is -x^2 / 2."""
    reward = lambda x, alpha: rf.alpha_reward(x[None], alpha=alpha)[0]
    x = NATS.astype(np.float64)
    first = jax.vmap(jax.grad(reward), (0, None))(NATS, alpha)
    np.testing.assert_allclose(first, np.exp(-alpha * x), rtol=1e-5, atol=1e-7)
    second = jax.vmap(jax.grad(jax.grad(reward)), (0, None))(NATS, alpha)
    np.testing.assert_allclose(second, -alpha * np.exp(-alpha * x), rtol=1e-3, atol=1e-6)
    in_alpha = jax.vmap(jax.grad(reward, 1), (0, None))(NATS, alpha)
    exact = (x * np.exp(-alpha * x) + np.expm1(-alpha * x) / alpha) / alpha if abs(alpha) > 1e-3 else -(x**2) / 2
    np.testing.assert_allclose(in_alpha, exact, rtol=1e-3, atol=1e-6)


def test_alpha_bends_the_reward_of_small_probabilities_down_or_up():
    reward = lambda alpha: rf.alpha_reward(np.array([-3.0], np.float32), alpha=alpha)[0]
    assert reward(0.5) < -3.0 < reward(-0.5) < 0


# ---- odds near certainty


def test_log_odds_keep_their_digits_near_certainty():
    """p / (1 - p) = 1 / (e^-x - 1)."""
    x = -np.logspace(-7, 1.5, 40).astype(np.float32)
    np.testing.assert_allclose(rf.log_odds(x), -np.log(np.expm1(-x.astype(np.float64))), rtol=1e-6, atol=1e-6)
    slopes = jax.vmap(jax.grad(lambda x: rf.log_odds(x[None])[0]))(x)
    np.testing.assert_allclose(slopes, -1 / np.expm1(x.astype(np.float64)), rtol=1e-5)  # 1 / (1 - p)


def test_certain_answers_have_finite_losses_and_slopes():
    certain, unsure = np.zeros(4, np.float32), np.full(4, -1.0, np.float32)
    one = np.ones(4, np.float32)
    right = (certain, unsure, one, one)
    np.testing.assert_allclose(evaluate("orpo", right), 0, atol=1e-6)
    # d loss / d chosen = -e^-c / (1 / odds(c) + 1 / odds(r)), which is -odds(r) at certainty
    np.testing.assert_allclose(evaluate("orpo", right, SLOPES)[0], -np.exp(-1) / (1 - np.exp(-1)), rtol=1e-4)
    wrong = (unsure, certain, one, one)
    np.testing.assert_allclose(evaluate("orpo", wrong), -np.log(2.0**-24) - odds(-1.0), rtol=1e-5)
    assert (evaluate("orpo", wrong, SLOPES)[1] > 1e6).all() and np.isfinite(evaluate("orpo", wrong, SLOPES)).all()
    np.testing.assert_allclose(evaluate("orpo", (certain, certain, one, one)), np.log(2), rtol=1e-6)


def test_hopeless_answers_have_finite_losses_and_slopes():
    one = np.ones(4, np.float32)
    for pair in ((-1e4 * one, -one), (-one, -1e4 * one), (-1e4 * one, -2e4 * one)):
        for name in ("orpo", "cpo", "simpo", "cpo_ipo"):
            assert np.isfinite(evaluate(name, (*pair, one, one))).all()
            assert np.isfinite(evaluate(name, (*pair, one, one), SLOPES)).all()


# ---- bad input


@pytest.mark.parametrize(
    ("name", "hyperparameters", "message"),
    [
        ("cpo", {"beta": 0.0}, "beta must be above 0"),
        ("cpo_hinge", {"beta": -1.0}, "beta must be above 0"),
        ("cpo_ipo", {"beta": 0.0}, "beta must be above 0"),
        ("simpo", {"gamma": -0.1}, r"gamma must be in \[0.0, inf\)"),
        ("simpo", {"label_smoothing": 0.5}, r"label_smoothing must be in \[0.0, 0.5\)"),
        ("alphapo", {"alpha": float("inf")}, "alpha must be in"),
        ("tpo_l", {"beta": 0.0}, "beta must be above 0"),
    ],
)
def test_a_number_out_of_range_is_refused(name, hyperparameters, message):
    with pytest.raises(ValueError, match=message):
        evaluate(name, fns=vars(rf), **hyperparameters)


@pytest.mark.parametrize("name", OF_MEANS)
def test_a_length_of_another_shape_is_told(name):
    with pytest.raises(ValueError, match=r"rejected_length has shape \(3,\), expected \[B\] with B=4"):
        evaluate(name, (*PAIRS[:3], REJECTED_LENGTH[:3]), fns=vars(rf))
