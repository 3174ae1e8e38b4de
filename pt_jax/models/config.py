"""What a model is: the numbers that fix its shapes and its arithmetic."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """A dense decoder of the Llama kind (RMSNorm, rotary positions, grouped-query attention, SwiGLU).

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
      eps: added to the mean square in a norm.
      tied: whether the unembedding is the embedding.
      qk_norm: whether queries and keys are normalised a head (Qwen3), or not (Llama).
      bos_token: id that starts a text, or None.
      end_tokens: ids that end one.
      pad_token: id that fills a row, or None. May equal an end token.

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

    def __post_init__(self):
        for name in ("vocab", "layers", "width", "heads", "kv_heads", "head_width", "hidden", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        if self.head_width % 2:
            raise ValueError(f"head_width={self.head_width} is odd; rotary positions turn pairs")
