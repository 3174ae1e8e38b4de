"""One of several processes, started by tests/training/test_processes.py: what it does is its first argument.

Usage: several_processes.py WHAT PORT PROCESSES PROCESS_ID [FOLDER]. Each has 8 / PROCESSES simulated devices.
"""

import dataclasses
import errno
import json
import os
import pathlib
import resource
import signal
import sys
import time
from functools import partial

what, port, count, me = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
folder = pathlib.Path(sys.argv[5]) if len(sys.argv) > 5 else None
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8 // count)

import numpy as np  # noqa: E402
import optax  # noqa: E402

from pt_jax import models, weights  # noqa: E402
from pt_jax.recipes import sft  # noqa: E402
from pt_jax.training import checkpoints, distributed, init_state, make_train_step, sharding  # noqa: E402

CONFIG = models.Config(vocab=32, layers=2, width=16, heads=4, kv_heads=2, head_width=4, hidden=24)
HEARTBEAT = 4.0
ROWS, COLUMNS = 16, 8


def said(**what):
    print("SAID " + json.dumps(what), flush=True)


def batch_of(step, rows):
    """The rows of a batch that are asked for, as a data set would be read; weights are of the whole batch."""
    rng = np.random.default_rng(step)
    lengths = rng.integers(2, COLUMNS + 1, ROWS)
    seen = np.arange(COLUMNS) < lengths[:, None]
    mask = seen & (np.arange(COLUMNS) > 0)
    tokens = rng.integers(0, 32, seen.shape).astype(np.int32)
    batch = {"tokens": tokens, "seen": seen, "mask": mask, "weights": np.asarray(weights.token_mean(mask))}
    return {name: x[rows] for name, x in batch.items()}


def prepared(**axes):
    mesh = sharding.make_mesh(**axes)
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2))
    state = init_state(models.init(CONFIG, jax.random.key(0)), optimizer, jax.random.key(1))
    layout = sharding.by_name(state, mesh)
    loss_fn = sharding.within(mesh, sft.make_loss(models.bind(CONFIG).apply))
    step = make_train_step(loss_fn, optimizer, microbatches=2, shardings=layout)
    return mesh, layout, sharding.place(state, layout), step


def trained(state, step, mesh, steps):
    losses, rows = [], distributed.rows_here(sharding.rows(mesh), ROWS)
    for i in range(*steps):
        shardings = sharding.of_batch(batch_of(i, np.arange(ROWS)), mesh)
        state, metrics = step(state, None, distributed.from_rows(batch_of(i, rows), shardings, ROWS))
        losses.append(float(metrics["loss"]))
    return state, losses


def train():
    """On two meshes whose axes cross the processes: one splits rows and weights, one the tokens of rows."""
    for name, axes in {"fsdp": {"fsdp": 8}, "context": {"context": 8}}.items():
        mesh, _, state, step = prepared(**axes)
        state, losses = trained(state, step, mesh, (0, 2))
        rows = distributed.rows_here(sharding.rows(mesh), ROWS).tolist()
        said(mesh=name, losses=losses, rows=rows)
        written(folder / f"{name}{count}.npz", state)


def written(file, state):
    """The numbers of a state, by process 0."""
    import jax.tree_util as tree

    numbers = distributed.fetched((state.params, state.opt_state))
    if me == 0:
        np.savez(file, **{tree.keystr(path): x for path, x in tree.tree_leaves_with_path(numbers)})


def begin():
    """Two steps, a checkpoint, and two more."""
    mesh, _, state, step = prepared(fsdp=8)
    state, losses = trained(state, step, mesh, (0, 2))
    written(folder / f"saved{count}.npz", state)
    with checkpoints.Checkpoints(folder / f"saved{count}") as saved:
        saved.save(2, state)
        state, more = trained(state, step, mesh, (2, 4))
    said(losses=losses + more)
    written(folder / f"straight{count}.npz", state)


def go_on():
    """From the checkpoint of however many processes, to the end."""
    mesh, layout, state, step = prepared(fsdp=8)
    like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, layout)
    for other in (1, 2):
        with checkpoints.Checkpoints(folder / f"saved{other}") as saved:
            number = saved.newest()
            distributed.same(step=number)
            state = saved.restore(number, like)
        written(folder / f"read{other}by{count}.npz", state)
        state, losses = trained(state, step, mesh, (number, 4))
        said(of=other, number=number, losses=losses)
        written(folder / f"of{other}on{count}.npz", state)


def fault():
    """Sums over all devices until something happens to a process; the name of the folder says to which, and what."""
    who, kind = folder.name.split("-")
    mesh = sharding.make_mesh(fsdp=8)
    x = sharding.place(np.ones(8, np.float32), sharding.rows(mesh))
    add = jax.jit(lambda x: x + x.sum() / 1000)
    for i in range(2000):
        x = jax.block_until_ready(add(x))
        if i == 20:
            (folder / f"ready{me}").write_text(str(os.getpid()))
        if i > 20 and int(who) == me and kind == "raise":
            raise ValueError("row 7 is bad, on this process alone")
        time.sleep(0.05)


