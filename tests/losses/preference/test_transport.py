import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pt_jax.losses import preference


def by_the_equation(d, beta, e):
    return (1 - e) * np.logaddexp(0, -beta * d) + e * np.logaddexp(0, beta * d)


def quantiles_apart(pair):
    return np.sort(pair[0] - pair[1]) - np.sort(pair[2] - pair[3])


def quantiles_apart_unpaired(pair):
    return np.sort(pair[0] - pair[2]) - np.sort(pair[1] - pair[3])


BOTH = {"aot": (preference.aot, quantiles_apart), "aot_unpaired": (preference.aot_unpaired, quantiles_apart_unpaired)}
FAST = {name: (jax.jit(fn), apart) for name, (fn, apart) in BOTH.items()}
EVERY = pytest.mark.parametrize("name", sorted(BOTH))


@EVERY
@given(seed=st.integers(0, 99), e=st.sampled_from([0.0, 0.1]))
def test_the_equation(name, seed, e):
    pair = -np.random.default_rng(seed).uniform(0, 20, (4, 5)).astype(np.float32)
    fn, apart = FAST[name]
    got = fn(*pair, beta=0.3, label_smoothing=e)
    np.testing.assert_allclose(got, by_the_equation(apart(np.float64(pair)), 0.3, e), rtol=1e-4)


@EVERY
def test_the_gradient_is_the_slope(slope, name):
    pair = -np.random.default_rng(7).uniform(0, 9, (4, 5))
    fn, apart = BOTH[name]
    expected = slope(lambda pair: by_the_equation(apart(pair), 0.3, 0.1).sum(), pair)
    got = jax.grad(lambda pair: fn(*pair, beta=0.3, label_smoothing=0.1).sum())(np.float32(pair))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


@EVERY
def test_one_pair_is_dpo(name):
    pair = -np.random.default_rng(7).uniform(0, 9, (4, 1)).astype(np.float32)
    np.testing.assert_allclose(BOTH[name][0](*pair), preference.dpo(*pair), rtol=1e-5)


def test_the_order_of_the_pairs_does_not_matter():
    pair = -np.random.default_rng(7).uniform(0, 9, (4, 5)).astype(np.float32)
    order = np.array([3, 0, 4, 2, 1])
    for fn, _ in BOTH.values():
        np.testing.assert_allclose(fn(*pair[:, order]), fn(*pair), rtol=1e-5)
    mixed = np.stack([pair[0], pair[1][order], pair[2], pair[3][order]])
    np.testing.assert_allclose(preference.aot_unpaired(*mixed), preference.aot_unpaired(*pair), rtol=1e-5)
    assert not np.allclose(preference.aot(*mixed), preference.aot(*pair))


@EVERY
def test_a_batch_has_other_quantiles_than_its_parts(name):
    """Why these two are exempt from the law of microbatches."""
    pair = -np.random.default_rng(7).uniform(0, 9, (4, 6)).astype(np.float32)
    fn = BOTH[name][0]
    parts = np.concatenate([fn(*pair[:, :3]), fn(*pair[:, 3:])])
    assert abs(parts.sum() - fn(*pair).sum()) > 1e-3
