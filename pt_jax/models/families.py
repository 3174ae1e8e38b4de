"""Model families as data: what each calls its tensors, and what the fields of its config.json mean.

A family is a row of ``FAMILIES``: the class that transformers loads it with, a function from config.json to the
choices of ``Config``, one back, and the tensors of a layer. Reading is strict: a field value that this decoder would
compute differently is refused by name.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from pt_jax.models import names, parameters
from pt_jax.models.config import Config
from pt_jax.models.fields import Fields, activation, window_fields, windows


class Part(NamedTuple):
    """A tensor on disk, and where in the stacks of our tree its leaves lie.

    Args:
      name: in the file.
      tensor: its row in the table of names.
      at: the layer among those of its kind, and the number of the expert where it is an expert's.
      shapes: of its leaves, there.
    """

    name: str
    tensor: names.Tensor
    at: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]


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
      ignored: tensors of files that transformers passes over too, as a regular expression.
      partial_rope: whether the class rotates ``partial_rotary_factor`` of a head.
    """

    architecture: str
    choices: Callable[[Fields], dict] = lambda fields: {}
    fields: Callable[[Config], dict] = lambda config: {}
    layer: tuple[names.Tensor, ...] = names.LLAMA
    prefix: str = "model.layers.{}."
    whole: dict[str, str] = dataclasses.field(default_factory=lambda: names.WHOLE)
    defaults: dict = dataclasses.field(default_factory=dict)
    classifier: str | None = None
    ignored: str | None = None
    partial_rope: bool = False

    def parts(self, config: Config) -> Iterator[Part]:
        """The tensors of all layers, one by one."""
        stacks, number = parameters.shapes(config)["layers"], {"all": 0, "dense": 0, "experts": 0}
        for i, has_experts in enumerate(config.has_experts):
            kinds = ("all", "experts" if has_experts else "dense")
            for tensor in self.layer:
                of = parameters.kind(tensor.leaves[0])
                if of in kinds and tensor.leaves[0] in stacks:
                    yield from self._parts(tensor, i, number[of], [stacks[leaf] for leaf in tensor.leaves])
            for kind in kinds:
                number[kind] += 1

    def _parts(self, tensor, layer, of_kind, stacks):
        name = self.prefix.format(layer) + tensor.name
        if "{}" not in tensor.name:
            yield Part(name, tensor, (of_kind,), tuple(shape[1:] for shape in stacks))
            return
        for expert in range(stacks[0][1]):
            yield Part(name.format(expert), tensor, (of_kind, expert), tuple(shape[2:] for shape in stacks))


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


def _mistral_fields(config):
    """transformers takes a file that has layer_types for one of Ministral, whose layers differ."""
    fields = window_fields(config)
    return fields if len(set(config.windows)) > 1 else {"sliding_window": fields["sliding_window"]}


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
    called = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
    out = {"hidden_activation": called[config.activation], "attention_bias": config.out_bias}
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
    called = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_new"}
    return {
        "n_embd": config.width, "n_head": config.heads, "n_layer": config.layers, "n_inner": config.hidden,
        "n_positions": config.max_length, "layer_norm_epsilon": config.eps,
        "activation_function": called[config.activation], "scale_attn_by_inverse_layer_idx": config.scale_by_layer,
    }  # fmt: skip


def _ernie(fields):
    bias = bool(fields.get("use_bias"))
    return {"rope_interleaved": True, "qkv_bias": bias, "out_bias": bias, "mlp_bias": bias}


def _everywhere(fields):
    """Mixtral's and Qwen's way with experts: all layers have the window, or none."""
    return windows(fields, lambda i: fields.get("sliding_window") is not None)


def _mixtral(fields):
    fields.must_be("router_jitter_noise", 0)
    return {
        "windows": _everywhere(fields), "experts": fields.need("num_local_experts"),
        "experts_per_token": fields.need("num_experts_per_tok"), "expert_hidden": fields.need("intermediate_size"),
    }  # fmt: skip


def _mixtral_fields(config):
    return window_fields(config) | {
        "num_local_experts": config.experts, "num_experts_per_tok": config.experts_per_token,
        "intermediate_size": config.expert_hidden,
    }  # fmt: skip


def _chosen(has):
    """``expert_layers`` and no experts at all where no layer has them."""
    return {"expert_layers": () if all(has) else tuple(has)} if any(has) else {"experts": 0}


def _qwen3_moe(fields):
    """The number of experts is called num_experts in the files of the hub, num_local_experts in those that are new."""
    layers, step = fields.need("num_hidden_layers"), fields.get("decoder_sparse_step") or 1
    experts, dense = fields.get("num_local_experts"), fields.get("mlp_only_layers") or []
    experts = fields.need("num_experts") if experts is None else experts
    fields.must_be("num_experts", experts)
    window = _everywhere(fields) if fields.get("use_sliding_window") else ()
    return _biases(fields) | {
        "qk_norm": True, "windows": window, "experts": experts,
        "experts_per_token": fields.need("num_experts_per_tok"), "expert_hidden": fields.need("moe_intermediate_size"),
        "norm_experts": bool(fields.get("norm_topk_prob")),
    } | _chosen([experts > 0 and i not in dense and (i + 1) % step == 0 for i in range(layers)])  # fmt: skip


