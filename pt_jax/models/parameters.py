"""The parameter tree of a decoder: which arrays there are, their shapes, and fresh ones.

Letters, here and in every einsum of the model: b row, t query position, s key position, d width, h heads, k key/value
heads, c head width, f hidden, v vocabulary, e experts, n rows and positions together. Weights are stored input axes
first, layers stacked on axis 0:

    embed [v, d], norm [d], unembed [v, d] (when not tied) or score [d] (a model that scores texts), positions [n, d]
    (when learned), and under "layers", each with a leading L:
    wq [d, h, c], wk [d, k, c], wv [d, k, c], wo [h, c, d], attn_norm, mlp_norm [d] of what goes in, attn_out_norm,
    mlp_out_norm [d] of what comes out, q_norm, k_norm [c] (or whole, [h, c] and [k, c]);
    of the layers with one feed-forward network: gate [d, f], up [d, f], down [f, d];
    of those with experts: router [d, e], router_bias [e], expert_gate, expert_up [e, d, f], expert_down [e, f, d],
    shared_gate, shared_up [d, f], shared_down [f, d]

A bias has the name of its product and the axes of its result: wq_bias [h, c]. Where only some layers have experts, the
leaves of either kind are stacked over the layers of that kind alone.
"""

import math

import jax
import jax.numpy as jnp

from pt_jax.models.config import Config

PRODUCTS = {
    "embed": "btd,vd->btv",
    "unembed": "btd,vd->btv",
    "wq": "btd,dhc->bthc",
    "wk": "btd,dkc->btkc",
    "wv": "btd,dkc->btkc",
    "wo": "bthc,hcd->btd",
    "gate": "btd,df->btf",
    "up": "btd,df->btf",
    "down": "btf,fd->btd",
    "router": "nd,de->ne",
    "expert_gate": "nd,edf->nf",
    "expert_up": "nd,edf->nf",
    "expert_down": "nf,efd->nd",
    "shared_gate": "btd,df->btf",
    "shared_up": "btd,df->btf",
    "shared_down": "btf,fd->btd",
}
FEED_FORWARD = ("gate", "up", "down")
KEPT_FLOAT32 = ("router", "router_bias")  # whatever the others are: a choice that is rounded is another choice


def kind(name: str) -> str:
    """Of which layers a leaf is: "dense" (one feed-forward network), "experts", or "all"."""
    if name.startswith(("router", "expert_", "shared_")):
        return "experts"
    return "dense" if name.removesuffix("_bias") in FEED_FORWARD else "all"


def shapes(config: Config) -> dict:
    """The parameter tree with a shape in the place of every array."""
    d, h, k, c, f = config.width, config.heads, config.kv_heads, config.head_width, config.hidden
    E, F, S = config.experts, config.expert_hidden, config.shared_hidden
    layer = {"wq": (d, h, c), "wk": (d, k, c), "wv": (d, k, c), "wo": (h, c, d), "up": (d, f), "down": (f, d)}
    if config.gated:
        layer["gate"] = (d, f)
    if S:
        layer |= {"shared_gate": (d, S), "shared_up": (d, S), "shared_down": (S, d)}
    bias = lambda *names: {f"{name}_bias": layer[name][1:] for name in names if name in layer}
    if config.qkv_bias:
        layer |= {"wq_bias": (h, c), "wk_bias": (k, c), "wv_bias": (k, c)}
    if config.out_bias:
        layer["wo_bias"] = (d,)
    if config.mlp_bias:
        layer |= bias(*FEED_FORWARD, "shared_gate", "shared_up", "shared_down")
    if E:
        layer |= {"router": (d, E), "expert_gate": (E, d, F), "expert_up": (E, d, F), "expert_down": (E, F, d)}
    if config.router_bias:
        layer["router_bias"] = (E,)
    if config.qk_norm:
        layer |= {"q_norm": (h, c), "k_norm": (k, c)} if config.qk_norm_whole else {"q_norm": (c,), "k_norm": (c,)}
    if config.norms != "post":
        layer |= {"attn_norm": (d,), "mlp_norm": (d,)}
    if config.norms != "pre":
        layer |= {"attn_out_norm": (d,), "mlp_out_norm": (d,)}
    tree = {"embed": (config.vocab, d), "norm": (d,)}
    if config.norm == "layer":
        layer |= {
            f"{name}_bias": (d,) for name in layer if name.startswith(("attn_", "mlp_")) and name.endswith("norm")
        }
        tree["norm_bias"] = (d,)
    if config.learned_positions:
        tree["positions"] = (config.max_length, d)
    if config.head == "score":
        tree["score"] = (d,)
    elif not config.tied:
        tree["unembed"] = (config.vocab, d)
    stacked = {"all": config.layers, "experts": sum(config.has_experts)}
    stacked["dense"] = config.layers - stacked["experts"]
    layer = {name: (stacked[kind(name)], *shape) for name, shape in layer.items() if stacked[kind(name)]}
    return tree | {"layers": layer}


def init(config: Config, key, dtype=jnp.float32) -> dict:
    """Fresh parameters: norms 1 (0 where 1 is added to them), biases 0, matrices normal with deviation 0.02.

    The matrices that write into the residual stream are scaled by 1 / sqrt(2 L), so that its variance does not grow
    with depth (Radford et al. 2019, section 2.3). A router is float32 whatever the type of the others.

    Args:
      config: the model.
      key: PRNG key.
      dtype: of the parameters.

    Returns:
      The tree of arrays that ``apply`` takes.
    """
    tree = shapes(config)
    paths = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, tuple))

    def fresh(i, path, shape):
        name = path[-1].key
        of = type_of(name, dtype)
        if name.endswith("bias"):
            return jnp.zeros(shape, of)
        if name.endswith("norm"):
            return jnp.full(shape, config.norm != "rms_plus_one", of)
        scale = 0.02 / math.sqrt(2 * config.layers) if name.endswith(("wo", "down")) else 0.02
        return (jax.random.normal(jax.random.fold_in(key, i), shape) * scale).astype(of)

    treedef = jax.tree.structure(tree, is_leaf=lambda x: isinstance(x, tuple))
    return jax.tree.unflatten(treedef, [fresh(i, path, shape) for i, (path, shape) in enumerate(paths)])


def type_of(name: str, dtype):
    """The type of a leaf in a tree of parameters of this type."""
    return jnp.float32 if name in KEPT_FLOAT32 else dtype


def count(params) -> int:
    """The number of parameters of a tree of arrays or of shapes."""
    if isinstance(params, tuple):
        return math.prod(params)
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, tuple))
    return sum(math.prod(x) if isinstance(x, tuple) else x.size for x in leaves)
