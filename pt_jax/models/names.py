"""What the families call the tensors of their files, and which leaves of our tree each holds."""

from typing import NamedTuple


class Tensor(NamedTuple):
    """A tensor of a layer on disk, and the leaves that it holds side by side.

    Args:
      name: below the layer's prefix; with {} for the number of an expert, where each expert has its own.
      leaves: names in our tree; several are joined along their outputs.
      inputs: how many leading axes of a leaf are its inputs; 0 for norms and biases.
      out_in: whether it is stored outputs first, as a Linear is; a Conv1D of GPT-2 is not. Without inputs: whether it
        has one axis, and not a row of its own.
    """

    name: str
    leaves: tuple[str, ...]
    inputs: int = 0
    out_in: bool = True


def _linear(module, *leaves, inputs=1, out_in=True):
    """A product, and its bias for the configs that have one."""
    bias = Tensor(f"{module}.bias", tuple(f"{leaf}_bias" for leaf in leaves))
    return Tensor(f"{module}.weight", leaves, inputs, out_in), bias


def _norms(**modules):
    return tuple(Tensor(f"{module}.weight", (leaf,)) for leaf, module in modules.items())


QKVO = (
    *_linear("self_attn.q_proj", "wq"),
    *_linear("self_attn.k_proj", "wk"),
    *_linear("self_attn.v_proj", "wv"),
    *_linear("self_attn.o_proj", "wo", inputs=2),
)
SWIGLU = (*_linear("mlp.gate_proj", "gate"), *_linear("mlp.up_proj", "up"), *_linear("mlp.down_proj", "down"))
PRE = _norms(attn_norm="input_layernorm", mlp_norm="post_attention_layernorm")
POST = _norms(attn_out_norm="post_attention_layernorm", mlp_out_norm="post_feedforward_layernorm")
BOTH = _norms(
    attn_norm="input_layernorm",
    attn_out_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
)
QK = _norms(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
LLAMA = (*PRE, *QKVO, *SWIGLU)


def experts(module, gate="gate_proj", up="up_proj", down="down_proj"):
    """The router and the experts, each expert's products apart."""
    products = {"expert_gate": gate, "expert_up": up, "expert_down": down}
    experts = (Tensor(f"{module}.experts.{{}}.{name}.weight", (leaf,), 1) for leaf, name in products.items())
    return Tensor(f"{module}.gate.weight", ("router",), 1), *experts


ERNIE_EXPERTS = (
    *experts("mlp"),
    Tensor("mlp.moe_statics.e_score_correction_bias", ("router_bias",), out_in=False),
    *_linear("mlp.shared_experts.gate_proj", "shared_gate"),
    *_linear("mlp.shared_experts.up_proj", "shared_up"),
    *_linear("mlp.shared_experts.down_proj", "shared_down"),
)
PHI3 = (
    *PRE,
    *_linear("self_attn.qkv_proj", "wq", "wk", "wv"),
    *_linear("self_attn.o_proj", "wo", inputs=2),
    *_linear("mlp.gate_up_proj", "gate", "up"),
    *_linear("mlp.down_proj", "down"),
)
GPT2 = (
    Tensor("ln_1.weight", ("attn_norm",)),
    Tensor("ln_1.bias", ("attn_norm_bias",)),
    Tensor("ln_2.weight", ("mlp_norm",)),
    Tensor("ln_2.bias", ("mlp_norm_bias",)),
    *_linear("attn.c_attn", "wq", "wk", "wv", out_in=False),
    *_linear("attn.c_proj", "wo", inputs=2, out_in=False),
    *_linear("mlp.c_fc", "up", out_in=False),
    *_linear("mlp.c_proj", "down", out_in=False),
)
WHOLE = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "unembed": "lm_head.weight"}
WHOLE["score"] = "score.weight"
WHOLE_GPT2 = {
    "embed": "transformer.wte.weight",
    "positions": "transformer.wpe.weight",
    "norm": "transformer.ln_f.weight",
    "norm_bias": "transformer.ln_f.bias",
    "unembed": "lm_head.weight",
    "score": "score.weight",
}
