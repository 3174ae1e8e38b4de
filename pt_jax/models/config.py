"""What a model is, the numbers and choices that fix its shapes and its arithmetic; and how it is computed."""

import dataclasses
import numbers
from typing import Literal, get_args, get_type_hints

FLOATS = ("float32", "bfloat16", "float16")
CACHES = (*FLOATS, "int8")  # what keys and values may be kept in


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How a model that was trained on short texts stretches its rotary frequencies for long ones; see ``rotary``.

    Args:
      kind: "linear", "dynamic", "llama3", "yarn" or "longrope".
      factor: how much longer.
      original: length of the texts before, in tokens (all but linear).
      low, high: wavelengths that are stretched whole or left alone: ``original / low`` and ``original / high``
        (llama3); rotations over ``original`` that bound the ramp, beta_slow and beta_fast (yarn).
      attention_factor: multiplies cos and sin (yarn, longrope).
      truncate: whether the ends of the ramp are whole numbers (yarn).
      short, long: divisors of the frequencies for texts up to ``original`` and for longer ones (longrope).
    """

    kind: Literal["linear", "dynamic", "llama3", "yarn", "longrope"]
    factor: float = 1.0
    original: int = 0
    low: float = 1.0
    high: float = 4.0
    attention_factor: float = 1.0
    truncate: bool = True
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()

    def __post_init__(self):
        if self.factor <= 0:
            raise ValueError(f"factor of the rope scaling must be above 0, got {self.factor}")


@dataclasses.dataclass(frozen=True)
class Config:
    """A decoder. The defaults are the arithmetic of Qwen3; other families set other choices (``families``).

    Hashable, so that it can be closed over by or be a static argument of a jitted function.

    Args:
      vocab: number of token ids V.
      layers: number of blocks L.
      width: of the residual stream.
      heads: query heads.
      kv_heads: key and value heads; divides ``heads``.
      head_width: of one head; even.
      hidden: of the feed-forward layer.
      max_length: the longest context that the model is made for, in tokens.
      rope_base: theta of the rotary positions.
      eps: added to the mean square (or the variance) in a norm.
      tied: whether the unembedding is the embedding.
      qk_norm: whether queries and keys are normalised.
      bos_token: id that starts a text, or None.
      end_tokens: ids that end one.
      pad_token: id that fills a row, or None. May equal an end token.
      family: model_type of its Hugging Face folder.
      norm: "rms": x / rms(x) * w; "rms_plus_one": x / rms(x) * (1 + w); "layer": LayerNorm with a bias.
      norms: "pre": of what goes into attention and feed-forward layer; "post": of what comes out; "both".
      qk_norm_whole: normalises queries and keys before they are split into heads (OLMo 2), not a head.
      activation: of the feed-forward layer.
      gated: whether its activation gates a second product (SwiGLU, GeGLU).
      qkv_bias, out_bias, mlp_bias: which products add a bias.
      learned_positions: an embedding a position, of ``max_length`` (GPT-2), instead of rotary positions.
      rope_fraction: the share of a head's width that is rotated, from its front.
      rope_interleaved: pairs are (2i, 2i + 1), not (i, i + half).
      rope_scaling: or None.
      local_rope_base: theta, unscaled, of the layers with a window (Gemma 3), or None: the same as the others.
      rope_layers: whether each layer has rotary positions (SmolLM3 leaves out some); empty: all have.
      windows: of each layer, how many tokens it sees, itself included; 0: all. Empty: all see all.
      attention_scale: of the scores; None: head_width^-0.5.
      scale_by_layer: divides the scores of layer i by i + 1 (an option of GPT-2).
      attention_softcap: bounds the scores, cap tanh(score / cap), or None.
      logit_softcap: the same of the logits.
      embed_scale: multiplies the embeddings.
      experts: feed-forward networks of a layer of which each token uses some; 0: one network, that all use.
      experts_per_token: how many.
      expert_hidden: of one expert.
      expert_layers: whether each layer has experts; empty: all, when there are experts.
      shared_hidden: of a network beside the experts that every token uses; 0: none.
      norm_experts: whether the weights of a token's experts are divided by their sum.
      expert_floor: the sum is at least this before dividing (ERNIE 4.5).
      router_bias: a bias that decides which experts are chosen, but not how much they weigh (ERNIE 4.5).
      head: "tokens": logits over the vocabulary; "score": one number, for reward and value models (``heads``).

    Raises:
      ValueError: a number is not positive, the heads do not divide, or the experts do not add up.

    >>> Config(vocab=64, layers=2, width=16, heads=3, kv_heads=2, head_width=4, hidden=32)
    Traceback (most recent call last):
    ValueError: kv_heads=2 does not divide heads=3
    """

    vocab: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    hidden: int
    max_length: int = 2048
    rope_base: float = 10_000.0
    eps: float = 1e-6
    tied: bool = True
    qk_norm: bool = True
    bos_token: int | None = None
    end_tokens: tuple[int, ...] = ()
    pad_token: int | None = None
    family: str = ""
    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"
    norms: Literal["pre", "post", "both"] = "pre"
    qk_norm_whole: bool = False
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    learned_positions: bool = False
    rope_fraction: float = 1.0
    rope_interleaved: bool = False
    rope_scaling: RopeScaling | None = None
    local_rope_base: float | None = None
    rope_layers: tuple[bool, ...] = ()
    windows: tuple[int, ...] = ()
    attention_scale: float | None = None
    scale_by_layer: bool = False
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embed_scale: float = 1.0
    experts: int = 0
    experts_per_token: int = 2
    expert_hidden: int = 0
    expert_layers: tuple[bool, ...] = ()
    shared_hidden: int = 0
    norm_experts: bool = True
    expert_floor: float = 0.0
    router_bias: bool = False
    head: Literal["tokens", "score"] = "tokens"

    def __post_init__(self):
        for name in ("vocab", "layers", "width", "heads", "kv_heads", "head_width", "hidden", "max_length"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
            if not isinstance(value, numbers.Integral):
                raise ValueError(f"{name} must be a whole number, got {value!r}")
        self._check_tokens()
        if self.eps is None or self.eps < 0:
            raise ValueError(f"eps must be at least 0, got {self.eps}")
        if not 0 < self.rope_fraction <= 1:
            raise ValueError(f"rope_fraction must be above 0 and at most 1, got {self.rope_fraction}")
        if self.rope_base <= 0 or (self.local_rope_base or 1) <= 0:
            raise ValueError(f"rope_base must be above 0, got {self.rope_base} (local: {self.local_rope_base})")
        if min(self.windows, default=0) < 0:
            raise ValueError(f"windows must be at least 0, got {min(self.windows)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        if not self.learned_positions and self.rope_width % 2:
            of = "head_width" if self.rope_fraction == 1 else "rope_fraction * head_width"
            raise ValueError(f"{of}={self.rope_width} is odd; rotary positions turn pairs")
        scaling, pairs = self.rope_scaling, self.rope_width // 2
        if scaling is not None and scaling.kind == "longrope" and {len(scaling.short), len(scaling.long)} != {pairs}:
            raise ValueError(
                f"longrope has {len(scaling.short)} short and {len(scaling.long)} long divisors for {pairs}"
            )
        if self.experts:
            if not 1 <= self.experts_per_token <= self.experts:
                raise ValueError(f"experts_per_token={self.experts_per_token} must be from 1 to experts={self.experts}")
            if self.expert_hidden < 1:
                raise ValueError(f"expert_hidden must be at least 1, got {self.expert_hidden}")
        elif self.expert_layers or self.shared_hidden or self.router_bias:
            raise ValueError("expert_layers, shared_hidden and router_bias need experts")
        for name in ("windows", "rope_layers", "expert_layers"):
            if getattr(self, name) and len(getattr(self, name)) != self.layers:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {self.layers} layers")
        if not self.family:
            families = ("mixtral", "qwen3_moe") if self.experts else ("llama", "qwen3")
            object.__setattr__(self, "family", families[self.qk_norm])

    def _check_tokens(self):
        for name, tokens in (
            ("bos_token", self.bos_token),
            ("pad_token", self.pad_token),
            ("end_tokens", self.end_tokens),
        ):
            for token in tokens if isinstance(tokens, tuple) else (tokens,):
                if token is not None and not isinstance(token, numbers.Integral):
                    raise ValueError(f"{name} must be a number of a token, got {token!r}")

    @property
    def rope_width(self) -> int:
        """How much of a head's width is rotated."""
        return int(self.head_width * self.rope_fraction)

    @property
    def has_experts(self) -> tuple[bool, ...]:
        """Of each layer."""
        return self.expert_layers or (bool(self.experts),) * self.layers


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a model is computed: changes time, memory and rounding, never what is computed.

    Args:
      attention: "plain": written out, with the scores [B, h, T, S] in memory; "tiles": written out, some queries at a
        time; "cudnn": the flash attention of NVIDIA's library, for 16-bit types; "splash": Pallas's for TPUs, elsewhere
        interpreted and slow; "auto": the best that the device, the model and the rows allow. What each computes and
        costs is in ``attention``.
      remat: what of the forward pass is kept for the backward pass: "none": all of it; "layer": each layer's input,
        and the layer is computed again; "dots": results of matrix products without batch axes, and the rest is
        computed again.
      dtype: that the model computes in, such as "bfloat16"; None: that of the embedding. Norms' statistics, positions,
        softmax and routers are float32 always.
      cache_dtype: of keys and values in a cache, such as "int8" (``cache.init_cache``); None: ``dtype``, or float32.
      cache_by_layer: each layer's keys and values as arrays of their own, for weights that are (``models.by_layer``).

    >>> Execution(remat="all")
    Traceback (most recent call last):
    ValueError: remat is 'all'; known are 'none', 'layer', 'dots'
    """

    attention: Literal["auto", "plain", "tiles", "cudnn", "splash"] = "auto"
    remat: Literal["none", "layer", "dots"] = "none"
    dtype: str | None = None
    cache_dtype: str | None = None
    cache_by_layer: bool = False

    def __post_init__(self):
        known = {name: get_args(get_type_hints(Execution)[name]) for name in ("attention", "remat")}
        known |= {"dtype": (None, *FLOATS), "cache_dtype": (None, *CACHES)}
        for name, those in known.items():
            if getattr(self, name) not in those:
                raise ValueError(f"{name} is {getattr(self, name)!r}; known are {', '.join(map(repr, those))}")


DEFAULT = Execution()
