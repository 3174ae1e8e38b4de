"""Every loss on pairs with a reference against its equation in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pt_jax import logps, weights
from pt_jax.losses import preference


def sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))


def loss(x):
    """-log sigmoid(x)."""
    return np.logaddexp(0, -x)


# name -> the loss, its numbers, and the equation in c and r, the log-ratios
PAIRS = {
    "robust_dpo": (
        preference.robust_dpo,
        {"beta": 0.3, "label_smoothing": 0.2},
        lambda c, r: (0.8 * loss(0.3 * (c - r)) - 0.2 * loss(0.3 * (r - c))) / 0.6,
    ),
    "hinge": (preference.hinge, {"beta": 0.3}, lambda c, r: np.maximum(0, 1 - 0.3 * (c - r))),
    "ipo": (preference.ipo, {"beta": 0.2}, lambda c, r: (c - r - 2.5) ** 2),
    "exo": (
        preference.exo,
        {"beta": 0.3, "label_smoothing": 0.01},
        lambda c, r: (
            sigmoid(0.3 * (c - r)) * np.log(sigmoid(0.3 * (c - r)) / 0.99)
            + sigmoid(0.3 * (r - c)) * np.log(sigmoid(0.3 * (r - c)) / 0.01)
        ),
    ),
    "discopop": (
        preference.discopop,
        {"beta": 0.3, "tau": 0.5},
        lambda c, r: (
            (1 - sigmoid(0.6 * (c - r))) * loss(0.3 * (c - r)) + sigmoid(0.6 * (c - r)) * np.exp(-0.3 * (c - r))
        ),
    ),
    "dpop": (
        preference.dpop,
        {"beta": 0.3, "penalty": 5.0},
        lambda c, r: loss(0.3 * (c - r - 5 * np.maximum(0, -c))),
    ),
    "nca": (
        preference.nca,
        {"beta": 0.3},
        lambda c, r: loss(0.3 * c) + 0.5 * loss(-0.3 * c) + 0.5 * loss(-0.3 * r),
    ),
    "bco_pair": (preference.bco_pair, {"beta": 0.3}, lambda c, r: loss(0.3 * c) + loss(-0.3 * r)),
    "sppo_hard": (preference.sppo_hard, {"beta": 0.2}, lambda c, r: (c - 2.5) ** 2 + (r + 2.5) ** 2),
    "apo_zero": (preference.apo_zero, {"beta": 0.3}, lambda c, r: 1 - sigmoid(0.3 * c) + sigmoid(0.3 * r)),
    "apo_down": (preference.apo_down, {"beta": 0.3}, lambda c, r: sigmoid(0.3 * c) + 1 - sigmoid(0.3 * (c - r))),
}
FAST = {name: (jax.jit(functools.partial(fn, **numbers)), equation) for name, (fn, numbers, equation) in PAIRS.items()}
SLOPES = {name: jax.jit(jax.grad(lambda *pair, fn=fn: fn(*pair).sum(), (0, 1, 2, 3))) for name, (fn, _) in FAST.items()}


@pytest.mark.parametrize("name", sorted(FAST))
@given(data=st.data())
def test_the_equation_holds_for_any_pair(name, data):
    numbers = data.draw(st.lists(st.floats(-20, 0, width=32), min_size=12, max_size=12))
    pair = np.array(numbers, np.float32).reshape(4, 3)
    fn, equation = FAST[name]
    c, r = np.float64(pair[0]) - pair[2], np.float64(pair[1]) - pair[3]
    np.testing.assert_allclose(fn(*pair), equation(c, r), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", sorted(FAST))
def test_the_equation_and_its_slope(slope, name):
    """Ratios from 1/10 to 10, in either order; every argument by central differences."""
    rng = np.random.default_rng(3)
    pair = -rng.uniform(1, 6, (2, 16)) + rng.uniform(np.log(0.1), np.log(10), (2, 2, 16))
    pair = pair.reshape(4, 16).astype(np.float32).astype(np.float64)
    fn, equation = FAST[name]
    by_the_equation = lambda p: equation(p[0] - p[2], p[1] - p[3])
    np.testing.assert_allclose(fn(*np.float32(pair)), by_the_equation(pair), rtol=1e-4, atol=1e-6)
    expected = slope(lambda p: by_the_equation(p).sum(), pair)
    np.testing.assert_allclose(np.stack(SLOPES[name](*np.float32(pair))), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(expected[:2], -expected[2:], rtol=1e-6, atol=1e-7)  # a function of the log-ratios


@pytest.mark.parametrize("name", sorted(FAST))
@pytest.mark.parametrize("far", [500.0, -500.0])
def test_far_pairs_stay_finite(name, far):
    zero = np.zeros(3, np.float32)
    pair = np.array([far, 0, far], np.float32), np.array([0, far, far], np.float32), zero, zero
    if name == "discopop" and far > 0:  # tau = 1/2 is wide; the paper's is 1/20
        pair = pair[0], zero, zero, zero
    assert np.isfinite(FAST[name][0](*pair)).all()
    assert np.isfinite(np.stack(SLOPES[name](*pair))).all()


def test_empty_pairs_change_nothing():
    """Pairs that only fill a batch, whatever is in them, are no reason to learn less from the others."""
    pair = -np.random.default_rng(0).uniform(1, 9, (4, 3)).astype(np.float32)
    filled = np.concatenate([pair, np.full((4, 2), 100.0, np.float32)], 1)

    @jax.jit
    @jax.jacrev
    def slopes(pair):
        means = [weights.weighted_sum(fn(*pair), weights.row_mean(np.arange(5) < 3)) for fn, _ in FAST.values()]
        return jnp.stack(means)

    got = slopes(filled)
    np.testing.assert_allclose(got[..., :3], [np.stack(SLOPES[name](*pair)) / 3 for name in FAST], rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(got[..., 3:], 0)


ZERO = np.zeros(1, np.float32)


def at(x):
    return np.full(1, x, np.float32)


# ---- each method's own point


def test_robust_dpo_is_unbiased_under_flipped_labels():
    """Averaged over a label that is right with probability 1 - e, it is DPO with the right label."""
    e, pair = 0.3, (at(-3.0), at(-5.0), at(-4.0), at(-4.5))
    flipped = pair[1], pair[0], pair[3], pair[2]
    robust = functools.partial(preference.robust_dpo, label_smoothing=e)
    np.testing.assert_allclose((1 - e) * robust(*pair) + e * robust(*flipped), preference.dpo(*pair), rtol=1e-5)
    np.testing.assert_allclose(robust(*pair, label_smoothing=0.0), preference.dpo(*pair), rtol=1e-6)


def test_exo_is_best_where_the_policy_believes_the_label_as_much_as_the_label_is_worth():
    h = at(np.log(0.9 / 0.1))
    exo = functools.partial(preference.exo, beta=1.0, label_smoothing=0.1)
    np.testing.assert_allclose(exo(h, ZERO, ZERO, ZERO), 0, atol=1e-6)
    assert exo(h + 1, ZERO, ZERO, ZERO) > 1e-3 and exo(h - 1, ZERO, ZERO, ZERO) > 1e-3


def test_a_hinge_has_no_slope_beyond_its_margin():
    slopes = jax.grad(lambda c: preference.hinge(c, *np.zeros((3, 2), np.float32), beta=0.5).sum())
    np.testing.assert_allclose(slopes(np.array([1.9, 2.1], np.float32)), [-0.5, 0])


def test_slic_is_the_hinge_without_a_reference():
    chosen, rejected = np.array([[-1.0, -4.0, -2.0], [-1.5, -2.0, -9.0]], np.float32)
    np.testing.assert_allclose(preference.slic(chosen, rejected, delta=2.0), [1.5, 4.0, 0.0])
    zero = np.zeros(3, np.float32)
    hinge = preference.hinge(chosen, rejected, zero, zero, beta=0.5)
    np.testing.assert_allclose(preference.slic(chosen, rejected, delta=2.0), 2 * hinge, rtol=1e-6)


def test_dpop_is_dpo_as_long_as_the_chosen_answer_gained():
    pair = at(-3.0), at(-5.0), at(-3.5), at(-4.5)
    np.testing.assert_allclose(preference.dpop(*pair, beta=0.1), preference.dpo(*pair), rtol=1e-6)
    np.testing.assert_allclose(preference.dpop(*pair[:2], at(-2.5), pair[3], penalty=0.0, beta=0.1),
                               preference.dpo(*pair[:2], at(-2.5), pair[3]), rtol=1e-6)  # fmt: skip


def test_dpop_does_not_let_both_answers_fall_together():
    """The failure of DPO that it was made for: the same margin, both a nat less likely."""
    fallen = at(-4.0), at(-6.0), at(-3.0), at(-4.0)
    by_chosen = lambda fn: jax.grad(lambda c: fn(c, *fallen[1:], beta=0.1)[0])(fallen[0])
    assert by_chosen(functools.partial(preference.dpop, penalty=50.0)) < 20 * by_chosen(preference.dpo)


def test_dpop_starts_as_dpo():
    start = at(-3.0), at(-5.0), at(-3.0), at(-5.0)
    grad = lambda fn: jax.grad(lambda c: fn(c, *start[1:], beta=0.1)[0])(start[0])
    np.testing.assert_allclose(grad(preference.dpop), grad(preference.dpo))


@given(offset=st.floats(-5, 5, width=32), h=st.floats(-5, 5, width=32))
def test_odpo_asks_for_the_offset_more(offset, h):
    got = preference.odpo(at(h), ZERO, ZERO, ZERO, at(offset), beta=1.0)
    np.testing.assert_allclose(got, loss(np.float64(h) - offset), rtol=1e-5)


def test_odpo_without_an_offset_is_dpo():
    pair = at(-3.0), at(-5.0), at(-3.5), at(-4.5)
    np.testing.assert_allclose(preference.odpo(*pair, ZERO), preference.dpo(*pair), rtol=1e-6)


def test_discopop_is_defined_for_a_pair_far_in_the_wrong_order():
    """exp(100) times a sigmoid that is 0; TRL's value is NaN."""
    got, slope = jax.value_and_grad(lambda c: preference.discopop(c, ZERO, ZERO, ZERO, beta=1.0)[0])(at(-100.0))
    np.testing.assert_allclose(got, 100.0, rtol=1e-6)
    np.testing.assert_allclose(slope, -1.0, rtol=1e-6)


