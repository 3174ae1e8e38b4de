"""A recorded step is replayed to the last bit, and the stage at which two steps part is named."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pt_jax.training import averages, capture, init_state, make_stages, make_train_step, optimizers

ADAM = optimizers.adamw(0.1, weight_decay=0.1)
PARAMS = {"embed": jnp.ones((4, 3)), "layers": {"w": jnp.full((3, 2), 0.5)}}


def loss_fn(params, frozen, batch, key, *, more=0.0, tilt=0.0):
    """``more`` changes the loss and no gradient, ``tilt`` the gradient and not the loss."""
    rows = params["embed"][batch["left"]["ids"]] + frozen["base"]
    noise = jax.random.normal(key, (2,))
    out = rows @ params["layers"]["w"] * batch["x"][:, None] + noise[None]
    bend = tilt * (params["layers"]["w"] - jax.lax.stop_gradient(params["layers"]["w"])).sum()
    return jnp.square(out).sum() + more + bend, {"rows": rows.sum(1), "count": jnp.int32(len(batch["x"]))}


def push(state, metrics):
    return state.replace(params=jax.tree.map(lambda x: x + 1, state.params))


@functools.cache
def stages(loss=loss_fn, optimizer=ADAM, after=()):
    return jax.jit(make_stages(loss, optimizer, microbatches=2, after=[averages.ema(0.9), *after]))


@functools.cache
def train_step():
    return make_train_step(loss_fn, ADAM, microbatches=2, after=[averages.ema(0.9)])


def new_state():
    return init_state(PARAMS, ADAM, jax.random.key(3), averages=PARAMS, extra={"half": jnp.bfloat16(0.5)})


def batch_of_step(i):
    rng = np.random.default_rng(i)
    return {"left": {"ids": rng.integers(0, 4, 6).astype(np.int32)}, "x": rng.normal(size=6).astype(np.float32)}


FROZEN = {"base": jnp.float32(0.25)}


def at_step(n):
    state = new_state()
    for i in range(n):
        state, _ = train_step()(state, FROZEN, batch_of_step(i))
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("capture") / "step"
    capture.record(path, stages(), at_step(2), FROZEN, batch_of_step(2))
    return path


def test_a_recorded_step_is_replayed_to_the_last_bit(folder):
    assert capture.replay(folder, stages(), like=new_state(), frozen=FROZEN) == []


def test_it_is_the_step_that_the_run_took(folder):
    """On this machine the two programs, with and without the stages, round alike."""
    after, metrics = train_step()(at_step(2), FROZEN, batch_of_step(2))
    arrays = {stage: np.load(folder / f"{stage}.npz") for stage in ("after", "metrics")}
    for name, x in {"params.embed": after.params["embed"], "averages.layers.w": after.averages["layers"]["w"]}.items():
        np.testing.assert_array_equal(arrays["after"][name].view(np.float32), np.asarray(x).ravel())
    np.testing.assert_array_equal(arrays["metrics"]["rows"].view(np.float32), metrics["rows"])


def test_the_state_and_the_batch_come_back_as_they_were(folder):
    state, batch = capture.load(folder, jax.eval_shape(new_state))
    plain = lambda tree: jax.tree.map(
        lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tree
    )
    jax.tree.map(np.testing.assert_array_equal, plain(state), plain(at_step(2)))
    jax.tree.map(np.testing.assert_array_equal, batch, batch_of_step(2))
    assert state.extra["half"].dtype == jnp.bfloat16 and batch["left"]["ids"].dtype == np.int32


def changed(tree, path):
    """With the last entry of one array another one, by a last digit."""

    def one(at, x):
        if jax.tree_util.keystr(at, simple=True, separator=".") != path:
            return x
        x = np.array(x)
        x.ravel()[-1] = np.nextafter(x.ravel()[-1], np.float32(9)) if x.dtype == np.float32 else x.ravel()[-1] ^ 1
        return x

    return jax.tree_util.tree_map_with_path(one, tree)


PLANTED = {
    "batch": ({"batch": lambda x: changed(x, "left.ids")}, "left.ids"),
    "frozen": ({"frozen": lambda x: changed(x, "base")}, "base"),
    "before": ({"state": lambda x: x.replace(params=changed(x.params, "layers.w"))}, "params.layers.w"),
    "metrics": ({"stages": lambda _: stages(functools.partial(loss_fn, more=1.0))}, "loss"),
    "gradients": ({"stages": lambda _: stages(functools.partial(loss_fn, tilt=1e-4))}, "layers.w"),
    "updates": ({"stages": lambda _: stages(optimizer=optimizers.adamw(0.1, weight_decay=0.2))}, "embed"),
    "after": ({"stages": lambda _: stages(after=(push,))}, "params.embed"),
}


@pytest.mark.parametrize("stage", capture.STAGES)
def test_the_first_stage_that_differs_is_named(folder, tmp_path, stage):
    """One array of one stage is another one; what follows from it is not blamed."""
    change, name = PLANTED[stage]
    given = {"stages": stages(), "state": at_step(2), "frozen": FROZEN, "batch": batch_of_step(2)}
    given |= {what: make(given[what]) for what, make in change.items()}
    capture.record(tmp_path / "other", **given)
    found = capture.compare(folder, tmp_path / "other")
    assert {x.stage for x in found} == {stage} and name in {x.name for x in found}
    if stage not in ("after", "updates", "metrics"):
        assert [x.name for x in found] == [name]
    said = capture.report(found)
    assert said.startswith(f"parts at the stage {stage} (")
    before = capture.STAGES[: capture.STAGES.index(stage)]
    assert said.endswith(f"until then: {', '.join(before)}") == bool(before)
    if "stages" in change:
        assert capture.replay(folder, given["stages"], like=new_state(), frozen=FROZEN) == found
    if stage == "frozen":
        assert capture.replay(folder, stages(), like=new_state(), frozen=given["frozen"]) == found


def test_two_records_of_one_step_are_the_same(folder, tmp_path):
    capture.record(tmp_path / "again", stages(), at_step(2), FROZEN, batch_of_step(2))
    assert capture.compare(folder, tmp_path / "again") == []


def test_how_far_two_arrays_are_apart_is_said(folder, tmp_path):
    """Also where one of them is not a number, which is further than any number."""
    batch = batch_of_step(2)
    batch["x"][1], batch["x"][4] = batch["x"][1] + 5, np.nan
    capture.record(tmp_path / "other", stages(), at_step(2), FROZEN, batch)
    (found,) = capture.compare(folder, tmp_path / "other")
    assert found.what.startswith("2 of 6 entries differ, the most ") and found.what.endswith(" and nan at [4]")


def test_an_array_that_only_one_has_or_of_another_shape_is_named(folder, tmp_path):
    batch = {name: jax.tree.map(lambda x: x[:4], x) for name, x in batch_of_step(2).items()} | {"y": np.zeros(4)}
    capture.record(tmp_path / "other", stages(), at_step(2), FROZEN, batch)
    assert {x.name: x.what for x in capture.compare(folder, tmp_path / "other")} == {
        "left.ids": "int32[6] against int32[4]", "x": "float32[6] against float32[4]", "y": "it is only in the second",
    }  # fmt: skip


def test_the_steps_that_are_asked_for_are_recorded_and_the_run_is_the_same(tmp_path):
    step, state = capture.recording(train_step(), stages(), tmp_path, {1, 3}), at_step(1)
    for i in range(1, 5):
        state, _ = step(state, FROZEN, batch_of_step(i))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "3"]
    assert json.loads((tmp_path / "3" / "capture.json").read_text())["step"] == 3
    jax.tree.map(np.testing.assert_array_equal, state.params, at_step(5).params)
    assert capture.replay(tmp_path / "3", stages(), like=new_state(), frozen=FROZEN) == []


@pytest.mark.parametrize("file", ["batch.npz", "gradients.npz"])
def test_a_damaged_record_is_named(folder, tmp_path, file):
    capture.record(tmp_path / "bad", stages(), at_step(2), FROZEN, batch_of_step(2))
    arrays = dict(np.load(tmp_path / "bad" / file))
    name = sorted(arrays)[0]
    arrays[name][-1] ^= 1
    np.savez(tmp_path / "bad" / file, **arrays)
    with pytest.raises(ValueError, match=f"{name} of {file} is not what was recorded; the file is damaged"):
        capture.compare(folder, tmp_path / "bad")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda folder: capture.compare(folder, folder.parent), "has no capture.json; give a folder that a step"),
        (lambda folder: capture.record(folder, stages(), at_step(2), FROZEN, batch_of_step(2)),
         "exists and is not empty"),
        (lambda folder: capture.load(folder, new_state().replace(averages=None)), "has another state: .*averages"),
        (lambda folder: capture.load(folder, init_state({"w": jnp.ones(2)}, ADAM, jax.random.key(0))),
         "has another state: "),
    ],
)  # fmt: skip
def test_bad_input_gets_a_sentence(folder, call, message):
    with pytest.raises(ValueError, match=message):
        call(folder)


def test_every_field_of_a_state_is_recorded(folder):
    noted = json.loads((folder / "capture.json").read_text())["stages"]["before"]
    present = {field.name for field in dataclasses.fields(new_state())} - {"reference"}
    assert {name.split(".")[0] for name in noted} == present
