"""A program for ``test_memory.py``: reads and writes large folders, prints the peak of memory of each as a JSON line.

python memory_of_loading.py FOLDER
"""

import json
import pathlib
import shutil
import sys
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pt_jax import models
from pt_jax.models import families, huggingface, parameters, tensors
from pt_jax.training import sharding

SIZES = {"width": 1024, "heads": 8, "kv_heads": 4, "head_width": 128, "hidden": 4096, "tied": False}
LARGE = models.Config(vocab=30_000, layers=2, **SIZES)
DEEP = models.Config(vocab=5000, layers=5, **SIZES)
SMALL = models.Config(vocab=64, layers=2, width=16, heads=8, kv_heads=4, head_width=16, hidden=32, tied=False)
PLACES = {"default": None, "mesh": partial(sharding.by_name, mesh=sharding.make_mesh(1, 8, 1))}
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def write(folder, config, dtype):
    """A folder of zeros in several shards, whose largest tensors are embedding and unembedding."""
    folder.mkdir()
    family, shapes = families.FAMILIES[config.family], parameters.shapes(config)
    named = {family.whole[leaf]: shape for leaf, shape in shapes.items() if leaf != "layers"}
    named |= {part.name: huggingface._on_disk(part.tensor, part.shapes) for part in family.parts(config)}
    made = [tensors.Made(name, shape, dtype, partial(np.ones, shape, dtype)) for name, shape in named.items()]
    tensors.write(folder, made, shard=sum(x.size for x in made) // 3)
    (folder / "config.json").write_text(json.dumps(huggingface.to_json(config, str(dtype))))
    return max(x.size for x in made)


def resident(field):
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def peak_of(run):
    """The largest memory of this process while it runs, above what it had before, and what it returns."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    out = run()
    return resident("VmHWM") - before, out


def report(case, peak, params, largest=0):
    arrays = jax.tree.leaves(params)
    print(json.dumps({
        "case": case,
        "peak": peak,
        "largest": largest,
        "placed": sum(shard.data.nbytes for x in arrays for shard in x.addressable_shards),
        "parameters": sum(x.nbytes for x in arrays),
        "devices": max(len(x.addressable_shards) for x in arrays),
    }), flush=True)  # fmt: skip


def loaded(root, of_file, *dtypes):
    largest = write(root / of_file, LARGE, DTYPES[of_file])
    for dtype in dtypes:
        for name, place in PLACES.items():
            peak, (params, _) = peak_of(partial(models.load, root / of_file, dtype=DTYPES[dtype], place=place))
            report(f"load {of_file} to {dtype}, {name}", peak, params, largest)
            del params
    shutil.rmtree(root / of_file)


def saved(root, name):
    shapes, place = jax.eval_shape(partial(models.init, DEEP, jax.random.key(0))), PLACES[name]
    zeros = partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    params = jax.block_until_ready(jax.jit(zeros, out_shardings=place and place(shapes))())
    peak, _ = peak_of(partial(models.save, root / f"saved {name}", params, DEEP))
    report(f"save, {name}", peak, params)


def main(root):
    write(root / "small", SMALL, DTYPES["float32"])
    for name, place in PLACES.items():  # what is needed in any case: libraries, a compiler
        for dtype in DTYPES.values():
            params, config = models.load(root / "small", dtype=dtype, place=place)
        models.save(root / f"small {name}", params, config)
    loaded(root, "float32", "float32", "bfloat16")
    loaded(root, "bfloat16", "float32")
    for name in PLACES:
        saved(root, name)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
