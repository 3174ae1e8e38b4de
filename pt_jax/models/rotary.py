"""Rotary positions: pairs of a head's numbers turned by angles that grow with the position.

Su et al. 2021, https://arxiv.org/abs/2104.09864. A pair i of c / 2 turns by position * base^(-2i / c). The kinds of
scaling change these frequencies so that a model reads texts longer than those it was trained on:

    linear     divides all by the factor (Chen et al. 2023, https://arxiv.org/abs/2306.15595)
    dynamic    lets the base grow with the length, where it is above the one of before ("dynamic NTK")
    llama3     divides the slow ones, leaves the fast ones, blends those between (Llama 3.1)
    yarn       the same with a ramp over the pairs, and cos and sin grow by a factor (https://arxiv.org/abs/2309.00071)
    longrope   divides each by a number of its own, one list for short and one for long texts (Phi-3)
"""

import math

import jax.numpy as jnp
import numpy as np

from pt_jax.models.config import Config, RopeScaling


def frequencies(width: int, base: float, scaling: RopeScaling | None, length: int):
    """Angles a position: float32 [width / 2], and the factor of cos and sin.

    Args:
      width: of the part of a head that is rotated.
      base: theta.
      scaling: or None.
      length: of the array that holds the text. Only longrope and dynamic look at it: they take the frequencies of the
        longest text that there is room for, so that a cache is read with the frequencies that it was written with.
    """
    if scaling is not None and scaling.kind == "dynamic":
        more = scaling.factor * max(length / scaling.original, 1) - (scaling.factor - 1)
        base = base * more ** (width / (width - 2))
    inverse = base ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    if scaling is None:
        return inverse.astype(np.float32), 1.0
    if scaling.kind == "linear":
        inverse = inverse / scaling.factor
    elif scaling.kind == "llama3":
        inverse = _llama3(inverse, scaling)
    elif scaling.kind == "yarn":
        inverse = _yarn(inverse, width, base, scaling)
    elif scaling.kind == "longrope":
        inverse = inverse / np.asarray(scaling.long if length > scaling.original else scaling.short)
    elif scaling.kind != "dynamic":
        raise ValueError(f"rope scaling of kind {scaling.kind!r} is not known")
    return inverse.astype(np.float32), scaling.attention_factor


def _llama3(inverse, scaling):
    turns = scaling.original * inverse / (2 * math.pi)  # over the texts of before
    blend = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return (1 - blend) * inverse / scaling.factor + blend * inverse


def _yarn(inverse, width, base, scaling):
    def pair(turns):
        """The pair, a fraction of one, that turns so often over the texts of before."""
        return width * math.log(scaling.original / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = pair(scaling.high), pair(scaling.low)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    last = last + 0.001 if first == last else last
    slow = np.clip((np.arange(width // 2) - first) / (last - first), 0, 1)
    return inverse / scaling.factor * slow + inverse * (1 - slow)


def tables(config: Config, position, length: int):
    """cos and sin [R, B, T, 1, c / 2] float32: of the model's positions, of its local ones where they differ, and of
    none (angle 0) where a layer has none.

    Args:
      config: the model.
      position: [B, T] int32.
      length: see ``frequencies``.
    """
    kinds = [frequencies(config.rope_width, config.rope_base, config.rope_scaling, length)]
    if config.local_rope_base is not None:
        kinds.append(frequencies(config.rope_width, config.local_rope_base, None, length))
    if not all(config.rope_layers):
        kinds.append((np.zeros(config.rope_width // 2, np.float32), 1.0))
    angle = jnp.einsum("bt,rc->rbtc", position.astype(jnp.float32), np.stack([f for f, _ in kinds]))[:, :, :, None]
    factor = np.float32([a for _, a in kinds]).reshape(-1, 1, 1, 1, 1)
    return factor * jnp.cos(angle), factor * jnp.sin(angle)


def of_layers(config: Config):
    """Which table each layer takes: int32 [L], or None when all take the first."""
    local, none = 0, 0
    if config.local_rope_base is not None:
        local, none = 1, 1
    choice = [local if window else 0 for window in config.windows] or [0] * config.layers
    choice = [c if has else none + 1 for c, has in zip(choice, config.rope_layers or (True,) * config.layers)]
    return np.int32(choice) if any(choice) else None


def rotate(x, rotation, interleaved: bool):
    """Turns the front of every head [B, T, h, c] by (cos, sin) [B, T, 1, r / 2]; what is behind r stays.

    Pairs are (i, i + r / 2), the convention of most Hugging Face checkpoints, or (2i, 2i + 1) when interleaved.
    """
    cos, sin = rotation
    width = 2 * cos.shape[-1]
    front, rest = x[..., :width].astype(jnp.float32), x[..., width:]
    if interleaved:
        a, b = front[..., ::2], front[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(front.shape)
    else:
        a, b = jnp.split(front, 2, -1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    return jnp.concatenate([turned.astype(x.dtype), rest], -1) if rest.shape[-1] else turned.astype(x.dtype)
