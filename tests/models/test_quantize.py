"""Weights in 8 and 4 bits against loops in plain numpy, and what rounding may cost at most."""

import functools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import jit

from pt_jax.models import linear, quantize
from pt_jax.models.parameters import PRODUCTS
from pt_jax.models.quantize import int8, nf4, nf4_double

HOWS = {"int8": int8, "nf4": nf4, "nf4_double": nf4_double}
ALL = pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
BOTH_NF4 = pytest.mark.parametrize("how", [nf4, nf4_double], ids=["nf4", "nf4_double"])
# every order of inputs, outputs and groups; axes shorter than a block, of one block, of one and a bit, odd
SHAPES = {
    "nd,df->nf": [(10, 3), (65, 300), (130, 257)],
    "btd,dhc->bthc": [(65, 3, 10)],
    "bthc,hcd->btd": [(3, 10, 26), (2, 128, 9)],
    "btd,vd->btv": [(300, 26), (7, 64), (5, 129)],
    "nd,edf->nf": [(3, 26, 12)],
}
CASES = pytest.mark.parametrize(
    ("equation", "shape"), [(e, shape) for e, shapes in SHAPES.items() for shape in shapes], ids=str
)
quantized = jit(lambda w, how, equation: how(w, equation), static_argnums=(1, 2))
dense = jit(lambda w: w.dense(jnp.float32))


def normal(shape, seed=0):
    """Every column has a size of its own, and a few weights stand out."""
    rng = np.random.default_rng(seed)
    w = rng.standard_t(4, size=shape) * np.exp(0.5 * rng.normal(size=shape[-1:]))
    return w.astype(np.float32)


def sides(equation):
    """Input axes and output axes, counted from the end."""
    weight, inputs, outputs, _ = linear.sides(equation)
    return [[weight.index(n) - len(weight) for n in letters] for letters in (inputs, outputs)]


