"""``pt-jax inspect``: what a model folder holds, from its config.json and the headers of its weights alone."""

import dataclasses
import math
from functools import partial

import jax
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from tyro.conf import Positional

from pt_jax.models import families, huggingface, init_cache, lora, parameters, quantize
from pt_jax.models.tensors import DTYPES
from pt_jax.tracking.tables import table
from pt_jax.training import init_state, sharding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect:
    """Shows a model's sizes, its memory, and what an adapter would train, without loading its weights.

    Args:
      model: model folder, or the name of a model in the cache of the Hugging Face hub.
      lora_rank: rank of the adapter to look at.
      lora_targets: patterns of the products that it adapts, such as wq "w[kv]" "expert_*"; all but experts by default.
      dora: whether it is DoRA, which trains the norms of the outputs too.
      data, fsdp, tensor, context, expert: devices of a mesh, whether they are there or not: shows what would lie where
        when all weights are trained with Adam, and how many bytes on each device.
    """

    model: Positional[str]
    lora_rank: int | None = None
    lora_targets: tuple[str, ...] | None = None
    dora: bool = False
    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    expert: int = 1

    def adapter(self) -> lora.Adapter | None:
        if self.lora_rank is None:
            if self.lora_targets or self.dora:
                raise ValueError("--lora-targets and --dora need --lora-rank")
            return None
        return lora.Adapter(rank=self.lora_rank, targets=self.lora_targets, dora=self.dora)


def run(options: Inspect) -> dict:
    """Prints the tables, and returns what is in them; see ``examine``."""
    from rich.console import Console

    found = examine(options.model, options.adapter())
    console = Console()
    mesh = sharding.planned_mesh(**{axis: getattr(options, axis) for axis in sharding.AXES})
    for each in [*tables(options.model, found), *([on_mesh(options.model, mesh)] if mesh.size > 1 else [])]:
        console.print(each)
    return found


def on_mesh(path, mesh):
    """The table of what lives where on a mesh (``sharding.table``) when all weights of a folder are trained with Adam.

    Raises:
      ValueError: the folder cannot be loaded, or an axis of the mesh does not divide what it would split.
    """
    config, _ = huggingface.opened(huggingface.local(path, download=False))
    params = _arrays(flatten_dict(parameters.shapes(config)), "float32")
    state = jax.eval_shape(lambda params: init_state(params, optax.adam(0.0), jax.random.key(0)), params)
    return sharding.table(state, mesh)


