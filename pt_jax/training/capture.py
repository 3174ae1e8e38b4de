"""A step put into a folder, to be replayed offline, and the first stage at which two such steps part.

    stages = jax.jit(make_stages(loss_fn, optimizer, microbatches=2))       # as make_train_step's
    capture.record("steps/7", stages, state, frozen, batch)                # before the train step consumes the state
    capture.replay("steps/7", stages, like=state, frozen=frozen)           # [] or where it is another step now
    print(capture.report(capture.compare("steps/7", "elsewhere/7")))       # also ``pt-jax replay``

A folder has the arrays of every stage as they were, bit for bit, and in capture.json their names, types, shapes and
checksums, and the versions and the device of the run. Of what is frozen only the checksums are kept.
"""

import json
import math
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from flax import traverse_util

from pt_jax import folders
from pt_jax.training import specs

INPUTS = ("batch", "frozen", "before")
STAGES = (*INPUTS, "metrics", "gradients", "updates", "after")  # in the order in which a step does them
FORMAT = 1


class Divergence(NamedTuple):
    """An array that two steps do not share.

    Args:
      stage: of ``STAGES``.
      name: the path of the array.
      what: how they differ, in words.
    """

    stage: str
    name: str
    what: str


def record(folder, stages, state, frozen, batch, *, overwrite=False) -> None:
    """Does a step and puts all of it into a folder, which appears whole.

    Args:
      folder: a new one, unless ``overwrite``.
      stages: of ``make_stages``, jitted.
      state: the state before the step; it is not consumed.
      frozen, batch: what the step takes beside it. The batch is a dict of arrays, or of such dicts.

    Raises:
      ValueError: the folder is there already.
    """
    trees = _trees(stages, state, frozen, batch)
    with folders.appear_whole(folder, overwrite=overwrite) as fresh:
        noted = {stage: _written(fresh, stage, trees[stage]) for stage in STAGES}
        about = {"format": FORMAT, "step": int(state.step), "device": jax.devices()[0].device_kind}
        about |= {"versions": {"jax": jax.__version__, "numpy": np.__version__}, "stages": noted}
        (fresh / "capture.json").write_text(json.dumps(about, indent=1))


def recording(train_step, stages, folder, steps):
    """A train step that records these steps (from 0) on its way, each in ``folder``/number, which is replaced.

    Args:
      train_step: of ``make_train_step``.
      stages: of ``make_stages`` with the same arguments, jitted.
      folder: for the folders of the steps.
      steps: their numbers.

    Returns:
      ``(state, frozen, batch) -> (state, metrics)``, to the last bit the train step's.
    """
    at = None

    def step(state, frozen, batch):
        nonlocal at
        at = int(state.step) if at is None else at + 1  # to ask each time would make the device wait
        if at in steps:
            record(pathlib.Path(folder) / str(at), stages, state, frozen, batch, overwrite=True)
        return train_step(state, frozen, batch)

    step.lower = train_step.lower
    return step


def load(folder, like):
    """The state and the batch of a recorded step, to go on from.

    Args:
      folder: of ``record``.
      like: a state of the same structure, types and shapes, as ``init_state`` makes it; ``jax.eval_shape`` of it does.

    Returns:
      (state, batch).

    Raises:
      ValueError: the folder is no record of a step, is damaged, or has a state of another kind.
    """
    about = _about(folder)
    said = specs.difference({name: x["spec"] for name, x in about["stages"]["before"].items()}, specs.spec(like))
    if said:
        raise ValueError(f"{folder}: has another state: {said}")
    noted = about["stages"]["before"]
    whole = lambda name, x: jax.random.wrap_key_data(x, impl=impl) if (impl := noted[name]["key"]) else jnp.asarray(x)
    state = specs.unflat({name: whole(name, x) for name, x in _read(folder, about, "before").items()}, like)
    return state, traverse_util.unflatten_dict(_read(folder, about, "batch"), sep=".")


def replay(folder, stages, *, like, frozen) -> list[Divergence]:
    """Does a recorded step again and says where it is another one than it was.

    Args:
      folder: of ``record``.
      stages: of ``make_stages``, jitted: as it was, or as it is suspected to be.
      like: as ``load``.
      frozen: what was frozen; its checksums are compared.

    Returns:
      Every array that differs in the first stage that does; empty when all is the same to the last bit.

    Raises:
      ValueError: as ``load``.
    """
    state, batch = load(folder, like)
    about, trees = _about(folder), _trees(stages, state, frozen, batch)
    kept = lambda stage: (about["stages"][stage], None if stage == "frozen" else _read(folder, about, stage))
    return _first(lambda stage: _differences(stage, kept(stage), _noted(trees[stage])))


def compare(a, b) -> list[Divergence]:
    """Every array that differs in the first stage at which two recorded steps part; empty when there is none.

    Args:
      a, b: folders of ``record``.

    Raises:
      ValueError: a folder is no record of a step, or is damaged.
    """
    about = {folder: _about(folder) for folder in (a, b)}

    def kept(folder, stage):
        of = about[folder]
        return of["stages"][stage], None if stage == "frozen" else _read(folder, of, stage)

    return _first(lambda stage: _differences(stage, kept(a, stage), kept(b, stage)))


