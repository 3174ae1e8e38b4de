"""Evaluation on the way: it is of all rows, leaves no trace in what is trained, and can end a run or choose of it."""

import jax
import numpy as np
import pytest
from run_folders import same_states, state_of, steps_of

from pt_jax import models, signals
from pt_jax.commands import common, dpo, evaluating, export, keeping, sft
from pt_jax.commands import quickstart_data as world
from pt_jax.data import encode, rows
from pt_jax.tracking import metrics
from pt_jax.training import specs

pytestmark = pytest.mark.usefixtures("programs_are_kept")
COMMANDS = {"sft": (sft, sft.SFT, "completion"), "dpo": (dpo, dpo.DPO, "preference")}
BASE = {"steps": 4, "batch_size": 8, "learning_rate": 1e-2, "checkpoint_every": 4, "log_every": 3}


@pytest.fixture(scope="module")
def options(folder, data, tmp_path_factory):
    """(command, out, changes) -> its options; what is held out is of another length than what is trained on."""
    at, content = tmp_path_factory.mktemp("held"), {"sft": world.supervised(0)[1:12], "dpo": world.preferences()[5:16]}
    held_out = {command: str(at / f"{command}.jsonl") for command in COMMANDS}
    for command, file in held_out.items():
        rows.write_jsonl(file, content[command])

    def make(command, out, **changes):
        _, kind, lines = COMMANDS[command]
        changes = {name: held_out[command] if value == "held out" else value for name, value in changes.items()}
        return kind(**{"model": str(folder), "data": data[lines], "out": str(out)} | BASE | changes)

    return make


def evaluated(out):
    """step -> its metrics of evaluation."""
    of = lambda r: {name: x for name, x in r.items() if name.startswith("eval_")}
    return {r["step"]: of(r) for r in metrics.read(out / "metrics.jsonl") if of(r)}


def trained(out):
    """The lines of the log without what is of evaluation."""
    lines = metrics.read(out / "metrics.jsonl")
    return [{name: x for name, x in r.items() if not name.startswith("eval_")} for r in lines if r["step"]]


@pytest.mark.parametrize("command", COMMANDS)
def test_evaluation_touches_nothing(train, command):
    """The whole state, bit for bit, of a run with evaluations and of one without."""
    without, rarely = train(command), train(command, eval_data="held out", eval_every=3)
    same_states(without, rarely)
    assert trained(rarely) == trained(without)
    assert [*evaluated(rarely)] == [0, 3, 4] and not evaluated(without)
    assert len({x["eval_loss"] for x in evaluated(rarely).values()}) == 3


def scores(folder, examples):
    """For each example, by itself: the log-probabilities of its scored tokens, and whether each was the likeliest."""
    model, out = common.open_model(folder), []
    apply = jax.jit(model.apply)
    for example in examples:
        at = np.flatnonzero(example.mask)
        tokens = np.resize(example.tokens, 96)  # what follows does not matter
        logits = np.asarray(apply(model.params, tokens[None], np.ones((1, 96), bool))[0][0], np.float64)[at - 1]
        logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        out.append((logps[np.arange(len(at)), tokens[at]], logits.argmax(-1) == tokens[at]))
    return out


@pytest.mark.parametrize("changes", [{}, {"mean": "sequence", "microbatches": 2, "batch_size": 16}])
def test_the_loss_is_of_all_rows_that_were_held_out_and_of_the_model_that_is_written(train, options, changes):
    out = train("sft", eval_data="held out", eval_every=3, **changes)
    tokenizer = common.open_model(out).tokenizer
    given = options("sft", out, eval_data="held out").eval_data
    found = scores(out, [encode.supervised(tokenizer, row) for row in rows.read(given, kinds=("completion",))])
    join = (
        (lambda parts: np.mean([x.mean() for x in parts])) if changes else (lambda parts: np.concatenate(parts).mean())
    )
    said = evaluated(out)[4]
    np.testing.assert_allclose(said["eval_loss"], -join([logps for logps, _ in found]), rtol=1e-5)
    np.testing.assert_allclose(said["eval_mean_token_accuracy"], join([hits for _, hits in found]), rtol=1e-5)
    assert said["eval_num_tokens"] == sum(len(logps) for logps, _ in found)  # rows that only fill a batch have none


def test_pairs_are_compared_with_the_model_before_training(train, options, folder):
    out = train("dpo", eval_data="held out", eval_every=3)
    tokenizer = common.open_model(out).tokenizer
    given = options("dpo", out, eval_data="held out").eval_data
    pairs = [encode.preference(tokenizer, row) for row in rows.read(given, kinds=("preference",))]
    sums = lambda at, side: np.array([x.sum() for x, _ in scores(at, [pair[side] for pair in pairs])])
    gains = [0.1 * (sums(out, side) - sums(folder, side)) for side in (0, 1)]
    margins, said = gains[0] - gains[1], evaluated(out)[4]
    np.testing.assert_allclose(said["eval_rewards/margins"], margins.mean(), rtol=1e-3)
    np.testing.assert_allclose(said["eval_loss"], np.log1p(np.exp(-margins)).mean(), rtol=1e-4)
    np.testing.assert_allclose(said["eval_rewards/accuracies"], (margins > 0).mean(), rtol=1e-6)
    assert evaluated(out)[0]["eval_loss"] == pytest.approx(np.log(2), rel=1e-6)


