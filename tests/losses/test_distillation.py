"""The distillation losses against a float64 oracle that goes token by token, and against each other at their limits."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pt_jax import divergences
from pt_jax.losses import distillation
from pt_jax.losses.distillation import (
    eithers_top,
    forward_kl,
    from_hidden,
    generalized_jsd,
    reverse_kl,
    students_top,
    teachers_top,
    top_k_renormalised,
    top_k_with_tail,
)

B, T, V, D, E = 3, 5, 7, 4, 6
MASK = np.array([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 0, 1, 1, 1]], bool)
ROWS = np.pad(MASK[:, 1:], ((0, 0), (0, 1)))  # the rows of logits that predict a scored token
W = np.linspace(-1, 2, B * T).reshape(B, T).astype(np.float32)


def batch(seed):
    """Logits of student and teacher, NaN in the rows that predict nothing scored."""
    rng = np.random.default_rng(seed)
    return [np.where(ROWS[..., None], 2 * rng.normal(size=(B, T, V)), np.nan).astype(np.float32) for _ in range(2)]


# ---- the oracle


def softmax(z):
    e = np.exp(np.float64(z) - np.max(z))
    return e / e.sum()


def kl(p, q):
    return sum(a * np.log(a / b) for a, b in zip(p, q) if a > 0)


def jsd(s, t, beta):
    if beta in (0, 1):
        return kl(s, t) if beta else kl(t, s)
    m = beta * t + (1 - beta) * s
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


def renormalised(p, kept):
    return p[kept] / p[kept].sum()


def with_tail(p, kept):
    return np.append(p[kept], p[~kept].sum())


def top(z, k):
    return np.isin(np.arange(len(z)), np.argsort(-np.float64(z), kind="stable")[:k])


SUPPORTS = {
    teachers_top: lambda s, t, k: top(t, k),
    students_top: lambda s, t, k: top(s, k),
    eithers_top: lambda s, t, k: top(s, k) | top(t, k),
}


def by_the_equation(logits, teacher_logits, beta, temperature=1.0, reduce=lambda p, kept: p, support=None, k=None):
    out = np.zeros(MASK.shape)
    for b, t in zip(*np.nonzero(MASK)):
        if t:
            z, y = logits[b, t - 1], teacher_logits[b, t - 1]
            kept = SUPPORTS[support](z, y, k) if support else None
            out[b, t] = jsd(*(reduce(softmax(np.float64(x) / temperature), kept) for x in (z, y)), beta)
    return out


# ---- over the whole vocabulary

BETA = {forward_kl: 0.0, reverse_kl: 1.0, generalized_jsd: 0.5}
JITTED = {fn: jax.jit(fn) for fn in BETA}
every_loss = pytest.mark.parametrize("fn", BETA, ids=lambda fn: fn.__name__)


@every_loss
@given(seed=st.integers(0, 1000), temperature=st.sampled_from([0.5, 1.0, 3.0]))
def test_the_loss_is_the_equation(fn, seed, temperature):
    logits, teacher_logits = batch(seed)
    got = JITTED[fn](logits, teacher_logits, MASK, temperature=temperature)
    expected = by_the_equation(logits, teacher_logits, BETA[fn], temperature)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-6)


@given(seed=st.integers(0, 1000), beta=st.sampled_from([0.0, 0.1, 0.7, 1.0]))
def test_gkd_goes_from_the_forward_to_the_reverse_kl(seed, beta):
    logits, teacher_logits = batch(seed)
    got = JITTED[generalized_jsd](logits, teacher_logits, MASK, beta=beta, temperature=2.0)
    expected = by_the_equation(logits, teacher_logits, beta, 2.0)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-6)


@every_loss
def test_the_gradient_is_that_of_the_equation_and_the_teacher_has_none(fn, slope):
    logits, teacher_logits = batch(0)
    total = lambda a, b: jnp.sum(W * fn(a, b, MASK, temperature=1.5))
    got, into_teacher = jax.jit(jax.grad(total, (0, 1)))(logits, teacher_logits)
    expected = slope(lambda a: np.sum(W * by_the_equation(a, teacher_logits, BETA[fn], 1.5)), logits)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(into_teacher, 0)


def test_the_gradient_of_the_forward_kl_is_student_minus_teacher():
    logits, teacher_logits = (np.nan_to_num(x) for x in batch(1))
    got = jax.grad(lambda z: forward_kl(z, teacher_logits, MASK, temperature=2.0).sum())(logits)
    expected = (jax.nn.softmax(logits / 2) - jax.nn.softmax(teacher_logits / 2)) / 2
    expected = np.where(np.pad(MASK[:, 1:], ((0, 0), (0, 1)))[..., None], expected, 0)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_a_high_temperature_times_its_square_compares_the_logits_themselves():
    """Hinton et al.: in the limit, temperature^2 * KL is half the mean square between the centred logits."""
    logits, teacher_logits = batch(2)
    gap = np.nan_to_num(np.float64(logits) - teacher_logits)
    expected = np.where(MASK, np.pad(gap.var(-1)[:, :-1], ((0, 0), (1, 0))), 0) / 2
    for fn in (forward_kl, reverse_kl):
        got = 100.0**2 * np.asarray(JITTED[fn](logits, teacher_logits, MASK, temperature=100.0))
        np.testing.assert_allclose(got, expected, rtol=0.1, atol=5e-3)


def test_the_temperature_divides_the_logits_of_both():
    logits, teacher_logits = batch(3)
    for fn in BETA:
        np.testing.assert_allclose(
            JITTED[fn](logits, teacher_logits, MASK, temperature=0.7),
            JITTED[fn](logits / np.float32(0.7), teacher_logits / np.float32(0.7), MASK),
            rtol=1e-5,
            atol=1e-6,
        )


def test_a_teacher_that_is_the_student_teaches_nothing():
    """Self-distillation with nothing more to read: the loss and its gradient are 0, though both are the same array."""
    logits, _ = batch(4)
    for fn in BETA:
        value, slopes = jax.jit(jax.value_and_grad(lambda z, fn=fn: fn(z, z, MASK).sum()))(logits)
        np.testing.assert_allclose(value, 0, atol=1e-5)
        np.testing.assert_allclose(slopes, 0, atol=1e-6)


# ---- on a part of the vocabulary

REDUCED = {top_k_renormalised: renormalised, top_k_with_tail: with_tail}
every_reduced = pytest.mark.parametrize("fn", REDUCED, ids=lambda fn: fn.__name__)
TRACED = {
    (fn, support): jax.jit(functools.partial(fn, support=support, divergence=generalized_jsd))
    for fn in REDUCED
    for support in SUPPORTS
}


@pytest.mark.parametrize("support", SUPPORTS, ids=lambda fn: fn.__name__)
@every_reduced
@given(seed=st.integers(0, 1000), k=st.integers(1, V - 1), temperature=st.sampled_from([0.5, 2.0]))
def test_a_part_of_the_vocabulary_is_the_equation_for_a_traced_k(fn, support, seed, k, temperature):
    logits, teacher_logits = batch(seed)
    got = TRACED[fn, support](logits, teacher_logits, MASK, k=k, temperature=temperature)
    expected = by_the_equation(logits, teacher_logits, 0.5, temperature, REDUCED[fn], support, k)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize("loss", [forward_kl, reverse_kl], ids=lambda fn: fn.__name__)
@every_reduced
def test_any_divergence_goes_on_a_part_and_its_gradient_is_that_of_the_equation(fn, loss, slope):
    logits, teacher_logits = batch(5)
    value = lambda z: fn(z, teacher_logits, MASK, k=3, divergence=loss, temperature=1.5)
    oracle = lambda z: by_the_equation(z, teacher_logits, BETA[loss], 1.5, REDUCED[fn], teachers_top, 3)
    np.testing.assert_allclose(value(logits), oracle(logits), rtol=1e-5, atol=1e-6)
    got = jax.jit(jax.grad(lambda z: jnp.sum(W * value(z))))(logits)
    np.testing.assert_allclose(got, slope(lambda z: np.sum(W * oracle(z)), logits), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("k", [V, V + 3, 100.0])
@every_reduced
def test_all_of_the_vocabulary_is_the_whole_of_it(fn, k):
    """Nothing is left for the tail: its logit is -inf, and has no part in value or gradient."""
    logits, teacher_logits = batch(6)
    got = jax.jit(jax.value_and_grad(lambda z: jnp.sum(W * fn(z, teacher_logits, MASK, k=k))))(logits)
    expected = jax.jit(jax.value_and_grad(lambda z: jnp.sum(W * forward_kl(z, teacher_logits, MASK))))(logits)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-4, atol=1e-6)


def test_one_token_renormalised_teaches_nothing_and_with_a_tail_it_does():
    logits, teacher_logits = batch(7)
    np.testing.assert_allclose(top_k_renormalised(logits, teacher_logits, MASK, k=1), 0, atol=1e-6)
    loss = np.asarray(top_k_with_tail(logits, teacher_logits, MASK, k=1))
    assert (loss[:, 1:][MASK[:, 1:]] > 1e-3).all()


@given(seed=st.integers(0, 1000))
def test_the_more_tokens_are_kept_beside_the_tail_the_nearer_it_is_to_the_whole(seed):
    logits, teacher_logits = batch(seed)
    fn = TRACED[top_k_with_tail, teachers_top]
    losses = [np.asarray(fn(logits, teacher_logits, MASK, k=k, temperature=1.0)) for k in range(1, V + 1)]
    for fewer, more in itertools.pairwise(losses):
        assert (fewer <= more + 1e-5).all()
    np.testing.assert_allclose(losses[-1], JITTED[generalized_jsd](logits, teacher_logits, MASK), rtol=1e-4, atol=1e-5)


def test_a_tail_of_a_billionth_keeps_its_digits():
    """1 - (the sum of the others) would be 0, or noise of 6e-8, in float32."""
    student = np.array([[[0.0, -18.0, -19.0], [0, 0, 0]]], np.float32)
    teacher = np.array([[[0.0, -22.0, -21.0], [0, 0, 0]]], np.float32)
    total = lambda z: top_k_with_tail(z, teacher, MASK[:1, :2], k=1, divergence=reverse_kl).sum()
    got = jax.jit(jax.grad(total))(student)
    s, t = softmax(student[0, 0]), softmax(teacher[0, 0])
    tail, gap = s[1:].sum(), np.log(s[1:].sum() / t[1:].sum())
    np.testing.assert_allclose(got[0, 0, 1:], s[1:] * (gap - tail * gap - s[0] * np.log(s[0] / t[0])), rtol=1e-4)


def test_equals_come_in_the_order_of_the_vocabulary_and_no_token_twice():
    """A union of two lists that held a token twice would give it twice the probability."""
    equal = np.zeros(V, np.float32)
    for k in (3, np.float32(3)):
        np.testing.assert_array_equal(teachers_top(equal, equal, k), np.arange(V) < 3)
    same = np.array([[[3.0, 2.0, 1.0, 0.0]] * 2], np.float32)
    other = same * np.float32(0.5)
    mask = np.array([[False, True]])
    np.testing.assert_array_equal(eithers_top(same, other, 2), teachers_top(same, other, 2))
    for fn in REDUCED:
        np.testing.assert_array_equal(
            fn(same, other, mask, k=2, support=eithers_top), fn(same, other, mask, k=2, support=students_top)
        )


@pytest.mark.parametrize("support", SUPPORTS, ids=lambda fn: fn.__name__)
def test_a_whole_number_chooses_as_a_traced_one(support):
    logits, teacher_logits = (np.nan_to_num(x) for x in batch(8))
    for k in (1, 3, V):
        np.testing.assert_array_equal(
            support(logits, teacher_logits, k), support(logits, teacher_logits, jnp.float32(k))
        )


@every_reduced
def test_forbidden_tokens_and_duplicates_leave_the_gradient_finite(fn):
    logits, teacher_logits = (np.nan_to_num(x) for x in batch(9))
    logits[..., :3], teacher_logits[..., :3] = -np.inf, -np.inf  # fewer are left than are asked for
    teacher_logits[..., 3:5] = 1.0
    for loss in (reverse_kl, generalized_jsd):
        for support in (teachers_top, eithers_top):
            total = lambda z, loss=loss, support=support: jnp.sum(
                fn(z, teacher_logits, MASK, k=5, divergence=loss, support=support)
            )
            value, slopes = jax.jit(jax.value_and_grad(total))(logits)
            assert np.isfinite(value) and np.isfinite(slopes).all()


# ---- without the logits


def hidden_batch(seed):
    rng = np.random.default_rng(seed)
    shapes = {"hidden": (B, T, D), "unembed": (V, D), "teacher_hidden": (B, T, E), "teacher_unembed": (V, E)}
    out = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name in ("hidden", "teacher_hidden"):
        out[name] = np.where(ROWS[..., None], out[name], np.float32(np.nan))
    return list(out.values())


def through_the_logits(hidden, unembed, teacher_hidden, teacher_unembed, divergence):
    exists = ROWS[..., None]
    logits = jnp.einsum("btd,vd->btv", jnp.where(exists, hidden, 0), unembed)
    teacher = jnp.einsum("btd,vd->btv", jnp.where(exists, teacher_hidden, 0), teacher_unembed)
    return divergence(logits, teacher, MASK)


@pytest.mark.parametrize(
    ("divergence", "chunk"),
    [
        *((reverse_kl, chunk) for chunk in (1, 3, 50)),
        (functools.partial(generalized_jsd, beta=0.1, temperature=2.0), 2),
        (functools.partial(top_k_with_tail, k=2), 2),
    ],
    ids=["reverse_kl by 1", "reverse_kl by 3", "reverse_kl at once", "generalized_jsd", "top_k_with_tail"],
)
def test_from_hidden_states_it_is_the_loss_from_logits_in_value_and_gradient(divergence, chunk):
    arrays = hidden_batch(0)
    plain = lambda *x: jnp.sum(W * through_the_logits(*x, divergence))
    chunked = lambda *x: jnp.sum(W * from_hidden(*x, MASK, divergence=divergence, chunk=chunk))
    expected = jax.jit(jax.value_and_grad(plain, (0, 1)))(*arrays)
    got = jax.jit(jax.value_and_grad(chunked, (0, 1, 2, 3)))(*arrays)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    for a, b in zip(got[1], expected[1]):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    for teacher in got[1][2:]:
        np.testing.assert_array_equal(teacher, 0)


def test_hidden_states_that_predict_nothing_scored_do_not_exist():
    """The law of masked slots, for the unembedding as well: its gradient is a sum over all hidden states."""
    arrays = hidden_batch(1)
    value = lambda *x: jnp.sum(from_hidden(*x, MASK, chunk=2))
    poisoned = jax.jit(jax.value_and_grad(value, (0, 1)))
    expected = poisoned(*(np.nan_to_num(x) for x in arrays))
    for rubbish in (np.nan, np.inf, 1e9):
        got = poisoned(*(np.where(np.isnan(x), np.float32(rubbish), x) for x in arrays))
        jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert (np.asarray(from_hidden(*arrays, MASK))[~MASK] == 0).all()


def test_a_soft_cap_and_a_scale_come_between_product_and_logits():
    arrays = [np.nan_to_num(x) for x in hidden_batch(2)]
    cap = lambda z: 2 * jnp.tanh(z / 2)
    got = jax.jit(lambda *x: from_hidden(*x, MASK, head=cap, teacher_head=lambda z: 3 * z, chunk=2))(*arrays)
    logits, teacher_logits = (np.einsum("btd,vd->btv", *pair) for pair in (arrays[:2], arrays[2:]))
    np.testing.assert_allclose(got, forward_kl(cap(logits), 3 * teacher_logits, MASK), rtol=1e-4, atol=1e-6)


def test_products_in_bfloat16_have_their_gradient_summed_in_float32():
    arrays = [jnp.asarray(np.nan_to_num(x), jnp.bfloat16) for x in hidden_batch(3)]
    arrays[1] = arrays[1].astype(jnp.float32)  # a master weight
    total = lambda unembed: from_hidden(arrays[0], unembed, *arrays[2:], MASK, chunk=1).sum()
    value, slopes = jax.jit(jax.value_and_grad(total))(arrays[1])
    assert value.dtype == jnp.float32 and slopes.dtype == jnp.float32


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "backward"])
def test_the_logits_of_the_batch_are_never_there(gradient):
    rows, columns, width, vocabulary, chunk = 2, 128, 16, 4096, 8
    shapes = [(rows, columns, width), (vocabulary, width)] * 2
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    mask = jax.ShapeDtypeStruct((rows, columns), bool)
    project = lambda h, w: jnp.einsum("btd,vd->btv", h, w)
    plain = lambda h, w, th, tw, mask: forward_kl(project(h, w), project(th, tw), mask).sum()
    chunked = lambda *x: from_hidden(*x, chunk=chunk).sum()
    if gradient:
        plain, chunked = jax.grad(plain, (0, 1)), jax.grad(chunked, (0, 1))
    bytes_of = lambda fn: jax.jit(fn).lower(*arrays, mask).compile().memory_analysis().temp_size_in_bytes
    assert bytes_of(chunked) < rows * columns * vocabulary * 4 < bytes_of(plain)
    assert bytes_of(chunked) < 0.3 * bytes_of(plain)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (0, np.zeros((B, T, D + 1), np.float32), r"unembed has shape \(7, 4\), expected \[V, D\] with D=5"),
        (3, np.zeros((V + 1, E), np.float32), r"teacher_unembed has shape \(8, 6\), expected \[V, E\] with V=7"),
        (0, np.zeros((B, T, D), np.int32), "hidden must be of a float type, got int32"),
    ],
)
def test_hidden_states_that_do_not_fit_are_refused(name, value, message):
    arrays = hidden_batch(0)
    arrays[name] = value
    with pytest.raises(ValueError, match=message):
        from_hidden(*arrays, MASK)


@pytest.mark.parametrize("fn", [*BETA, *REDUCED], ids=lambda fn: fn.__name__)
def test_what_cannot_be_is_refused_by_name(fn):
    logits, teacher_logits = batch(0)
    with pytest.raises(ValueError, match=r"temperature must be above 0, got 0.0"):
        fn(logits, teacher_logits, MASK, temperature=0.0)
    with pytest.raises(ValueError, match=r"teacher_logits has shape \(3, 5, 6\), expected \[B, T, V\] with V=7"):
        fn(logits, teacher_logits[..., :-1], MASK)


def test_a_teacher_in_the_place_of_the_reference_is_the_same_divergence():
    """One home for the arithmetic: what differs is who has a gradient, and the temperature."""
    logits, teacher_logits = batch(10)
    np.testing.assert_array_equal(
        distillation.reverse_kl(logits, teacher_logits, MASK), divergences.kl_to_reference(logits, teacher_logits, MASK)
    )
    np.testing.assert_array_equal(
        distillation.forward_kl(logits, teacher_logits, MASK),
        divergences.kl_from_reference(logits, teacher_logits, MASK),
    )
