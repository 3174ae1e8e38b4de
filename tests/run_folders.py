"""What the folders of training commands hold, and whether two of them hold the same."""

import jax
import numpy as np

from pt_jax.training import checkpoints


def steps_of(folder):
    return checkpoints.complete(folder / "checkpoints")


def state_of(folder, step=None):
    """Every array of a checkpoint, the last one's when no step is given, by name."""
    path = folder / "checkpoints" / str(steps_of(folder)[-1] if step is None else step)
    wanted = {}
    for name, words in checkpoints.read_meta(path)["spec"].items():
        kind, _, shape = words[:-1].partition("[")
        kind = jax.random.key(0).dtype if kind.startswith("key") else np.dtype(kind)
        wanted[name] = jax.ShapeDtypeStruct(tuple(map(int, filter(None, shape.split(",")))), kind)
    raw = lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return {name: np.asarray(raw(x)) for name, x in checkpoints.restore(path, wanted).items()}


def same_states(one, two, step=None):
    states = state_of(one, step), state_of(two, step)
    assert states[0].keys() == states[1].keys() and len(states[0]) > 20
    for name, x in states[0].items():
        np.testing.assert_array_equal(x, states[1][name], name)


def same_runs(one, two):
    """Their last states, logs and models, to the last bit."""
    same_states(one, two)
    for name in ("metrics.jsonl", *(["samples.jsonl"] if (one / "samples.jsonl").exists() else [])):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    weights = next(p.name for p in one.glob("*.safetensors"))
    assert (one / weights).read_bytes() == (two / weights).read_bytes()
