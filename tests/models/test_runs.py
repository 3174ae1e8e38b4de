"""Layers whose weights are arrays of their own compute what stacked ones compute."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import jit

from pt_jax import sampling
from pt_jax.models import Config, Execution, apply, bind, by_layer, init, lora, quantize

DENSE = Config(vocab=29, layers=3, width=16, heads=4, kv_heads=2, head_width=8, hidden=18, tied=False)
CONFIGS = {
    "dense": DENSE,
    "windows and ropes": dataclasses.replace(DENSE, layers=5, windows=(3, 0, 3, 0, 5), local_rope_base=30.0),
    "experts in some": dataclasses.replace(
        DENSE, experts=4, expert_hidden=6, expert_layers=(True, False, True), windows=(0, 4, 4)
    ),
    "a scale a layer": dataclasses.replace(DENSE, scale_by_layer=True),
}
SEEN = np.arange(9) >= np.array([[0], [4], [9]])
TOKENS = np.random.default_rng(0).integers(0, 29, SEEN.shape).astype(np.int32)


def weights(config):
    return jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), init(config, jax.random.key(0))
    )


def adapted(config, params):
    how = lora.Adapter(rank=2, alpha=3.0, targets=("wq", "down"))
    adapters = jax.tree.map(lambda x: x + 0.1, lora.init(jax.random.key(1), params, how))
    return lora.attach(params, adapters, how)


FORMS = {
    "plain": lambda config, params: params,
    "adapters": adapted,
    "four bits": lambda config, params: quantize.quantize(params, quantize.nf4),
}


@pytest.mark.parametrize(("kind", "form"), [*((kind, "plain") for kind in CONFIGS), ("dense", "adapters")])
def test_layers_one_by_one_give_the_logits_and_gradients_of_stacked_ones(kind, form):
    config = CONFIGS[kind]
    params = weights(config)
    how = Execution(remat="layer")

    @partial(jit, static_argnums=0)
    def computed(one_by_one, params):
        def total(params):
            tree = FORMS[form](config, params)
            logits = apply(config, by_layer(config, tree) if one_by_one else tree, TOKENS, SEEN, how=how)[0]
            logits = jnp.where(SEEN[..., None], logits, 0)
            return jnp.sin(logits).sum(), logits

        return jax.grad(total, has_aux=True)(params)

    for got, expected in zip(*(jax.tree.leaves(computed(one_by_one, params)) for one_by_one in (True, False))):
        np.testing.assert_allclose(got, expected, atol=2e-6 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize(("kind", "form"), [*((kind, "plain") for kind in CONFIGS), ("dense", "four bits")])
def test_layers_one_by_one_give_the_samples_of_stacked_ones(kind, form):
    config = CONFIGS[kind]
    params = FORMS[form](config, weights(config))

    def run(tree, by=sampling.sample, **more):
        model = bind(config, Execution(cache_by_layer=tree is not params))
        settings = {"apply": model.apply, "init_cache": model.init_cache, "length": 12, "group": 2}
        settings |= {"end_tokens": (3,), "pad_token": 3} | more
        return by(tree, TOKENS[:2], SEEN[:2], jax.random.key(2), **settings)

    stacked, each = run(params), by_layer(config, params)
    others = {
        "dense": {"init_cache": bind(config).init_cache},
        "windows and ropes": {"by": sampling.sample_queue, "slots": 2},
    }
    for apart in (run(each), *([run(each, **others[kind])] if kind in others and form == "plain" else [])):
        np.testing.assert_array_equal(apart.tokens, stacked.tokens)
        np.testing.assert_allclose(apart.logps, stacked.logps, atol=2e-6)


@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
def test_a_cache_by_layer_is_read_where_it_lies(cache_dtype):
    """Of keys and values that are stacked, each layer's are sliced out, which copies them."""
    config, params = CONFIGS["windows and ropes"], weights(CONFIGS["windows and ropes"])

    def sliced(one_by_one):
        model = bind(config, Execution(cache_dtype=cache_dtype, cache_by_layer=one_by_one))
        cache, tree = jax.eval_shape(lambda: model.init_cache(3, 50)), by_layer(config, params)
        program = jax.jit(model.apply).lower(tree, TOKENS[:, :1], SEEN[:, :1], cache).as_text()
        # of a layer of a stack: keys, or values, of 50 columns or the ring's
        return len(re.findall(r"slice .*-> tensor<1x3x2x(?:8x50|50x8|8x21|21x8)x", program))

    assert sliced(True) == 0 and sliced(False) > 0


def test_a_cache_by_layer_is_refused_beside_stacked_weights():
    config, model = DENSE, bind(DENSE, Execution(cache_by_layer=True))
    with pytest.raises(
        ValueError, match=r"^the cache has its layers apart and the weights are stacked; take models.by"
    ):
        model.apply(weights(config), TOKENS, SEEN, model.init_cache(3, 12))


def test_layers_one_by_one_keep_their_numbers():
    config = CONFIGS["experts in some"]
    params = weights(config)
    layers = by_layer(config, params)["layers"]
    assert [("router" in layer, "gate" in layer) for layer in layers] == [(True, False), (False, True), (True, False)]
    np.testing.assert_array_equal(layers[2]["router"], params["layers"]["router"][1])
    np.testing.assert_array_equal(layers[1]["gate"], params["layers"]["gate"][0])
    np.testing.assert_array_equal(layers[1]["wq"], params["layers"]["wq"][1])