def test_discopop_with_a_narrow_blend_is_one_loss_or_the_other():
    h = np.array([-2.0, 2.0], np.float32)
    got = preference.discopop(h, *np.zeros((3, 2), np.float32), beta=1.0, tau=1e-3)
    np.testing.assert_allclose(got, [loss(-2.0), np.exp(-2.0)], rtol=1e-5)


def test_discopop_rises_where_one_loss_takes_over_from_the_other():
    """As published: right at the reference it pushes the wrong way, and a few tau from it does not."""
    slope = jax.vmap(jax.grad(lambda h: preference.discopop(h[None], ZERO, ZERO, ZERO, beta=1.0)[0]))
    np.testing.assert_array_equal(np.sign(slope(np.array([-1.0, 0.0, 1.0], np.float32))), [-1, 1, -1])


def test_nca_wants_the_chosen_reward_at_log_two():
    """d/dc of -ls(c) - ls(-c)/2 is 0 where sigmoid(c) = 2/3."""
    slope = lambda c: jax.grad(lambda c: preference.nca(c, ZERO, ZERO, ZERO, beta=1.0)[0])(at(c))
    np.testing.assert_allclose(slope(np.log(2)), 0, atol=1e-6)
    assert slope(0.0) < 0 < slope(2.0)


@given(c=st.floats(-20, 20, width=32), r=st.floats(-20, 20, width=32))
def test_bco_bounds_dpo_from_above(c, r):
    pair = at(c), at(r), ZERO, ZERO
    assert preference.bco_pair(*pair, beta=1.0) >= preference.dpo(*pair, beta=1.0) - 1e-5


