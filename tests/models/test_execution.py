"""How a model is computed changes memory, time and rounding, and never what is computed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from small_models import equations

from pt_jax.models import Config, Execution, apply, bind, init

QWEN = Config(
    vocab=29, layers=8, width=24, heads=6, kv_heads=2, head_width=4, hidden=40, eps=1e-2, windows=(5, 0) * 4,
)  # fmt: skip
MIXED = dataclasses.replace(QWEN, experts=4, expert_hidden=6, shared_hidden=5)
B, T = 3, 32
TOKENS = np.random.default_rng(2).integers(0, 29, (B, T)).astype(np.int32)
SEEN = np.arange(T) >= np.array([[0], [17], [31]])
REMATS = ("none", "dots", "layer")  # from the most memory to the least
weights = functools.partial(small_models.weights, scale=0.3)


def loss(config, how, params):
    logits = apply(config, params, TOKENS, SEEN, how=how)[0].astype(jnp.float32)
    return jnp.where(SEEN[..., None], jnp.sin(logits), 0).sum(), logits


@functools.cache
def compiled(config, how):
    """Not with fewer optimisations, as elsewhere: they decide how much memory a program takes."""
    step = jax.jit(jax.value_and_grad(functools.partial(loss, config, how), has_aux=True))
    return step.lower(weights(config)).compile()


# ---- rematerialisation


@pytest.mark.parametrize(("config", "remat"), [(QWEN, "dots"), (QWEN, "layer"), (MIXED, "layer")])
def test_what_is_computed_again_is_what_it_was(config, remat):
    (value, logits), gradient = compiled(config, Execution())(weights(config))
    (again, same), slope = compiled(config, Execution(remat=remat))(weights(config))
    # Not to the last bit: without residuals to return, XLA fuses the exponentials of tiles in another way, and logits
    # differ by 7e-7 of the largest (0 with plain attention). The gradient, of cos(logits), by 5e-6.
    np.testing.assert_allclose(same, logits, rtol=0, atol=1e-6 * np.abs(logits).max())
    np.testing.assert_allclose(again, value, rtol=0, atol=1e-6 * np.abs(np.sin(logits[SEEN])).sum())
    for a, b in zip(jax.tree.leaves(slope), jax.tree.leaves(gradient)):
        assert np.abs(b).max() > 1e-3
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_less_is_kept_from_policy_to_policy():
    memory = lambda config, remat: compiled(config, Execution(remat=remat)).memory_analysis().temp_size_in_bytes
    none, dots, layer = (memory(QWEN, remat) for remat in REMATS)
    assert layer < 0.8 * dots and dots < 0.8 * none, (none, dots, layer)
    assert memory(MIXED, "layer") < 0.5 * memory(MIXED, "none")


def program(config, how, params=None):
    """Forwards and backwards, traced only."""
    params = jax.eval_shape(lambda: init(config, jax.random.key(0))) if params is None else params
    return [*equations(jax.make_jaxpr(jax.grad(functools.partial(loss, config, how), has_aux=True))(params).jaxpr)]


@pytest.mark.parametrize("how", [*(Execution(remat=r) for r in REMATS), Execution(dtype="bfloat16")], ids=str)
def test_the_program_does_not_grow_with_depth(how):
    deep, shallow = (len(program(dataclasses.replace(QWEN, layers=n, windows=(5, 0) * (n // 2)), how)) for n in (8, 2))
    assert deep == shallow > 100


# ---- the type that is computed in


TWO, TWO_MIXED = (dataclasses.replace(config, layers=2, windows=(5, 0)) for config in (QWEN, MIXED))


@functools.cache
def graded(config, how):
    quick = {"xla_backend_optimization_level": 0}
    return jax.jit(jax.grad(functools.partial(loss, config, how), has_aux=True), compiler_options=quick)(
        weights(config)
    )


@pytest.mark.parametrize(
    ("config", "dtype", "worst", "usual"),
    [(TWO, "bfloat16", 0.05, 0.01), (TWO, "float16", 0.005, 0.001), (TWO_MIXED, "bfloat16", 0.05, 0.01)],
    ids=["bfloat16", "float16", "experts"],
)
def test_float32_parameters_may_be_computed_with_in_16_bits(config, dtype, worst, usual):
    """The logits are of that type, and close; the gradient is float32, as the parameters are, and of one direction."""
    (slope, exact), (coarse, got) = (graded(config, how) for how in (Execution(), Execution(dtype=dtype)))
    logits = jax.eval_shape(lambda p: apply(config, p, TOKENS, SEEN, how=Execution(dtype=dtype))[0], weights(config))
    assert logits.dtype == dtype
    error = np.abs(np.asarray(got) - exact)[SEEN] / np.abs(exact).max()
    assert 0 < error.max() < worst and error.mean() < usual, (error.max(), error.mean())
    for a, b in zip(jax.tree.leaves(coarse), jax.tree.leaves(slope)):
        assert a.dtype == jnp.float32
        assert (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()) > 0.98


@pytest.mark.parametrize("config", [QWEN, MIXED], ids=["qwen", "experts"])
def test_norms_positions_softmax_and_routers_are_float32_whatever_is_computed_in(config):
    delicate = {"rsqrt", "exp", "cos", "sin", "square", "integer_pow", "top_k"}
    expected = {"rsqrt", "exp", "cos", "sin"} | ({"top_k"} if config is MIXED else set())
    found = [e for e in program(config, Execution(dtype="bfloat16")) if e.primitive.name in delicate]
    assert expected <= {e.primitive.name for e in found}
    for e in found:
        assert {v.aval.dtype for v in e.invars if hasattr(v, "aval")} == {np.dtype(np.float32)}, e


def test_products_with_weights_are_in_the_type_that_is_computed_in():
    dots = [e for e in program(QWEN, Execution(dtype="bfloat16")) if e.primitive.name == "dot_general"]
    coarse = [e for e in dots if {v.aval.dtype for v in e.invars} == {np.dtype(jnp.bfloat16)}]
    assert len(coarse) >= 8 * 3  # seven weights and the unembedding, forwards and twice backwards


# ---- the record


@pytest.mark.parametrize(
    ("field", "known"),
    [
        ("attention", r"'auto', 'plain', 'tiles', 'cudnn', 'splash'"),
        ("remat", r"'none', 'layer', 'dots'"),
        ("dtype", r"None, 'float32', 'bfloat16', 'float16'"),
    ],
)
def test_what_is_not_known_is_refused_with_what_is(field, known):
    with pytest.raises(ValueError, match=rf"^{field} is 'int8'; known are {known}$"):
        Execution(**{field: "int8"})


def test_equal_records_are_one_object_to_jit():
    assert bind(QWEN, Execution(remat="layer")) is bind(dataclasses.replace(QWEN), Execution(remat="layer"))
    assert bind(QWEN, Execution(remat="layer")) is not bind(QWEN)
