"""TensorBoard and Weights & Biases get what the file gets, under names of their own; neither package is needed here."""

import sys
import types

import pytest

from pt_jax.tracking import sinks
from pt_jax.tracking.tracker import Tracker


@pytest.fixture
def calls(monkeypatch):
    """What the packages were asked to do."""
    calls = []

    class SummaryWriter:
        def __init__(self, **how):
            calls.append(("open", how))

        def __getattr__(self, name):
            return lambda *given: calls.append((name, *given))

    run = types.SimpleNamespace(log=lambda *a, **k: calls.append(("log", *a, k)), finish=lambda: calls.append(("end",)))

    def init(**how):
        calls.append(("init", how))
        return run

    ids = iter(("first", "second"))
    wandb = types.SimpleNamespace(init=init, util=types.SimpleNamespace(generate_id=lambda: next(ids)))
    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return calls


def test_tensorboard_gets_every_metric_under_its_stage(calls, tmp_path):
    sink = sinks.opened("tensorboard", tmp_path, {"seed": 1}, after=4)
    with Tracker(None, sink).stage("sft", 9) as stage:
        stage.step(5, {"loss": 2.0, "rewards/margins": 0.5})
    sink.close()
    assert calls[0] == ("open", {"logdir": str(tmp_path / "tensorboard"), "purge_step": 5})
    assert calls[2:] == [("add_scalar", "sft/loss", 2.0, 5), ("add_scalar", "sft/rewards/margins", 0.5, 5), ("close",)]


def test_a_run_of_wandb_goes_on_and_a_new_one_begins(calls, tmp_path):
    for after in (0, 4, 0):
        sink = sinks.opened("wandb", tmp_path, {"seed": 1}, after)
        sink.log(5, "sft", loss=2.0)
        sink.close()
    assert [c[1]["id"] for c in calls if c[0] == "init"] == ["first", "first", "second"]
    assert calls[1:3] == [("log", {"sft/loss": 2.0}, {"step": 5}), ("end",)]


def test_what_is_not_installed_is_told(monkeypatch):
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda name: None)
    sinks.check(())
    with pytest.raises(ValueError, match=r"--track wandb needs wandb; pip install 'pt_jax\[wandb\]'"):
        sinks.check(("wandb",))