def test_sppo_by_hand():
    log_ratio, win_rates = np.array([0.0, 2.0, -5.0], np.float32), np.array([0.5, 0.7, 0.0], np.float32)
    got = preference.sppo(log_ratio - 3, np.full(3, -3, np.float32), win_rates, beta=0.1)
    np.testing.assert_allclose(got, 0, atol=1e-10)
    got = preference.sppo(log_ratio, np.zeros(3, np.float32), win_rates[::-1].copy(), beta=0.1)
    np.testing.assert_allclose(got, [25.0, 0.0, 25.0], atol=1e-5)


def test_sppo_hard_is_sppo_with_certain_win_rates():
    pair = at(-3.0), at(-5.0), at(-3.5), at(-4.5)
    apart = preference.sppo(pair[0], pair[2], at(1.0), beta=0.1) + preference.sppo(pair[1], pair[3], at(0.0), beta=0.1)
    np.testing.assert_allclose(preference.sppo_hard(*pair, beta=0.1), apart, rtol=1e-6)


@pytest.mark.parametrize(("fn", "signs"), [
    (preference.dpo, (-1, 1)), (preference.hinge, (-1, 1)), (preference.ipo, (-1, 1)), (preference.exo, (-1, 1)),
    (preference.nca, (-1, 1)), (preference.bco_pair, (-1, 1)),
    (preference.sppo_hard, (-1, 1)), (preference.apo_zero, (-1, 1)), (preference.apo_down, (0, 1)),
], ids=lambda x: getattr(x, "__name__", ""))  # fmt: skip
def test_which_way_each_answer_goes(fn, signs):
    """At the reference. Where the chosen is not good either, ``apo_down`` leaves it and lowers the other; once the
    margin is there, it lowers both."""
    slopes = jax.grad(lambda c, r: fn(c, r, ZERO, ZERO, beta=1.0)[0], (0, 1))
    np.testing.assert_array_equal(np.sign(np.concatenate(slopes(ZERO, ZERO))), signs)
    if fn is preference.apo_down:
        assert (np.concatenate(slopes(ZERO, at(-2.0))) > 0).all()