def _qwen3_moe_fields(config):
    return _bias_fields(config) | _optional_window_fields(config) | {
        "num_experts": config.experts, "num_local_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token, "moe_intermediate_size": config.expert_hidden,
        "norm_topk_prob": config.norm_experts, "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, has in enumerate(config.has_experts) if not has],
    }  # fmt: skip


def _ernie_moe(fields):
    layers, step = fields.need("num_hidden_layers"), fields.need("moe_layer_interval")
    first, last = (fields.need(f"moe_layer_{side}_index") for side in ("start", "end"))
    hidden = fields.need("moe_intermediate_size")
    last = layers - 1 if last == -1 else last
    has = [first <= i <= last and (i + 1) % step == 0 for i in range(layers)]
    experts = {
        "experts": fields.need("moe_num_experts"), "experts_per_token": fields.need("moe_k"), "expert_hidden": hidden,
        "shared_hidden": hidden * (fields.get("moe_num_shared_experts") or 0),
        "expert_floor": float(fields.need("moe_norm_min")), "router_bias": True,
    }  # fmt: skip
    fields.must_be("use_bias", False)  # with it the logits have a bias too, and no checkpoint is known that has one
    return {"rope_interleaved": True} | (experts | _chosen(has) if any(has) else {})


def _ernie_moe_fields(config):
    has = [i for i, x in enumerate(config.has_experts) if x]
    first, last = (has[0], has[-1]) if has else (config.layers, config.layers - 1)
    rule = lambda step: [i for i in range(first, last + 1) if (i + 1) % step == 0]
    step = next((step for step in range(1, config.layers + 1) if rule(step) == has), None)
    if step is None:
        raise ValueError(f"expert_layers: {has} have no constant interval, which {config.family} needs")
    if config.shared_hidden % max(config.expert_hidden, 1):
        raise ValueError(
            f"shared_hidden={config.shared_hidden} must be a multiple of expert_hidden={config.expert_hidden} for "
            f"{config.family}"
        )
    return {
        "use_bias": False, "moe_num_experts": config.experts, "moe_k": config.experts_per_token,
        "moe_intermediate_size": config.expert_hidden, "moe_norm_min": config.expert_floor,
        "moe_num_shared_experts": config.shared_hidden // max(config.expert_hidden, 1),
        "moe_layer_start_index": first, "moe_layer_end_index": last, "moe_layer_interval": step,
    }  # fmt: skip


FAMILIES = {
    "llama": Family("LlamaForCausalLM", _biases, _bias_fields, classifier="LlamaForSequenceClassification"),
    "mistral": Family(
        "MistralForCausalLM",
        lambda fields: {"windows": windows(fields, lambda i: fields.get("sliding_window") is not None)},
        _mistral_fields,
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
        layer=(*names.LLAMA, *names.QK),
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
        layer=(*names.BOTH, *names.QKVO, *names.SWIGLU),
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
        layer=(*names.BOTH, *names.QKVO, *names.QK, *names.SWIGLU),
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
        layer=names.PHI3,
        defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
        classifier="Phi3ForSequenceClassification",
        partial_rope=True,
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        lambda fields: _biases(fields) | {"norms": "post", "qk_norm": True, "qk_norm_whole": True},
        _bias_fields,
        layer=(*names.POST, *names.QKVO, *names.QK, *names.SWIGLU),
        defaults={"rms_norm_eps": 1e-5},
        classifier="Olmo2ForSequenceClassification",
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
    "mixtral": Family(
        "MixtralForCausalLM",
        _mixtral,
        _mixtral_fields,
        layer=(*names.PRE, *names.QKVO, *names.experts("block_sparse_moe", "w1", "w3", "w2")),
        defaults={
            "rope_theta": 1_000_000.0, "rms_norm_eps": 1e-5, "num_local_experts": 8, "num_experts_per_tok": 2,
            "num_key_value_heads": 8,
        },
        classifier="MixtralForSequenceClassification",
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        _qwen3_moe,
        _qwen3_moe_fields,
        layer=(*names.LLAMA, *names.QK, *names.experts("mlp")),
        defaults={"sliding_window": 4096, "num_key_value_heads": 4, "num_experts_per_tok": 8},
        classifier="Qwen3MoeForSequenceClassification",
    ),
    "ernie4_5_moe": Family(
        "Ernie4_5_MoeForCausalLM",
        _ernie_moe,
        _ernie_moe_fields,
        layer=(*names.LLAMA, *names.ERNIE_EXPERTS),
        defaults={
            "rope_theta": 500_000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "num_key_value_heads": 4,
            "moe_num_shared_experts": 2, "moe_layer_start_index": 1, "moe_layer_end_index": -1,
            "moe_layer_interval": 1, "moe_norm_min": 1e-12,
        },
        ignored="mtp",  # heads that guess several tokens ahead
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        _gpt2,
        _gpt2_fields,
        layer=names.GPT2,
        prefix="transformer.h.{}.",
        whole=names.WHOLE_GPT2,
        defaults={"activation_function": "gelu_new", "tie_word_embeddings": True, "layer_norm_epsilon": 1e-5},
        classifier="GPT2ForSequenceClassification",
    ),
}  # fmt: skip