def report(divergences, most: int = 10) -> str:
    """In words.

    >>> report([])
    'the same step, to the last bit'
    >>> print(report([Divergence("before", "params.embed", "3 of 8 entries differ")]))
    parts at the stage before (3 of 8 entries differ in params.embed); the same until then: batch, frozen
    """
    if not divergences:
        return "the same step, to the last bit"
    stage = divergences[0].stage
    said = "; ".join(f"{x.what} in {x.name}" for x in divergences[:most])
    more = f"; and {len(divergences) - most} more arrays" if len(divergences) > most else ""
    before = STAGES[: STAGES.index(stage)]
    return f"parts at the stage {stage} ({said}{more})" + (
        f"; the same until then: {', '.join(before)}" if before else ""
    )


# ---- what a folder is made of


def _trees(stages, state, frozen, batch) -> dict:
    after, metrics, inner = stages(state, frozen, batch)
    of_loss = {name: x for name, x in metrics.items() if name not in ("grad_norm", "skipped")}  # the others come later
    trees = {"batch": batch, "frozen": frozen, "before": state, "metrics": of_loss, "after": after} | inner
    return {name: specs.flat(tree) for name, tree in trees.items()}


def _key(x) -> str | None:
    """The kind of a PRNG key; None of other arrays."""
    return str(jax.random.key_impl(x)) if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key) else None


def _raw(x) -> np.ndarray:
    """The bytes of an array: numpy's files have no bfloat16."""
    return np.frombuffer(x.tobytes(), np.uint8)


def _noted(leaves) -> tuple[dict, dict]:
    """What is written of every array in capture.json, and the arrays."""
    spec = specs.spec(leaves)
    arrays = {name: np.asarray(jax.random.key_data(x) if _key(x) else x) for name, x in leaves.items()}
    note = lambda name, x: {
        "spec": spec[name], "type": str(x.dtype), "shape": [*x.shape], "key": _key(leaves[name]),
        "xxh3_128": _digest(_raw(x)),
    }  # fmt: skip
    return {name: note(name, x) for name, x in arrays.items()}, arrays


def _digest(raw) -> str:
    return xxhash.xxh3_128(raw.tobytes()).hexdigest()


def _written(folder, stage, leaves) -> dict:
    noted, arrays = _noted(leaves)
    if stage != "frozen":
        np.savez(folder / f"{stage}.npz", **{name: _raw(x) for name, x in arrays.items()})
    return noted


def _about(folder) -> dict:
    path = pathlib.Path(folder) / "capture.json"
    if not path.is_file():
        raise ValueError(f"{folder}: has no capture.json; give a folder that a step was recorded in")
    about = json.loads(path.read_text())
    if about.get("format") != FORMAT:
        raise ValueError(f"{path}: is of format {about.get('format')}, this version reads {FORMAT}")
    return about


def _read(folder, about, stage) -> dict:
    with np.load(pathlib.Path(folder) / f"{stage}.npz") as file:
        raw = {name: file[name] for name in file.files}
    out = {}
    for name, noted in about["stages"][stage].items():
        if (
            name not in raw
            or xxhash.xxh3_128(raw[name].data if raw[name].size else b"").hexdigest() != noted["xxh3_128"]
        ):
            raise ValueError(f"{folder}: {name} of {stage}.npz is not what was recorded; the file is damaged")
        out[name] = np.frombuffer(raw[name].tobytes(), jnp.dtype(noted["type"])).reshape(noted["shape"])
    return out


# ---- where two steps part


def _first(differences) -> list[Divergence]:
    return next(filter(None, map(differences, STAGES)), [])


def _differences(stage, a, b) -> list[Divergence]:
    (noted_a, arrays_a), (noted_b, arrays_b) = a, b
    out = []
    for name in noted_a | noted_b:
        if name not in noted_a or name not in noted_b:
            out.append(Divergence(stage, name, f"it is only in the {'first' if name in noted_a else 'second'}"))
        elif noted_a[name]["spec"] != noted_b[name]["spec"]:
            out.append(Divergence(stage, name, f"{noted_a[name]['spec']} against {noted_b[name]['spec']}"))
        elif noted_a[name]["xxh3_128"] != noted_b[name]["xxh3_128"]:
            known = arrays_a is not None and arrays_b is not None
            what = _largest(arrays_a[name], arrays_b[name]) if known else "another checksum"
            out.append(Divergence(stage, name, what))
    return out


def _largest(a, b) -> str:
    """How many entries differ, and which two are furthest apart."""
    differs = (_raw(a).reshape(a.size, -1) != _raw(b).reshape(b.size, -1)).any(1)
    gap = np.abs(a.astype(np.float64) - b.astype(np.float64)).ravel()
    at = int(np.argmax(np.where(differs, np.where(np.isnan(gap), math.inf, gap), -1)))
    where = f" at {[int(i) for i in np.unravel_index(at, a.shape)]}" if a.ndim else ""
    return f"{differs.sum()} of {a.size} entries differ, the most {a.ravel()[at]!s} and {b.ravel()[at]!s}{where}"