# ---- lengths

LENGTHS = np.array([4.0, 1.0, 0.0], np.float32), np.array([2.0, 8.0, 3.0], np.float32)
OF_AVERAGES = {
    "dpo_norm": (preference.dpo_norm, lambda c, r: loss(0.7 * (c - r))),
    "ipo_norm": (preference.ipo_norm, lambda c, r: (c - r - 0.5 / 0.7) ** 2),
}


@pytest.mark.parametrize("score", [preference.scores.reverse_kl, preference.scores.forward_kl])
@pytest.mark.parametrize("name", sorted(OF_AVERAGES))
def test_averages_are_of_the_sums_over_the_lengths(slope, name, score):
    """The score is of the sum, as in TRL; an answer without tokens counts as one of a single token."""
    fn, equation = OF_AVERAGES[name]
    s = {"reverse_kl": lambda u: u, "forward_kl": lambda u: 1 - np.exp(-u)}[score.__name__]
    pair = np.array([[-3.0, -1.0, 0.0], [-2.0, -2.5, -1.5], [-2.5, -1.5, 0.0], [-2.2, -1.0, -3.0]])

    def by_the_equation(pair):
        c, r = (s(pair[i] - pair[i + 2]) / np.maximum(LENGTHS[i], 1) for i in (0, 1))
        return equation(c, r)

    of = lambda pair: fn(*pair, *LENGTHS, beta=0.7, score=score)
    np.testing.assert_allclose(of(np.float32(pair)), by_the_equation(pair), rtol=1e-5)
    expected = slope(lambda pair: by_the_equation(pair).sum(), pair)
    np.testing.assert_allclose(jax.grad(lambda p: of(p).sum())(np.float32(pair)), expected, rtol=1e-4, atol=1e-6)


def test_lengths_may_be_whole_numbers():
    pair = -np.ones((4, 3), np.float32) * np.float32([[1], [2], [3], [5]])
    whole = [x.astype(np.int32) for x in LENGTHS]
    np.testing.assert_array_equal(preference.ipo_norm(*pair, *whole), preference.ipo_norm(*pair, *LENGTHS))