def examine(path, adapter: lora.Adapter | None = None) -> dict:
    """What a folder holds; no numbers of a tensor are read.

    The folder is checked as ``models.load`` does: every tensor that the config asks for is there, in its shape, none is
    left over, and no file is cut off.

    Args:
      path: as of ``models.load``, but nothing is downloaded.
      adapter: or None.

    Returns:
      Fields of the config by name, and: ``files``; ``parameters``, ``active`` (that a token goes through) and
      ``embeddings``, numbers of parameters; ``disk``, bytes of the files by type; ``memory``, bytes of the parameters
      by the type that they are loaded as; ``cache``, bytes that 1000 tokens take in the cache, by type;
      ``trained``, numbers of parameters of the adapter by leaf.

    Raises:
      ValueError: the folder cannot be loaded, or a target of the adapter matches nothing.
    """
    config, tensors = huggingface.opened(huggingface.local(path, download=False))
    shapes = parameters.shapes(config)
    leaves = flatten_dict(shapes)
    sizes = {leaf: math.prod(shape) for leaf, shape in leaves.items()}
    experts = sum(size for leaf, size in sizes.items() if leaf[-1].startswith("expert_"))
    total = sum(sizes.values())
    embeddings = sum(size for leaf, size in sizes.items() if leaf[-1] in ("embed", "unembed", "positions"))
    found = {
        "family": config.family,
        "class": families.FAMILIES[config.family].classifier if config.head == "score" else
                 families.FAMILIES[config.family].architecture,
        "files": len({entry.file for entry in tensors.where.values()}),
        "parameters": total,
        "active": total - experts + (experts * config.experts_per_token // config.experts if experts else 0),
        "embeddings": embeddings,
        "disk": _on_disk(tensors),
        "memory": _as_loaded(leaves),
        "cache": {dtype: _cache(config, dtype) for dtype in ("float32", "bfloat16", "int8")},
    }  # fmt: skip
    if adapter is not None:
        new = jax.eval_shape(partial(lora.init, how=adapter), jax.random.key(0), _arrays(leaves, "float32"))
        trained = {}
        for leaf, array in flatten_dict(new).items():
            name = ".".join(leaf[:-1])
            trained[name] = trained.get(name, 0) + array.size
        found["trained"] = trained
    return dataclasses.asdict(config) | found


def _on_disk(tensors):
    """Bytes of the files by type; a matrix that is there twice, though it is tied, counts twice."""
    out = {}
    for entry in tensors.where.values():
        name = np.dtype(DTYPES[entry.dtype]).name if entry.dtype in DTYPES else entry.dtype
        out[name] = out.get(name, 0) + entry.end - entry.begin
    return out


def _arrays(leaves, dtype):
    of = lambda leaf, shape: jax.ShapeDtypeStruct(shape, parameters.type_of(leaf[-1], np.dtype(dtype)))
    return unflatten_dict({leaf: of(leaf, shape) for leaf, shape in leaves.items()})


def _bytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _as_loaded(leaves):
    """Bytes of the parameters, by type; where products are quantised, what is not is bfloat16."""
    out = {dtype: _bytes(_arrays(leaves, dtype)) for dtype in ("float32", "bfloat16")}
    for how in (quantize.int8, quantize.nf4, quantize.nf4_double):
        small = jax.eval_shape(partial(quantize.quantize, how=how), _arrays(leaves, "bfloat16"))
        out[how.__name__] = _bytes(small)
    return out


def _cache(config, dtype):
    """Bytes that 1000 tokens take in the cache, of which layers with a window keep the last."""
    of = lambda length: _bytes(jax.eval_shape(lambda: init_cache(config, 1, length, np.dtype(dtype))))
    return of(1000) - of(0)


def tables(name: str, found: dict) -> list:
    """What ``examine`` found, for the terminal."""
    out = [table(name, ["of the model", ""], _facts(found))]
    rows = [[f"files, {dtype}", _size(size)] for dtype, size in found["disk"].items()]
    rows += [[f"loaded as {how}", _size(size)] for how, size in found["memory"].items()]
    rows += [[f"cache of 1000 tokens, {dtype}", _size(size)] for dtype, size in found["cache"].items()]
    out.append(table("memory", ["of", "bytes"], rows))
    if "trained" in found:
        total = sum(found["trained"].values())
        rows = [[leaf, size, _share(size, found["parameters"])] for leaf, size in found["trained"].items()]
        rows.append(["together", total, _share(total, found["parameters"])])
        out.append(table("trained by the adapter", ["leaf", "parameters", "of the model's"], rows))
    return out


def _facts(found):
    windows = sorted({window for window in found["windows"] if window})
    rows = [
        ["family", found["family"]],
        ["class", found["class"]],
        ["parameters", found["parameters"]],
        ["of them embeddings", found["embeddings"]],
        ["layers", found["layers"]],
        ["width", found["width"]],
        ["heads, of queries", found["heads"]],
        ["heads, of keys and values", found["kv_heads"]],
        ["width of a head", found["head_width"]],
        ["hidden width", found["hidden"]],
        ["vocabulary", found["vocab"]],
        ["embeddings tied", found["tied"]],
        ["longest context", found["max_length"]],
        ["files of weights", found["files"]],
    ]
    if found["experts"]:
        rows[4:4] = [
            ["parameters a token goes through", found["active"]],
            ["experts a layer", found["experts"]],
            ["experts a token", found["experts_per_token"]],
            ["hidden width of an expert", found["expert_hidden"]],
        ]
    return rows + ([["windows", ", ".join(f"{window:,}" for window in windows)]] if windows else [])


def _size(count: float) -> str:
    """Bytes in the unit that leaves at most three digits before the point: powers of 1024."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1000 and len(units) > 1:
        count, units = count / 1024, units[1:]
    return f"{count:.0f} B" if units[0] == "B" else f"{count:.2f} {units[0]}"


def _share(part, whole) -> str:
    return f"{100 * part / whole:.3g}%"
