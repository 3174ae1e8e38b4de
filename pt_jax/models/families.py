"""Model families as data: what each calls its tensors, and what the fields of its config.json mean.

A family is a row of ``FAMILIES``: the class that transformers loads it with, a function from config.json to the
choices of ``Config``, one back, and the tensors of a layer. Reading is strict: a field value that this decoder would
compute differently is refused by name.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

from pt_jax.models.config import Config, RopeScaling


class Tensor(NamedTuple):
    """A tensor of a layer on disk, and the leaves that it holds side by side.

    Args:
      name: below the layer's prefix.
      leaves: names in our tree; several are joined along their outputs.
      inputs: how many leading axes of a leaf are its inputs; 0 for norms and biases.
      out_in: whether it is stored outputs first, as a Linear is; a Conv1D of GPT-2 is not.
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


_QKVO = (
    *_linear("self_attn.q_proj", "wq"),
    *_linear("self_attn.k_proj", "wk"),
    *_linear("self_attn.v_proj", "wv"),
    *_linear("self_attn.o_proj", "wo", inputs=2),
)
_SWIGLU = (*_linear("mlp.gate_proj", "gate"), *_linear("mlp.up_proj", "up"), *_linear("mlp.down_proj", "down"))
_PRE = _norms(attn_norm="input_layernorm", mlp_norm="post_attention_layernorm")
_POST = _norms(attn_out_norm="post_attention_layernorm", mlp_out_norm="post_feedforward_layernorm")
_BOTH = _norms(
    attn_norm="input_layernorm",
    attn_out_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
)
_QK = _norms(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
_LLAMA = (*_PRE, *_QKVO, *_SWIGLU)
_PHI3 = (
    *_PRE,
    *_linear("self_attn.qkv_proj", "wq", "wk", "wv"),
    *_linear("self_attn.o_proj", "wo", inputs=2),
    *_linear("mlp.gate_up_proj", "gate", "up"),
    *_linear("mlp.down_proj", "down"),
)
_GPT2 = (
    Tensor("ln_1.weight", ("attn_norm",)),
    Tensor("ln_1.bias", ("attn_norm_bias",)),
    Tensor("ln_2.weight", ("mlp_norm",)),
    Tensor("ln_2.bias", ("mlp_norm_bias",)),
    *_linear("attn.c_attn", "wq", "wk", "wv", out_in=False),
    *_linear("attn.c_proj", "wo", inputs=2, out_in=False),
    *_linear("mlp.c_fc", "up", out_in=False),
    *_linear("mlp.c_proj", "down", out_in=False),
)
_WHOLE = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "unembed": "lm_head.weight"}
_WHOLE_GPT2 = {
    "embed": "transformer.wte.weight",
    "positions": "transformer.wpe.weight",
    "norm": "transformer.ln_f.weight",
    "norm_bias": "transformer.ln_f.bias",
    "unembed": "lm_head.weight",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One row of the table.

    Args:
      architecture: class of transformers for language modelling.
      choices: fields of config.json -> keyword arguments of ``Config`` beyond the common ones.
      fields: ``Config`` -> fields of config.json beyond the common ones.
      layer: the tensors of a layer.
      prefix: of a layer, with {} for its number.
      whole: our leaf -> tensor, of what is no layer.
      defaults: fields of config.json that the class fills in when the file lacks them.
      classifier: class of transformers for sequence classification; None where there is none.
    """

    architecture: str
    choices: Callable[["Fields"], dict] = lambda fields: {}
    fields: Callable[[Config], dict] = lambda config: {}
    layer: tuple[Tensor, ...] = _LLAMA
    prefix: str = "model.layers.{}."
    whole: dict[str, str] = dataclasses.field(default_factory=lambda: _WHOLE)
    defaults: dict = dataclasses.field(default_factory=dict)
    classifier: str | None = None


class Fields(dict):
    """The fields of a config.json, with errors that name the file."""

    def __init__(self, fields, file):
        super().__init__(fields)
        self.file = file

    def need(self, name):
        if self.get(name) is None:
            raise ValueError(f"{self.file}: lacks the field {name}")
        return self[name]

    def must_be(self, name, *values):
        """Fails unless the field is missing, null or one of the values that are computed."""
        if self.get(name) is not None and self[name] not in values:
            expected = " or ".join(map(repr, values))
            raise ValueError(f"{self.file}: {name} is {self[name]!r}; only {expected} is computed")


ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu"}
ACTIVATIONS |= {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def activation(fields, *names):
    """The activation of whichever of these fields is set."""
    name = next((n for n in names if fields.get(n) is not None), names[-1])
    fields.must_be(name, *ACTIVATIONS)
    return ACTIVATIONS[fields.get(name) or "silu"]


def rope(fields: Fields) -> dict:
    """Rotary positions, from the fields of transformers 5 (``rope_parameters``) or 4 (``rope_theta`` and others)."""
    given = fields.get("rope_parameters") or {}
    if "full_attention" in given:
        given = given["full_attention"]
    elif not given:
        given = (fields.get("rope_scaling") or {}) | {"rope_theta": fields.get("rope_theta") or 10_000.0}
    given = Fields(given, f"{fields.file}: rope_parameters")
    kind = given.get("rope_type", given.get("type", "default"))
    fraction = given.get("partial_rotary_factor", fields.get("partial_rotary_factor")) or 1.0
    return {
        "rope_base": float(given.need("rope_theta")),
        "rope_fraction": float(fraction),
        "rope_scaling": _scaling("longrope" if kind == "su" else kind, given, fields),
    }


def _scaling(kind, given, fields):
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(given.need("factor")))
    original = given.get("original_max_position_embeddings", fields.get("original_max_position_embeddings"))
    original = original or fields.need("max_position_embeddings")
    factor = float(given.get("factor") or fields.need("max_position_embeddings") / original)
    if kind == "llama3":
        low, high = float(given.need("low_freq_factor")), float(given.need("high_freq_factor"))
        return RopeScaling("llama3", factor, original, low, high)
    grown = given.get("attention_factor")
    if kind == "yarn":
        scale = lambda share: 1.0 if factor <= 1 else 0.1 * share * math.log(factor) + 1
        if grown is None:
            both = given.get("mscale") and given.get("mscale_all_dim")
            grown = scale(given["mscale"]) / scale(given["mscale_all_dim"]) if both else scale(1)
        low, high = float(given.get("beta_slow") or 1), float(given.get("beta_fast") or 32)
        return RopeScaling("yarn", factor, original, low, high, float(grown), bool(given.get("truncate", True)))
    if kind == "longrope":
        if grown is None:
            grown = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        lists = {name: tuple(map(float, given.need(f"{name}_factor"))) for name in ("short", "long")}
        return RopeScaling("longrope", factor, original, attention_factor=float(grown), **lists)
    raise ValueError(
        f"{given.file}: rope_type is {kind!r}; only 'default', 'linear', 'llama3', 'yarn' and 'longrope' are computed"
    )


def rope_fields(config: Config) -> dict:
    """The inverse of ``rope``, for transformers 5, with ``rope_theta`` for those who still read that."""
    out = {"rope_type": "default", "rope_theta": config.rope_base}
    if config.rope_fraction != 1:
        out["partial_rotary_factor"] = config.rope_fraction
    scaling = config.rope_scaling
    if scaling is not None:
        out |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind != "linear":
            out["original_max_position_embeddings"] = scaling.original
        if scaling.kind == "llama3":
            out |= {"low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
        if scaling.kind in ("yarn", "longrope"):
            out["attention_factor"] = scaling.attention_factor
        if scaling.kind == "yarn":
            out |= {"beta_slow": scaling.low, "beta_fast": scaling.high, "truncate": scaling.truncate}
        if scaling.kind == "longrope":
            out |= {"short_factor": list(scaling.short), "long_factor": list(scaling.long)}
    if config.local_rope_base is not None:
        local = {"rope_type": "default", "rope_theta": config.local_rope_base}
        return {"rope_parameters": {"full_attention": out, "sliding_attention": local}}
    return {"rope_parameters": out, "rope_theta": config.rope_base}


def windows(fields, sliding: Callable[[int], bool]) -> tuple[int, ...]:
    """What each layer sees, from ``layer_types`` or else by a rule of the layer's number; () when all see all."""
    layers, kinds = fields.need("num_hidden_layers"), fields.get("layer_types")
    if kinds is None:
        kinds = ["sliding_attention" if sliding(i) else "full_attention" for i in range(layers)]
    other = sorted(set(kinds) - {"sliding_attention", "full_attention"})
    if other:
        raise ValueError(f"{fields.file}: layer_types holds {other[0]!r}; only full and sliding attention are computed")
    if "sliding_attention" not in kinds:
        return ()
    window = fields.need("sliding_window")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def window_fields(config: Config) -> dict:
    if not any(config.windows):
        return {"sliding_window": None}
    kinds = ["sliding_attention" if window else "full_attention" for window in config.windows]
    return {"sliding_window": max(config.windows), "layer_types": kinds}


# ---- the families


def _biases(fields):
    """Llama's way: ``attention_bias`` is of all four products."""
    attention, mlp = bool(fields.get("attention_bias")), bool(fields.get("mlp_bias"))
    return {"qkv_bias": attention, "out_bias": attention, "mlp_bias": mlp}


def _bias_fields(config):
    return {"attention_bias": config.out_bias, "mlp_bias": config.mlp_bias}


def _optional_window(fields):
    """Qwen's way: only when it is switched on, and only from a layer on."""
    first = fields.get("max_window_layers", 28)
    return windows(fields, lambda i: bool(fields.get("use_sliding_window")) and i >= first)


def _optional_window_fields(config):
    return window_fields(config) | {"use_sliding_window": any(config.windows)}


def _gemma(fields):
    scalar = fields.get("query_pre_attn_scalar")
    fields.must_be("use_bidirectional_attention", False)
    return {
        "norm": "rms_plus_one",
        "activation": activation(fields, "hidden_activation", "hidden_act"),
        "embed_scale": math.sqrt(fields.need("hidden_size")),
        "attention_scale": None if scalar is None else scalar**-0.5,
        "logit_softcap": fields.get("final_logit_softcapping"),
        "qkv_bias": bool(fields.get("attention_bias")),
        "out_bias": bool(fields.get("attention_bias")),
    }


def _gemma_fields(config):
    names = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
    out = {"hidden_activation": names[config.activation], "attention_bias": config.out_bias}
    kinds = ["sliding_attention" if window else "full_attention" for window in config.windows]
    # transformers wants a window even where no layer has one
    out |= {"sliding_window": max(config.windows, default=0) or 4096}
    out |= {"layer_types": kinds or ["full_attention"] * config.layers}
    if config.attention_scale is not None:
        out["query_pre_attn_scalar"] = _whole(config.attention_scale**-2)
    return out


def _whole(x):
    return round(x) if abs(x - round(x)) < 1e-6 * x else x


def _gemma3_rope(fields):
    given = fields.get("rope_parameters") or {}
    local = given["sliding_attention"]["rope_theta"] if "sliding_attention" in given else None
    return {"local_rope_base": float(local or fields.get("rope_local_base_freq") or 10_000.0)}


def _every(fields, name, default):
    """Layers 0, 1, ... where every ``name``-th sees all and the others a window."""
    period = fields.get(name) or fields.get(f"_{name}") or default
    return windows(fields, lambda i: bool((i + 1) % period))


def _smollm3(fields):
    layers = fields.need("num_hidden_layers")
    period = fields.get("no_rope_layer_interval") or 4
    has = fields.get("no_rope_layers") or [(i + 1) % period != 0 for i in range(layers)]  # 1: has positions
    has = tuple(map(bool, has))
    return _biases(fields) | {"windows": _optional_window(fields), "rope_layers": () if all(has) else has}


def _gpt2(fields):
    fields.must_be("scale_attn_weights", True)
    fields.must_be("add_cross_attention", False)
    by_layer = fields.get("scale_attn_by_inverse_layer_idx")
    return {
        "norm": "layer", "gated": False, "learned_positions": True,
        "qkv_bias": True, "out_bias": True, "mlp_bias": True,
        "activation": activation(fields, "activation_function"), "scale_by_layer": bool(by_layer),
    }  # fmt: skip


def _gpt2_fields(config):
    names = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_new"}
    return {
        "n_embd": config.width, "n_head": config.heads, "n_layer": config.layers, "n_inner": config.hidden,
        "n_positions": config.max_length, "layer_norm_epsilon": config.eps,
        "activation_function": names[config.activation], "scale_attn_by_inverse_layer_idx": config.scale_by_layer,
    }  # fmt: skip


def _ernie(fields):
    bias = bool(fields.get("use_bias"))
    return {"rope_interleaved": True, "qkv_bias": bias, "out_bias": bias, "mlp_bias": bias}


FAMILIES = {
    "llama": Family("LlamaForCausalLM", _biases, _bias_fields, classifier="LlamaForSequenceClassification"),
    "mistral": Family(
        "MistralForCausalLM",
        lambda fields: {"windows": windows(fields, lambda i: fields.get("sliding_window") is not None)},
        window_fields,
        defaults={"sliding_window": 4096},
        classifier="MistralForSequenceClassification",
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        lambda fields: {"qkv_bias": True, "windows": _optional_window(fields)},
        _optional_window_fields,
        defaults={"sliding_window": 4096},
        classifier="Qwen2ForSequenceClassification",
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        lambda fields: _biases(fields) | {"qk_norm": True, "windows": _optional_window(fields)},
        lambda config: _bias_fields(config) | _optional_window_fields(config),
        layer=(*_LLAMA, *_QK),
        defaults={"head_dim": 128, "sliding_window": 4096},
        classifier="Qwen3ForSequenceClassification",
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        lambda fields: _gemma(fields) | {
            "norms": "both", "attention_softcap": fields.get("attn_logit_softcapping"),
            "windows": _every(fields, "sliding_window_pattern", 2),
        },
        lambda config: _gemma_fields(config) | {
            "attn_logit_softcapping": config.attention_softcap, "final_logit_softcapping": config.logit_softcap,
        },
        layer=(*_BOTH, *_QKVO, *_SWIGLU),
        defaults={
            "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh",
        },
        classifier="Gemma2ForSequenceClassification",
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        lambda fields: _gemma(fields) | _gemma3_rope(fields) | {
            "norms": "both", "qk_norm": True, "windows": _every(fields, "sliding_window_pattern", 6),
        },
        lambda config: _gemma_fields(config) | {
            "attn_logit_softcapping": None, "final_logit_softcapping": config.logit_softcap,
        },
        layer=(*_BOTH, *_QKVO, *_QK, *_SWIGLU),
        defaults={
            "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096, "tie_word_embeddings": True,
            "hidden_activation": "gelu_pytorch_tanh", "rope_theta": 1_000_000.0,
        },
        classifier="Gemma3TextForSequenceClassification",
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        lambda fields: {"windows": windows(fields, lambda i: fields.get("sliding_window") is not None)},
        lambda config: window_fields(config) | (
            {"original_max_position_embeddings": config.rope_scaling.original} if config.rope_scaling else {}
        ),
        layer=_PHI3,
        defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
        classifier="Phi3ForSequenceClassification",
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        lambda fields: _biases(fields) | {"norms": "post", "qk_norm": True, "qk_norm_whole": True},
        _bias_fields,
        layer=(*_POST, *_QKVO, *_QK, *_SWIGLU),
        defaults={"rms_norm_eps": 1e-5},
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        _smollm3,
        lambda config: _bias_fields(config) | _optional_window_fields(config) | {
            "no_rope_layers": [int(x) for x in config.rope_layers or (True,) * config.layers],
        },
        defaults={"rope_theta": 2_000_000.0, "tie_word_embeddings": True, "sliding_window": None},
        classifier="SmolLM3ForSequenceClassification",
    ),
    "ernie4_5": Family(
        "Ernie4_5ForCausalLM",
        _ernie,
        lambda config: {"use_bias": config.qkv_bias},
        defaults={"head_dim": 128, "rope_theta": 500_000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        _gpt2,
        _gpt2_fields,
        layer=_GPT2,
        prefix="transformer.h.{}.",
        whole=_WHOLE_GPT2,
        defaults={"activation_function": "gelu_new", "tie_word_embeddings": True, "layer_norm_epsilon": 1e-5},
        classifier="GPT2ForSequenceClassification",
    ),
}  # fmt: skip