def test_answers_of_one_token_have_sums_that_are_averages():
    pair, one = -np.random.default_rng(0).uniform(1, 9, (4, 3)).astype(np.float32), np.ones(3, np.float32)
    np.testing.assert_allclose(preference.ipo_norm(*pair, one, one), preference.ipo(*pair), rtol=1e-6)
    np.testing.assert_allclose(preference.dpo_norm(*pair, one, one, beta=0.1), preference.dpo(*pair), rtol=1e-5)


def test_ipo_is_of_sums_and_ipo_norm_of_averages():
    """The convention that frameworks disagree on. Each token twice doubles what ``ipo`` regresses and leaves
    ``ipo_norm`` alone; tokens without information (p = p_ref) leave ``ipo`` alone and halve the other."""
    c, r, n = at(3.0), at(-1.0), at(4.0)
    ipo = lambda c, r: np.sqrt(preference.ipo(c, r, ZERO, ZERO, beta=10.0)) + 0.05
    ipo_norm = lambda c, r, n: np.sqrt(preference.ipo_norm(c, r, ZERO, ZERO, n, n, beta=10.0)) + 0.05
    np.testing.assert_allclose(ipo(c, r), 4, rtol=1e-6)
    np.testing.assert_allclose(ipo(2 * c, 2 * r), 8, rtol=1e-6)
    np.testing.assert_allclose(ipo_norm(c, r, n), 1, rtol=1e-6)
    np.testing.assert_allclose(ipo_norm(2 * c, 2 * r, 2 * n), 1, rtol=1e-6)
    np.testing.assert_allclose(ipo_norm(c, r, 2 * n), 0.5, rtol=1e-6)


MASK = np.array([[0, 1, 1, 0, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]], bool)
OTHER = np.array([2, 3, 4, 9], np.int32)
LD = jax.jit(preference.ld_sum)


@given(alpha=st.sampled_from([0.0, 0.3, 1.0]), other=st.lists(st.integers(0, 7), min_size=4, max_size=4))
def test_the_tail_of_the_longer_answer_weighs_alpha(alpha, other):
    x = -np.random.default_rng(1).uniform(0.1, 5, MASK.shape)
    expected = [
        sum(v if k < n else alpha * v for k, v in enumerate(row[m])) for row, m, n in zip(x, MASK, other, strict=True)
    ]
    x = np.where(MASK, x, np.nan).astype(np.float32)
    np.testing.assert_allclose(LD(x, MASK, np.array(other), alpha=alpha), expected, rtol=1e-5)


def test_the_gradient_of_a_tail_is_alpha():
    x = np.where(MASK, -1.0, np.nan).astype(np.float32)
    got = jax.grad(lambda x: preference.ld_sum(x, MASK, OTHER, alpha=0.25).sum())(x)
    np.testing.assert_array_equal(got, [[0, 1, 1, 0, 0.25, 0.25], [0, 0, 1, 1, 1, 0.25], [0] * 6, [1, 1, 1, 0, 0, 0]])


def test_alpha_of_one_is_the_plain_sum():
    x = -np.random.default_rng(1).uniform(0.1, 5, MASK.shape).astype(np.float32)
    np.testing.assert_allclose(preference.ld_sum(x, MASK, OTHER, alpha=1.0), logps.sequence_logps(x, MASK), rtol=1e-6)


@pytest.mark.parametrize(
    ("fn", "numbers", "message"),
    [
        (preference.exo, {"label_smoothing": 0.0}, "label_smoothing must be above 0"),
        (preference.exo, {"label_smoothing": 0.5}, "label_smoothing must be in"),
        (preference.robust_dpo, {"label_smoothing": 0.5}, "label_smoothing must be in"),
        (preference.dpop, {"penalty": -1.0}, "penalty must be in"),
        (preference.discopop, {"tau": 0.0}, "tau must be above 0"),
        *((fn, {"beta": 0.0}, "beta must be above 0") for fn, _, _ in PAIRS.values()),
    ],
)
def test_a_number_out_of_range_is_refused(fn, numbers, message):
    with pytest.raises(ValueError, match=message):
        fn(*np.zeros((4, 2), np.float32), **numbers)


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_an_alpha_that_is_no_share_is_refused(alpha):
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\]"):
        preference.ld_sum(jnp.zeros((1, 2)), jnp.ones((1, 2), bool), jnp.ones(1), alpha=alpha)
