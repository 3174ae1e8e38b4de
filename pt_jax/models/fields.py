"""What the fields of a config.json mean that many families share: activations, rotary positions, windows.

Reading is strict: a value that this decoder would compute differently is refused by name.
"""

import math
from collections.abc import Callable

from pt_jax.models.config import Config, RopeScaling


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


ALIASES = {"phi3": {"su": "longrope", "yarn": "longrope"}}  # old names of a kind, of files of a family


def rope(fields: Fields, *, partial: bool) -> dict:
    """Rotary positions, from the fields of transformers 5 (``rope_parameters``) or 4 (``rope_theta`` and others).

    Args:
      fields: of config.json. ``rope_scaling`` comes before ``rope_parameters``, as in transformers: people add it.
      partial: whether the family rotates a share of a head; the others' classes pass over that field.
    """
    given, scaling = fields.get("rope_parameters") or {}, fields.get("rope_scaling") or {}
    if "full_attention" in given:
        local = Fields(given.get("sliding_attention") or {}, f"{fields.file}: rope_parameters: sliding_attention")
        for name in ("rope_type", "type"):
            local.must_be(name, "default")
        given = given["full_attention"] | scaling
    elif scaling or not given:
        theta = fields.get("rope_theta") or 10_000.0
        if "rope_theta" not in scaling and given.get("rope_theta", theta) != theta:
            raise ValueError(
                f"{fields.file}: rope_scaling comes before rope_parameters and has no rope_theta, which there is "
                f"{given['rope_theta']}; write it into rope_scaling too"
            )
        given = {"rope_theta": theta} | scaling
    given = Fields(given, f"{fields.file}: rope_parameters")
    kind = given.get("rope_type", given.get("type", "default"))
    kind = ALIASES.get(fields.get("model_type"), {}).get(kind, kind)
    given.setdefault("partial_rotary_factor", fields.get("partial_rotary_factor"))
    if not partial:
        given.must_be("partial_rotary_factor", 1)
    return {
        "rope_base": float(given.need("rope_theta")),
        "rope_fraction": float(given["partial_rotary_factor"] or 1),
        "rope_scaling": _scaling(kind, given, fields),
    }


def _scaling(kind, given, fields):
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(given.need("factor")))
    if kind == "dynamic":
        return RopeScaling("dynamic", float(given.need("factor")), fields.need("max_position_embeddings"))
    name = "original_max_position_embeddings"  # beside rope_parameters it counts before the one within
    original = fields.get(name) or given.get(name) or fields.need("max_position_embeddings")
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
    known = "'default', 'linear', 'dynamic', 'llama3', 'yarn' and 'longrope'"
    raise ValueError(f"{given.file}: rope_type is {kind!r}; only {known} are computed")


def rope_fields(config: Config, *, partial: bool) -> dict:
    """The inverse of ``rope``, for transformers 5, with ``rope_theta`` for those who still read that."""
    out = {"rope_type": "default", "rope_theta": config.rope_base}
    if partial and config.rope_fraction != 1:
        out["partial_rotary_factor"] = config.rope_fraction
    scaling = config.rope_scaling
    if scaling is not None:
        out |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind not in ("linear", "dynamic"):
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
    if len(kinds) != layers:
        raise ValueError(f"{fields.file}: layer_types has {len(kinds)} entries for {layers} layers")
    if "sliding_attention" not in kinds:
        return ()
    window = fields.need("sliding_window")
    if window < 1:
        raise ValueError(f"{fields.file}: sliding_window is {window}; a token sees itself at least, so 1 is the least")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def window_fields(config: Config) -> dict:
    if not any(config.windows):
        return {"sliding_window": None}
    kinds = ["sliding_attention" if window else "full_attention" for window in config.windows]
    return {"sliding_window": max(config.windows), "layer_types": kinds}