def unwritten():
    """Four checkpoints: process 1 cannot write its part of the first, nor process 0 the manifest of the second."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    whole = {"embed": np.random.default_rng(0).normal(size=(512, 512)).astype(np.float32)}
    state = sharding.place(whole, sharding.by_name(whole, sharding.make_mesh(fsdp=8)))
    told, write = [], checkpoints.manifests.write

    def full(path):
        if path.name == "2":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path)

    checkpoints.manifests.write = full
    with checkpoints.Checkpoints(folder / "saved", failed=told.append) as saved:
        for number in (1, 2, 3, 4):
            most = 100_000 if (me, number) == (1, 1) else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
            saved.save(number, state)
            if number == 1:
                saved.wait()
    said(told=[sentence.partition(" was not written: ")[2].partition(";")[0] for sentence in told])
    said(whole=checkpoints.complete(folder / "saved"), left=sorted(path.name for path in (folder / "saved").iterdir()))
    try:
        with checkpoints.Checkpoints(folder / "raised") as saved:
            saved.save(2, state)
    except OSError as e:
        said(raised="process 0 of 2: No space left on device" in str(e))


def midway():
    """A checkpoint that process 1 does not even begin, while process 0 waits for it among its devices."""
    state = sharding.place(np.ones(8, np.float32), sharding.rows(sharding.make_mesh(fsdp=8)))
    checkpoints._COME = 2
    if me == 1:
        checkpoints._manager = lambda *_: (folder / "file" / "x").mkdir()
        (folder / "file").write_text("")
    with checkpoints.Checkpoints(folder / "saved", failed=lambda sentence: None) as saved:
        saved.save(1, state)


def diverge():
    """An error of all, which process 0 alone has to write something about."""
    try:
        raise FloatingPointError("the loss of step 3 is nan")
    except FloatingPointError:
        if me == 0:
            time.sleep(2 * HEARTBEAT)
            (folder / "batch").write_text("whole")
        raise


def write():
    """A model of which no device and no host is to have more than a layer of a weight, or so many bytes, at a time."""
    config = dataclasses.replace(CONFIG, family="", experts=8, experts_per_token=2, expert_hidden=24)
    whole = models.init(config, jax.random.key(0))
    if me == 0:
        models.save(folder / "expected", whole, config)
    distributed.PIECE = 512
    sizes, brought = [], distributed._brought
    distributed._brought = lambda *a: [y := brought(*a), sizes.append(y.nbytes)][0]
    layer = max(x[0].nbytes for x in jax.tree.leaves(whole["layers"]))
    for name, axes in {"fsdp": {"fsdp": 8}, "tensor": {"tensor": 2, "data": 4}, "expert": {"expert": 8}}.items():
        params = sharding.place(whole, sharding.by_name(whole, sharding.make_mesh(**axes)))
        sizes.clear()
        distributed.written(partial(models.save, folder / name, config=config), params)
        said(mesh=name, pieces=len(sizes), least=max(sizes) <= layer)


def read():
    """A model folder, each weight to the devices that will hold it."""
    from pt_jax.models import tensors

    counts, one = [], tensors._read
    tensors._read = lambda f, begin, data: counts.append(data.nbytes) or one(f, begin, data)
    for name, axes in {"fsdp": {"fsdp": 8}, "tensor": {"tensor": 2, "data": 4}, "expert": {"expert": 8}}.items():
        counts.clear()
        model = folder / ("mixture" if name == "expert" else "dense")
        params, _ = models.load(model, place=partial(sharding.by_name, mesh=sharding.make_mesh(**axes)))
        said(mesh=name, share=sum(counts) / (model / "model.safetensors").stat().st_size)
        numbers = distributed.fetched(params)
        if me == 0:
            models.save(folder / f"{name}.read", numbers, models.huggingface.read_config(model))


def same():
    mine = {"config": CONFIG, "batch": (ROWS, COLUMNS), "step": 3}
    distributed.same(**mine)
    stop = distributed.agreed(lambda step: "SIGTERM" if (me, step) == (1, 4) else None, every=2)
    said(stopped=[stop(step) for step in range(6)])
    for i in range(20):
        heard = distributed.everybodys(f"{me} says {i}")
        assert heard == [f"{j} says {i}" for j in range(count)]
    kept = distributed._client().key_value_dir_get("pt_jax/turn/")
    said(kept=len(kept) <= 2 * count)  # of this turn, and of the one before it or the next
    for other in (
        {"batch": (ROWS, 8 + 4 * me)},
        {"config": dataclasses.replace(CONFIG, vocab=32 + me)},
        {"step": 3 + me},
    ):
        try:
            distributed.same(**mine | other)
        except ValueError as e:
            said(error=str(e))


if __name__ == "__main__":
    every = (train, fault, same, begin, go_on, read, unwritten, midway, diverge, write)
    do = next(do for do in every if do.__name__ == what)
    if count == 1:
        do()
    else:
        # where nobody is to fail, a machine that is busy with other things for a while is no reason to
        soon = {"heartbeat": HEARTBEAT} if what in ("fault", "midway", "diverge") else {}
        with distributed.joined(f"localhost:{port}", count, me, **soon):
            do()
