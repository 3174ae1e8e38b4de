"""What a model is: the numbers and choices that fix its shapes and its arithmetic."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How a model that was trained on short texts stretches its rotary frequencies for long ones; see ``rotary``.

    Args:
      kind: "linear", "llama3", "yarn" or "longrope".
      factor: how much longer.
      original: length of the texts before, in tokens (llama3, yarn, longrope).
      low, high: wavelengths that are stretched whole or left alone: ``original / low`` and ``original / high``
        (llama3); rotations over ``original`` that bound the ramp, beta_slow and beta_fast (yarn).
      attention_factor: multiplies cos and sin (yarn, longrope).
      truncate: whether the ends of the ramp are whole numbers (yarn).
      short, long: divisors of the frequencies for texts up to ``original`` and for longer ones (longrope).
    """

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    factor: float = 1.0
    original: int = 0
    low: float = 1.0
    high: float = 4.0
    attention_factor: float = 1.0
    truncate: bool = True
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()


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

    Raises:
      ValueError: a number is not positive, or the heads do not divide.

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

    def __post_init__(self):
        for name in ("vocab", "layers", "width", "heads", "kv_heads", "head_width", "hidden", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        if not self.learned_positions and self.rope_width % 2:
            of = "head_width" if self.rope_fraction == 1 else "rope_fraction * head_width"
            raise ValueError(f"{of}={self.rope_width} is odd; rotary positions turn pairs")
        for name in ("windows", "rope_layers"):
            if getattr(self, name) and len(getattr(self, name)) != self.layers:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {self.layers} layers")
        if not self.family:
            object.__setattr__(self, "family", "qwen3" if self.qk_norm else "llama")

    @property
    def rope_width(self) -> int:
        """How much of a head's width is rotated."""
        return int(self.head_width * self.rope_fraction)
