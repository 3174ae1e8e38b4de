"""What is asked of routers, against loops in float64; what is masked does not exist; parts of a batch add up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pt_jax.models import routing

M, B, T, E = 3, 4, 6, 5
LENGTHS = np.array([6, 3, 0, 1])
MASK = np.arange(T) < LENGTHS[:, None]
MASK[0, 2] = False  # a hole


def logits(seed=0):
    return np.random.default_rng(seed).normal(size=(M, B, T, E), scale=2).astype(np.float32)


def softmax(x):
    p = np.exp(x.astype(np.float64))
    return p / p.sum()


def slow(x, mask, k):
    """balance, z, load_balancing by counting, token after token."""
    balance, z, count, probability, tokens = np.zeros((M, B)), np.zeros((M, B, T)), np.zeros(E), np.zeros(E), 0
    for m in range(M):
        for b in range(B):
            f, p, n = np.zeros(E), np.zeros(E), mask[b].sum()
            for t in np.flatnonzero(mask[b]):
                f[np.argsort(-x[m, b, t])[:k]] += 1
                p += softmax(x[m, b, t])
                z[m, b, t] = np.log(np.exp(x[m, b, t].astype(np.float64)).sum()) ** 2
            balance[m, b] = (f * E / (k * max(n, 1)) * p / max(n, 1)).sum()
            count, probability, tokens = count + f, probability + p, tokens + n
    return balance, z, E * (count / tokens * probability / tokens).sum()


@pytest.mark.parametrize("k", [1, 2, E])
def test_the_losses_are_their_equations(k):
    balance, z, whole = slow(logits(), MASK, k)
    np.testing.assert_allclose(routing.balance(logits(), MASK, per_token=k), balance, rtol=1e-5)
    np.testing.assert_allclose(routing.z(logits(), MASK), z, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(routing.load_balancing(logits(), MASK, per_token=k), whole, rtol=1e-5)


def test_even_use_is_1_and_one_expert_for_all_is_the_number_of_experts():
    one = np.zeros((1, 1, E, E), np.float32)
    one[..., 2] = 50
    even = 50 * np.eye(E, dtype=np.float32)[None, None]
    mask = np.ones((1, E), bool)
    np.testing.assert_allclose(routing.balance(one, mask, per_token=1), E, rtol=1e-5)
    np.testing.assert_allclose(routing.balance(even, mask, per_token=1), 1, rtol=1e-5)


def total(x, mask, rubbish=None):
    x = x if rubbish is None else jnp.where(mask[None, :, :, None], x, rubbish)
    return sum(jnp.sin(loss).sum() for loss in (
        routing.balance(x, mask, per_token=2), routing.z(x, mask), routing.load_balancing(x, mask, per_token=2)
    ))  # fmt: skip


@pytest.mark.parametrize("rubbish", [np.nan, np.inf, 1e9, -7.0])
def test_what_is_masked_does_not_exist(rubbish):
    filled = np.where(MASK[None, :, :, None], logits(), np.float32(rubbish))
    for (value, gradient), x in ((jax.value_and_grad(total)(jnp.asarray(x), MASK), x) for x in (logits(), filled)):
        np.testing.assert_allclose(value, total(logits(), MASK), rtol=1e-6)
        assert np.isfinite(gradient).all() and (np.asarray(gradient)[:, ~MASK] == 0).all(), x
        assert (np.asarray(gradient)[:, MASK] != 0).all()
    wider = np.pad(filled, ((0, 0), (1, 2), (2, 1), (0, 0)), constant_values=rubbish)
    wider_mask = np.pad(MASK, ((1, 2), (2, 1)))
    np.testing.assert_allclose(total(wider, wider_mask), total(logits(), MASK), rtol=1e-6)
    choices = np.argsort(-logits(), -1)[..., :2]
    spoilt = np.where(MASK[None, :, :, None], choices, 10**6)
    np.testing.assert_array_equal(routing.loads(spoilt, MASK, E), routing.loads(choices, MASK, E))


def test_rows_do_not_know_each_other():
    """So that parts of a batch add up; load_balancing is of the whole batch, and says so."""
    for i in range(B):
        x, mask = logits()[:, i : i + 1], MASK[i : i + 1]
        for fn in (lambda x, mask: routing.balance(x, mask, per_token=2), routing.z):
            np.testing.assert_allclose(fn(x, mask)[:, 0], fn(logits(), MASK)[:, i], rtol=1e-6)
        choices = np.argsort(-logits(), -1)[..., :2]
        np.testing.assert_array_equal(
            routing.loads(choices[:, i : i + 1], mask, E)[0], routing.loads(choices, MASK, E)[i]
        )


def test_loads_are_counted_and_described():
    choices = np.argsort(-logits(), -1)[..., :2]
    loads = np.asarray(routing.loads(choices, MASK, E))
    for b in range(B):
        for m in range(M):
            np.testing.assert_array_equal(loads[b, m], np.bincount(choices[m, b][MASK[b]].ravel(), minlength=E))
    metrics = routing.load_metrics(loads)
    per_layer = loads.sum(0)
    assert metrics["router/max_load"] == pytest.approx((per_layer.max(-1) / per_layer.mean(-1)).mean())
    assert metrics["router/dead_experts"] == pytest.approx((per_layer == 0).mean())
    assert routing.load_metrics(np.zeros((2, M, E))) == {"router/max_load": 0.0, "router/dead_experts": 1.0}


def test_a_step_down_the_balance_evens_the_use():
    x = jnp.asarray(logits()[:1])
    loss = lambda x: routing.balance(x, MASK, per_token=2).sum()
    for _ in range(30):
        x = x - 5 * jax.grad(loss)(x)
    assert loss(x) < 0.9 * loss(jnp.asarray(logits()[:1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((M, B, E), np.float32), MASK), r"^logits has shape .*, expected \[M, B, T, E\]"),
        ((logits(), MASK[:, 1:]), r"^mask has shape .* with T=6 \(from logits\)"),
        ((np.zeros((M, B, T, E), np.int32), MASK), "^logits must be of a float type, got int32"),
    ],
)
def test_other_shapes_and_types_are_refused(arguments, message):
    for fn in (
        routing.z,
        lambda *a: routing.balance(*a, per_token=2),
        lambda *a: routing.load_balancing(*a, per_token=2),
    ):
        with pytest.raises(ValueError, match=message):
            fn(*arguments)


@pytest.mark.parametrize("k", [0, E + 1])
def test_a_number_of_experts_that_there_are_not_is_refused(k):
    for fn in (routing.balance, routing.load_balancing):
        with pytest.raises(ValueError, match=rf"^per_token must be from 1 to the number of experts, 5, got {k}$"):
            fn(logits(), MASK, per_token=k)
