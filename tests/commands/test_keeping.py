"""What a run keeps on its way: checkpoints, bad batches, time, trackers, a profile."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from run_folders import state_of

from pt_jax import signals
from pt_jax.commands import fitting, grpo, keeping, sft
from pt_jax.recipes import sft as recipe
from pt_jax.tracking import metrics, sinks
from pt_jax.training import checkpoints, loop

pytestmark = pytest.mark.usefixtures("programs_are_kept")


@pytest.fixture(scope="module")
def options(folder, data):
    """(out, changes) -> those of a run of twelve steps."""
    given = {"model": str(folder), "data": data["completion"], "steps": 12, "learning_rate": 1e-2, "microbatches": 2}
    given |= {"batch_size": 16, "checkpoint_every": 3, "log_every": 5}
    return lambda out, **changes: sft.SFT(**given | {"out": str(out)} | changes)


def test_checkpoints_that_are_kept(options, tmp_path):
    changes = {"checkpoint_every": 2, "keep": 1, "keep_every": 4, "keep_best": "grad_norm"}
    sft.run(options(tmp_path / "out", **changes))
    of = {r["step"]: r["grad_norm"] for r in metrics.read(tmp_path / "out/metrics.jsonl") if r["step"] % 2 == 0}
    kept = checkpoints.complete(tmp_path / "out/checkpoints")
    assert set(kept) == {4, 8, 12, max(of, key=of.get)}


@pytest.mark.parametrize("metric", ["los", "eval_los"])
def test_a_metric_that_the_run_does_not_have_is_told_before_anything_is_compiled(
    options, data, tmp_path, monkeypatch, metric
):
    monkeypatch.setattr(fitting.Fit, "compile", lambda *_: pytest.fail("it compiles"))
    evaluated = {"eval_data": data["completion"], "eval_every": 3} if metric.startswith("eval") else {}
    names = "entropy, grad_norm, loss, mean_token_accuracy, num_tokens, skipped"
    names += ", eval_entropy, eval_loss, eval_mean_token_accuracy, eval_num_tokens" if evaluated else ""
    with pytest.raises(ValueError, match=f"--keep-best {metric}: the run has no such metric, but {names}$"):
        sft.run(options(tmp_path / "new", keep_best=metric, **evaluated))
    assert metrics.read(tmp_path / "new.unfinished/metrics.jsonl") == []


def test_a_metric_that_a_rollout_does_not_have_is_told_after_the_first(folder, data, tmp_path):
    given = {"model": str(folder), "data": data["question"], "steps": 3, "batch_size": 8, "group": 2}
    given |= {"max_new_tokens": 2, "checkpoint_every": 2, "eval_every": 2, "eval_data": data["held_out"]}
    with pytest.raises(
        ValueError, match=r"--keep-best rewards: the run has no such metric, but .*, reward, .*, eval_re"
    ):
        grpo.run(grpo.GRPO(**given, out=str(tmp_path / "out"), keep_best="rewards"))
    assert [r["step"] for r in metrics.read(tmp_path / "out.unfinished/metrics.jsonl")] == [0]
    keeping.check_metric(keeping.Keeping(keep_best="reward"), ("loss", "reward"))


def test_time_that_is_over_stops_as_a_signal_does(options, tmp_path):
    with pytest.raises(signals.Stopped, match="time limit") as raised:
        sft.run(options(tmp_path / "out", max_minutes=1e-9))
    assert raised.value.code == 75 and raised.value.step == 0  # it was over before the first step


def test_time_counts_from_the_start_of_the_command(monkeypatch):
    """Which reads the model and the data before it trains."""
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    limits = []
    monkeypatch.setattr(loop, "time_limit", lambda seconds, spent: limits.append((seconds, spent)))
    with signals.watched():
        now[0] = 130.0
        with signals.deferred():
            keeping.stop(keeping.Keeping(max_minutes=2))
    keeping.stop(keeping.Keeping(max_minutes=2))
    assert limits == [(120, 30.0), (120, 0.0)]


@pytest.mark.parametrize("bad_steps", [1, 2])
def test_a_batch_that_spoils_the_run_is_left_for_whoever_looks(options, tmp_path, monkeypatch, bad_steps):
    make = recipe.make_batch
    made = []

    def spoiled(examples, **how):
        batch = make(examples, **how)
        made.append(batch)
        return batch | {"weights": batch["weights"] * np.float32(np.nan)} if len(made) > 4 else batch

    monkeypatch.setattr(recipe, "make_batch", spoiled)
    with pytest.raises(FloatingPointError, match=r"the loss of step \d is nan.*its batch is in \S+bad_step_\d.npz"):
        sft.run(options(tmp_path / "out", bad_steps=bad_steps, checkpoint_every=1, log_every=1))
    aside = tmp_path / "out.unfinished"
    records = metrics.read(aside / "metrics.jsonl")
    assert [r["skipped"] for r in records] == [0.0] * (len(records) - bad_steps) + [1.0] * bad_steps
    with np.load(aside / f"bad_step_{len(records)}.npz") as left:
        assert left["rows"].shape == (16,) and np.isnan(left["weights"]).all()
        assert "Llama" in "".join(left["texts"])
    last = checkpoints.complete(aside / "checkpoints")[-1]
    for name, x in state_of(aside, last).items():
        assert np.isfinite(x).all(), name


class Sink:
    name = "Sink"

    def __init__(self, fails_at):
        self.fails_at, self.lines, self.closed = fails_at, [], False

    def log(self, step, stage, **values):
        if step == self.fails_at:
            raise ValueError("the network is gone")
        self.lines.append((step, stage, values["loss"]))

    def close(self):
        self.closed = True
        raise RuntimeError("nobody is there")


@pytest.mark.parametrize("fails_at", [0, 2])
def test_a_tracker_that_dies_is_one_warning_and_training_goes_on(options, tmp_path, monkeypatch, capsys, fails_at):
    made = []

    def opened(name, folder, config, after):
        if fails_at == 0:
            raise ConnectionError("no network")
        made.append(Sink(fails_at))
        return made[-1]

    monkeypatch.setattr(sinks, "check", lambda names: None)
    monkeypatch.setattr(sinks, "opened", opened)
    sft.run(options(tmp_path / "out", track=("wandb",), checkpoint_every=None))
    said = capsys.readouterr().out
    if fails_at:
        assert [line[0] for line in made[0].lines] == [1] and made[0].closed
        assert said.count("Sink failed at step 2 and gets no more metrics: ValueError: the network is gone") == 1
    else:
        assert said.count("wandb could not be opened and gets no metrics: ConnectionError: no network") == 1
    assert len(metrics.read(tmp_path / "out/metrics.jsonl")) == 12


def test_a_tracker_that_is_not_installed_is_told_first(options, tmp_path, monkeypatch):
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"--track tensorboard needs tensorboardX; pip install 'pt_jax\[tensorboard\]'"
    ):
        sft.run(options(tmp_path / "out", track=("tensorboard",)))


def test_a_profile_is_in_the_folder(options, tmp_path, monkeypatch):
    traced = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **_: traced.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: traced.append("end"))
    sft.run(options(tmp_path / "out", profile=(2, 3), checkpoint_every=None))
    assert traced == [str(tmp_path / "out.unfinished/profile"), "end"]
    with pytest.raises(ValueError, match="--profile 1 3: needs 2 <= first <= last"):
        sft.run(options(tmp_path / "new", profile=(1, 3)))
    with pytest.raises(ValueError, match="--profile 11 13: the run has 12 steps; give steps that it has"):
        sft.run(options(tmp_path / "new", profile=(11, 13)))


@pytest.mark.parametrize("how", ["warn", "stop"])
def test_a_checkpoint_that_cannot_be_written_is_told_and_the_run_goes_on_or_stops(
    options, tmp_path, monkeypatch, capsys, how
):
    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.manifests, "write", full)
    changes = {"checkpoint_every": 6, "on_save_error": how}
    if how == "stop":
        with pytest.raises(OSError, match=r"out.unfinished/checkpoints/6 was not written: No space left"):
            sft.run(options(tmp_path / "out", **changes))
        assert not (tmp_path / "out").exists()
    else:
        sft.run(options(tmp_path / "out", **changes))
        assert capsys.readouterr().out.count("was not written: No space left on device; it takes") == 2
        assert (tmp_path / "out/model.safetensors").exists()


def test_the_best_is_the_lowest_loss_or_the_highest_of_what_was_measured():
    """A signal comes at any step, and what is evaluated now and then is not known there."""
    steps = {1: {"eval_loss": 2.0}, 2: {"eval_loss": 1.0, "reward": 1.0}, 3: {"reward": 2.0}, 4: {"reward": np.nan}}
    best = lambda name: max(steps, key=lambda step: keeping.best_of(name)(steps[step]))
    assert (best("eval_loss"), best("reward")) == (2, 3)


def test_the_options_of_keeping_are_all_looked_at():
    assert {f.name for f in dataclasses.fields(keeping.Keeping)} == {
        "checkpoint_every", "keep", "keep_every", "keep_best", "resume", "on_save_error", "bad_steps", "max_minutes",
        "profile", "track", "capture",
    }  # fmt: skip
    for name in ("checkpoint_every", "keep", "keep_every", "bad_steps", "max_minutes"):
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must be above 0, got 0"):
            keeping.check(types.SimpleNamespace(**dataclasses.asdict(keeping.Keeping()) | {name: 0}))
    for name, value in (("keep_best", "loss"), ("keep_every", 4)):
        with pytest.raises(ValueError, match=f"--keep-.* {value} is of checkpoints; give --checkpoint-every"):
            keeping.check(keeping.Keeping(**{name: value}))
    keeping.check(keeping.Keeping(keep_best="loss", keep_every=4, checkpoint_every=2))
    assert loop.first_of()(3) is None