@pytest.fixture
def scripted(monkeypatch):
    """``scripted(losses)``: what the evaluations from here on find."""

    def say(*losses):
        found = iter(losses)
        monkeypatch.setattr(evaluating, "of_loss", lambda *_, **__: lambda *_: {"eval_loss": next(found)})

    return say


def test_patience_ends_a_run_and_is_as_long_in_one_that_was_stopped(options, tmp_path, scripted, monkeypatch):
    """What was found is in the checkpoint: a log that is gone makes nobody more patient."""
    changes = {"eval_data": "held out", "eval_every": 1, "patience": 2, "steps": 8, "checkpoint_every": 1}
    scripted(9.0, 3.0, 3.5, 3.1, 0.0)
    last = sft.run(options("sft", tmp_path / "out", **changes))
    assert last["eval_loss"] == 3.1 and steps_of(tmp_path / "out") == [1, 2, 3]
    with monkeypatch.context() as patched, pytest.raises(signals.Stopped):
        patched.setattr(keeping, "stop", lambda options: lambda at: "SIGTERM" if at == 2 else None)
        scripted(9.0, 3.0, 3.5)
        sft.run(options("sft", tmp_path / "two", **changes))
    (tmp_path / "two.unfinished/metrics.jsonl").write_text("")
    scripted(3.1, 0.0)
    sft.run(options("sft", tmp_path / "two", resume="auto", **changes))
    same_states(tmp_path / "out", tmp_path / "two")
    assert [*evaluated(tmp_path / "two")] == [3]


def test_the_best_checkpoint_is_that_of_the_lowest_loss(options, tmp_path, scripted):
    scripted(1.0, 3.0, 2.0, 4.0, 5.0)
    changes = {"eval_data": "held out", "eval_every": 1, "checkpoint_every": 1, "keep": 1, "keep_best": "eval_loss"}
    out = tmp_path / "out"
    sft.run(options("sft", out, **changes))
    assert steps_of(out) == [2, 4]
    for name, changes in (("best", {"best": "eval_loss"}), ("newest", {})):
        export.run(export.Export(checkpoint=str(out), out=str(tmp_path / name), **changes))
    best, newest = (specs.flat({"params": models.load(tmp_path / name)[0]}) for name in ("best", "newest"))
    for name, x in best.items():
        np.testing.assert_array_equal(x, state_of(out, 2)[name], name)
    assert any(not np.array_equal(x, newest[name]) for name, x in best.items())
    for given, best, said in (
        (out, "eval_lost", r"--best eval_lost: no checkpoint in \S+ has such a metric, but .*eval_loss"),
        (out / "checkpoints/2", "eval_loss", "--best eval_loss: \\S+/2 is one checkpoint; give the folder of a run"),
    ):
        with pytest.raises(ValueError, match=said):
            export.run(export.Export(checkpoint=str(given), out=str(tmp_path / "none"), best=best))


def test_there_are_ten_evaluations_in_a_run_unless_said_otherwise():
    every = lambda steps, **given: (
        evaluating.Evaluations(sft.SFT(model="", data="", out="", **given), steps, "", None).every
    )
    assert (every(100), every(7), every(101), every(100, eval_every=3)) == (10, 1, 11, 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"patience": 2}, "--patience 2 is of evaluations; give --eval-data"),
        ({"eval_every": 2}, "--eval-every 2 is of evaluations; give --eval-data"),
        ({"eval_every": 0, "eval_data": "held out"}, "--eval-every must be above 0, got 0"),
        ({"patience": 0, "eval_data": "held out"}, "--patience must be above 0, got 0"),
        ({"keep_best": "eval_loss"}, "--keep-best eval_loss is of evaluations; give --eval-data"),
        ({"keep_best": "eval_loss", "eval_data": "held out"}, "give an --eval-every that divides --checkpoint-every 4"),
        ({"keep_best": "eval_loss", "eval_data": "held out", "eval_every": 3}, "divides --checkpoint-every 4"),
        ({"eval_data": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"eval_data": "held out", "max_length": 5}, r"jsonl:\d+: has \d+ tokens, the limit is 5"),
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_what_makes_no_sense_is_told_before_anything_is_done(options, tmp_path, command, changes, said):
    with pytest.raises(ValueError, match=said):
        COMMANDS[command][0].run(options(command, tmp_path / "out", **changes))
    assert not [*tmp_path.iterdir()]


def test_a_long_row_among_those_held_out_is_named(options, tmp_path, data):
    long = tmp_path / "long.jsonl"
    rows.write_jsonl(long, [{"prompt": "a", "completion": "b"}, {"prompt": "xq " * 90, "completion": "b"}])
    with pytest.raises(ValueError, match=r"long.jsonl:2: has \d+ tokens, the limit is"):
        sft.run(options("sft", tmp_path / "out", eval_data=str(long)))