def blocks(w, axis):
    """Every run of 64 along an axis: where it is, and its numbers."""
    moved = np.moveaxis(w, axis, -1)
    for at in np.ndindex(moved.shape[:-1]):
        for i in range(0, moved.shape[-1], 64):
            yield (*at, i // 64), moved[at][i : i + 64]


def absmax_of(w):
    return np.asarray(linear.dense(w.absmax))


# ---- the numbers that are kept


def test_the_code_is_quantiles_of_the_normal_distribution():
    """QLoRA, appendix E: halves of the probability left over at either end, averaged over both sides."""
    top = 0.9677083  # as their code rounds 1 - (1 / 30 + 1 / 32) / 2
    quantiles = lambda n: [statistics.NormalDist().inv_cdf(p) for p in np.linspace(top, 0.5, n)[:-1]]
    code = sorted([*quantiles(9), 0.0, *(-x for x in quantiles(8))])
    np.testing.assert_allclose(quantize.CODE, np.array(code) / max(code), rtol=0, atol=2**-23)
    assert len(quantize.CODE) == 16 and quantize.CODE[quantize.ZERO] == 0


@CASES
def test_nf4_keeps_what_a_loop_over_blocks_keeps(equation, shape):
    w, axis = normal(shape), sides(equation)[0][-1]
    got = quantized(w, nf4, equation)
    n = shape[axis]
    size = lambda by: tuple(-(-n // by) if i - len(shape) == axis else m for i, m in enumerate(shape))
    assert got.packed.shape == size(2) and got.packed.dtype == np.uint8
    assert got.absmax.shape == size(64) and got.absmax.dtype == np.float32
    packed, absmax = (np.moveaxis(np.asarray(x), axis, -1) for x in (got.packed, got.absmax))
    for at, block in blocks(w, axis):
        top = max(abs(x) for x in block)
        assert absmax[at] == top
        places = [min(range(16), key=lambda k, x=x: abs(float(quantize.CODE[k]) - x / top)) for x in block]
        places += [quantize.ZERO] * (len(places) % 2)
        expected = [high * 16 + low for high, low in zip(places[::2], places[1::2])]
        first = at[-1] * 32
        assert packed[at[:-1]][first : first + 32].tolist() == expected


@CASES
def test_int8_keeps_what_a_loop_over_outputs_keeps(equation, shape):
    w, (inputs, outputs) = normal(shape), sides(equation)
    got = quantized(w, int8, equation)
    assert got.values.shape == shape and got.values.dtype == np.int8
    assert got.scale.shape == tuple(1 if i - len(shape) in inputs else n for i, n in enumerate(shape))
    kept = [i for i in range(-len(shape), 0) if i not in inputs]
    assert set(outputs) <= set(kept)
    order = [i + len(shape) for i in (*kept, *inputs)]
    rows, values, scales = (
        np.transpose(np.asarray(x, np.float64), order).reshape(math.prod(shape[i] for i in kept), -1)
        for x in (w, got.values, got.scale)
    )
    for row, value, scale in zip(rows, values, scales[:, 0]):
        assert scale == pytest.approx(abs(row).max() / 127, rel=2**-16)
        assert 127 * scale == np.float32(127 * scale)  # exact: no order of the products makes a difference
        apart = abs(row / scale % 1 - 0.5) > 1e-4  # of what float32 cannot tell apart, either is right
        np.testing.assert_array_equal(value[apart], np.round(row / scale)[apart])


@CASES
def test_double_keeps_scales_rounded_down_to_steps_of_the_largest_of_256(equation, shape):
    w, axis = normal(shape), sides(equation)[1][-1]
    single, double = quantized(w, nf4, equation), quantized(w, nf4_double, equation)
    exact, got = (np.moveaxis(np.asarray(x), axis, -1) for x in (single.absmax, linear.dense(double.absmax)))
    values, step = (np.moveaxis(np.asarray(x), axis, -1) for x in (double.absmax.values, double.absmax.step))
    assert values.dtype == np.uint8 and values.shape == exact.shape
    assert step.shape == (*exact.shape[:-1], -(-shape[axis] // 256))
    for i in range(step.shape[-1]):
        group = slice(256 * i, 256 * (i + 1))
        largest = exact[..., group].max(-1, keepdims=True)
        np.testing.assert_allclose(step[..., i : i + 1], largest / 255, rtol=2**-16)
        steps = exact[..., group].astype(np.float64) / step[..., i : i + 1]
        apart = abs(steps - np.round(steps)) > 0.01
        np.testing.assert_array_equal(values[..., group][apart], np.maximum(np.floor(steps), 1)[apart])
        np.testing.assert_array_equal(got[..., group], values[..., group] * step[..., i : i + 1])
        assert (values[..., group].max(-1) == 255).all()


def test_double_loses_no_block_beside_one_that_is_a_thousand_times_larger():
    w = np.ones((64, 9), np.float32)
    w[:, 4] = 1e3
    single, double = (np.asarray(dense(quantized(w, how, "nd,df->nf"))) for how in (nf4, nf4_double))
    np.testing.assert_array_equal(single, w)
    assert double[:, 4] == pytest.approx(np.full(64, 1e3), rel=1e-4) and (double > 0).all()


@BOTH_NF4
@CASES
def test_no_other_place_in_the_code_is_nearer(how, equation, shape):
    w, axis = normal(shape, 1), sides(equation)[0][-1]
    got = quantized(w, how, equation)
    scale = np.repeat(absmax_of(got), 64, axis)
    scale = np.take(scale, range(shape[axis]), axis)
    nearest = np.min([abs(w - scale * c) for c in quantize.CODE], 0)
    np.testing.assert_allclose(abs(w - np.asarray(dense(got))), nearest, rtol=0, atol=2e-7 * abs(w).max())


# ---- what is lost


@CASES
def test_no_weight_is_further_off_than_half_a_step(equation, shape):
    w, (inputs, _) = normal(shape), sides(equation)
    error = lambda how: abs(w - np.asarray(dense(quantized(w, how, equation)), np.float64))
    top = abs(w).max(tuple(inputs), keepdims=True)
    assert (error(int8) <= top / 254 * (1 + 1e-4)).all()
    gap = np.diff(quantize.CODE.astype(np.float64)).max() / 2
    assert gap <= 0.152  # as the docstring says
    for _, (e, x) in paired(blocks(error(nf4), inputs[-1]), blocks(w, inputs[-1])):
        assert (e <= gap * abs(x).max() * (1 + 1e-6)).all()


def paired(one, other):
    for (at, x), (again, y) in zip(one, other):
        assert at == again
        yield at, (x, y)


@pytest.mark.parametrize(("how", "expected"), [(int8, 0.00789), (nf4, 0.0919), (nf4_double, 0.0918)])
def test_the_relative_error_of_normal_weights_is_that_of_the_format(how, expected):
    """The same figures in a simulation in plain numpy; int8 pays for one scale to 1024 weights."""
    w = np.random.default_rng(0).normal(size=(1024, 512)).astype(np.float32)
    got = np.asarray(dense(quantized(w, how, "nd,df->nf")))
    assert np.sqrt(np.mean((got - w) ** 2) / np.mean(w**2)) == pytest.approx(expected, rel=0.005)


@ALL
@CASES
def test_quantising_again_changes_nothing(how, equation, shape):
    once = quantized(normal(shape), how, equation)
    again = quantized(dense(once), how, equation)
    assert jax.tree.structure(once) == jax.tree.structure(again)
    jax.tree.map(np.testing.assert_array_equal, once, again)


@ALL
def test_a_block_of_zeros_stays_one_and_is_no_nan(how):
    w = normal((130, 5))
    w[:, 1], w[64:128, 2] = 0, 0
    got = np.asarray(dense(quantized(w, how, "nd,df->nf")))
    assert np.isfinite(got).all() and (got[:, 1] == 0).all() and (got[64:128, 2] == 0).all()
    assert (got[:64, 2] != 0).any()
    assert (np.asarray(dense(quantized(np.zeros_like(w), how, "nd,df->nf"))) == 0).all()


@ALL
@pytest.mark.parametrize("size", [1e38, 1e-30])
def test_very_large_and_very_small_weights_are_as_exact_as_others(how, size):
    """A product with 127 before a division would leave the range."""
    w = np.clip(normal((130, 5)) / 10, -1, 1)
    share = lambda w: np.asarray(dense(quantized(w, how, "nd,df->nf")), np.float64)
    np.testing.assert_allclose(share(w * np.float32(size)) / size, share(w), rtol=1e-3, atol=5e-3)


@ALL
def test_what_is_too_small_to_divide_by_becomes_0(how):
    w = normal((64, 3))
    w[:, 1] = np.float32(1e-40)
    got = np.asarray(dense(quantized(w, how, "nd,df->nf")))
    assert np.isfinite(got).all() and (got[:, 1] == 0).all() and (got[:, 0] != 0).any()


@ALL
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_sixteen_bit_weights_are_quantised_in_float32(how, dtype):
    w = jnp.asarray(normal((65, 7)) / 8, dtype)
    jax.tree.map(
        np.testing.assert_array_equal,
        quantized(w, how, "nd,df->nf"),
        quantized(w.astype(jnp.float32), how, "nd,df->nf"),
    )


@pytest.mark.parametrize(("how", "bits"), [(int8, 8 + 32 / 512), (nf4, 4.5), (nf4_double, 4 + 8 / 64 + 32 / 64 / 256)])
def test_bits_a_weight(how, bits):
    for equation, shape in (("nd,df->nf", (512, 768)), ("bthc,hcd->btd", (4, 128, 256)), ("btd,vd->btv", (256, 512))):
        held = jax.eval_shape(lambda w, e=equation: how(w, e), jax.ShapeDtypeStruct(shape, jnp.float32))
        total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(held))
        assert 8 * total / math.prod(shape) == pytest.approx(bits, rel=0.01)


# ---- products

SIZES = dict(b=2, t=3, n=11, d=66, h=3, k=2, c=10, f=13, v=300, e=4)
DENSE = {n: e for n, e in PRODUCTS.items() if not linear.sides(e).groups}
GROUPED = {n: e for n, e in PRODUCTS.items() if linear.sides(e).groups}


def product(equation, seed=2):
    """x and a weight of a product."""
    x, weight = (tuple(SIZES[n] for n in term) for term in equation.split("->")[0].split(","))
    return np.random.default_rng(seed).normal(size=x).astype(np.float32), normal(weight, seed)


def near(got, expected, share=1e-5):
    expected = np.asarray(expected, np.float64)
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=0, atol=share * abs(expected).max())


def with_gradient(fn, x, *more):
    """The value of fn, and its gradient by x of a sum that weighs every number differently."""
    y, pull = jax.vjp(lambda x: fn(x, *more), x)
    return y, pull(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).astype(y.dtype))[0]


@ALL
@pytest.mark.parametrize("equation", sorted(set(DENSE.values())))
def test_a_product_and_its_gradient_are_those_of_the_dense_weight(how, equation):
    x, w = product(equation)
    held = quantized(w, how, equation)
    both = jit(functools.partial(with_gradient, lambda x, w: linear.einsum(equation, x, w)))
    for got, expected in zip(both(x, held), both(x, dense(held))):
        assert got.dtype == np.float32
        near(got, expected)


@ALL
@pytest.mark.parametrize("equation", sorted(set(GROUPED.values())))
@pytest.mark.parametrize("sizes", [(3, 0, 7, 1), (0, 0, 11, 0)], ids=str)
def test_a_product_of_groups_is_that_of_the_dense_weight(how, equation, sizes):
    x, w = product(equation)
    held, sizes = quantized(w, how, equation), jnp.array(sizes, jnp.int32)
    both = jit(functools.partial(with_gradient, linear.grouped))
    for got, expected in zip(both(x, held, sizes), both(x, dense(held), sizes)):
        near(got, expected)


@ALL
def test_an_embedding_is_looked_up_without_the_others(how):
    w, rows = normal((600, 65)), np.array([[0, 599, 256], [255, 3, 3]])
    held = quantized(w, how, "btd,vd->btv")
    got = jit(linear.take)(held, rows)
    np.testing.assert_array_equal(got, np.asarray(dense(held))[rows])


@ALL
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_a_product_is_of_the_type_of_x_and_close(how, dtype):
    """4096 times 127 is beyond float16, the sum times its scale is not."""
    x = np.random.default_rng(0).uniform(0.5, 1, (5, 4096)).astype(np.float32)
    w = np.random.default_rng(1).uniform(0.005, 0.01, (4096, 3)).astype(np.float32)
    held = quantized(w, how, "nd,df->nf")
    both = jit(functools.partial(with_gradient, lambda x, w: linear.einsum("nd,df->nf", x, w)))
    for got, expected in zip(both(jnp.asarray(x, dtype), held), both(x, dense(held))):
        assert got.dtype == dtype
        near(got, expected, 0.02)


@ALL
def test_a_stack_is_scanned_sliced_and_mapped(how):
    w, x = normal((3, 65, 4)), normal((5, 65), 3)
    held = quantize.quantize({"layers": {"up": w}}, how)["layers"]["up"]
    full = np.asarray(dense(held))
    one = lambda w: linear.einsum("nd,df->nf", x, w)
    expected = np.stack([one(layer) for layer in full])
    near(jax.lax.scan(lambda _, w: (None, one(w)), None, held)[1], expected)
    near(jax.vmap(one)(held), expected)
    for i in range(3):
        layer = jax.tree.map(lambda x, i=i: x[i], held)
        np.testing.assert_array_equal(layer.dense(jnp.float32), full[i])
        jax.tree.map(np.testing.assert_array_equal, layer, quantized(w[i], how, "nd,df->nf"))


# ---- trees


def tree(dtype=np.float32):
    layers = {
        "wq": normal((2, 26, 3, 4)), "wo": normal((2, 3, 4, 26)), "up": normal((2, 26, 9)),
        "wq_bias": normal((2, 3, 4)), "attn_norm": normal((2, 26)), "router": normal((2, 26, 5)),
        "expert_up": normal((2, 5, 26, 9)),
    }  # fmt: skip
    params = {"embed": normal((30, 26)), "norm": normal((26,)), "unembed": normal((30, 26)), "layers": layers}
    return jax.tree.map(lambda x: x.astype(dtype), params)


@ALL
def test_the_products_of_the_layers_are_quantised_and_nothing_else(how):
    params = tree()
    got = quantize.quantize(params, how)
    changed = {"wq", "wo", "up", "expert_up"}
    for name, w in got["layers"].items():
        assert isinstance(w, linear.Weight) == (name in changed), name
        assert name in changed or w is params["layers"][name]
    for name in ("embed", "norm", "unembed"):
        assert got[name] is params[name]
    whole = quantize.quantize(params, how, ("embed", "wq"))
    kinds = {name for name, w in (whole | whole["layers"]).items() if isinstance(w, linear.Weight)}
    assert kinds == {"embed", "wq"}


@ALL
def test_dequantised_is_a_tree_of_arrays_of_the_asked_type(how):
    params = tree(jnp.bfloat16)
    small = quantize.quantize(params, how)
    for dtype in (jnp.float32, jnp.bfloat16):
        back = quantize.dequantize(small, dtype)
        assert jax.tree.map(jnp.shape, back) == jax.tree.map(jnp.shape, params)
        assert back["layers"]["wq"].dtype == dtype and back["norm"] is params["norm"]
        near(back["layers"]["wo"], small["layers"]["wo"].dense(jnp.float32), 1e-2)
    assert quantize.dequantize(params)["layers"]["up"] is params["layers"]["up"]


def test_shapes_can_be_asked_for_without_numbers():
    shapes = jax.eval_shape(functools.partial(quantize.quantize, how=nf4_double), tree())
    assert shapes["layers"]["up"].packed.shape == (2, 13, 9)
    assert shapes["layers"]["up"].absmax.step.shape == (2, 1, 1)


def nan(params):
    """One is enough."""
    up = params["layers"]["up"].copy()
    up[1, 20, 3] = np.nan
    return params | {"layers": params["layers"] | {"up": up}}


@pytest.mark.parametrize(
    ("change", "targets", "message"),
    [
        (lambda p: quantize.quantize(p, int8), None, r"^params.layers.expert_up is quantised already \(Int8\)"),
        (lambda p: p, ("wz",), r"^targets names 'wz', which is not quantised; known are wq, .*, embed, unembed$"),
        (lambda p: p, ("router",), r"^targets names 'router', which is not quantised"),
        (lambda p: p, ("wq_bias",), r"^targets names 'wq_bias', which is not quantised"),
        (lambda p: p, ("gate",), r"^targets names 'gate', which these parameters do not have$"),
        (nan, None, r"^params.layers.up holds numbers that are not finite"),
        (lambda p: jax.tree.map(lambda x: x.astype(int), p), None, r"^params.layers.expert_up must be of a float type"),
    ],
    ids=["twice", "unknown", "router", "bias", "missing", "nan", "whole numbers"],
)  # fmt: skip
@BOTH_NF4
def test_what_cannot_be_quantised_is_named(how, change, targets, message):
    with pytest.raises(ValueError, match=message):
        quantize.quantize(change(tree()), how, targets)
