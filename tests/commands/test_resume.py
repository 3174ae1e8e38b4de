"""A command that was stopped and goes on is the one that was not stopped, to the last bit; or it says what differs."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from run_folders import same_runs, state_of

from pt_jax import models, signals
from pt_jax.commands import common, dpo, export, fitting, grpo, keeping, sft
from pt_jax.models import lora, peft
from pt_jax.recipes import grpo as grpo_recipe
from pt_jax.recipes import sft as sft_recipe
from pt_jax.tracking import metrics
from pt_jax.training import checkpoints, specs

pytestmark = pytest.mark.usefixtures("programs_are_kept")
COMMANDS = {
    "sft": (sft, sft.SFT, "completion", {"microbatches": 2, "batch_size": 16}),
    "dpo": (dpo, dpo.DPO, "preference", {"lora_rank": 2, "nll": 0.1, "batch_size": 8}),
    "grpo": (grpo, grpo.GRPO, "question", {
        "group": 2, "updates": 2, "kl": 0.1, "max_new_tokens": 4, "batch_size": 8, "eval_every": 4,
    }),
}  # fmt: skip
STEPS, LEFT_AT = 12, 7


@pytest.fixture(scope="module")
def options(folder, data, tmp_path_factory):
    """(command, out, changes) -> its options."""
    reward = tmp_path_factory.mktemp("rewards") / "mine.py"
    reward.write_text("def length(completion, row):\n    return float(len(completion) % 7) + 0.35\n")

    def make(command, out, **changes):
        _, kind, rows, own = COMMANDS[command]
        given = {"model": str(folder), "data": data[rows], "out": str(out), "steps": STEPS, "learning_rate": 1e-2}
        if command == "grpo":
            given |= {"reward": f"{reward}:length", "eval_data": data["held_out"]}
        return kind(**given | {"checkpoint_every": 3, "log_every": 5} | own | changes)

    return make


def run(options):
    return COMMANDS[type(options).__name__.lower()][0].run(options)


def stopping_at(monkeypatch, step):
    """As if a signal came in that step."""
    monkeypatch.setattr(keeping, "stop", lambda options: lambda at: "SIGTERM" if at == step else None)


@pytest.fixture(scope="module")
def straight(options, tmp_path_factory):
    """command -> the folder of a run that nothing stopped, made once."""
    done = {}

    def make(command):
        if command not in done:
            done[command] = tmp_path_factory.mktemp("straight") / "out"
            run(options(command, done[command]))
        return done[command]

    return make


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_that_was_stopped_goes_on_to_the_last_bit(options, straight, tmp_path, monkeypatch, command):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        stopping_at(patched, LEFT_AT)
        with pytest.raises(signals.Stopped) as raised:
            run(options(command, out))
    aside = tmp_path / "out.unfinished"
    assert raised.value.left_in == aside and not out.exists()
    assert checkpoints.complete(aside / "checkpoints") == [3, 6, LEFT_AT]
    assert metrics.read(aside / "metrics.jsonl")[-1]["step"] == LEFT_AT
    with open(aside / "metrics.jsonl", "a") as log:  # as of steps after the checkpoint, when a run is killed
        log.write('{"stage": "x", "step": 8, "loss": 1.0}\n{"stage": "x", "st')
    run(options(command, out, resume="auto"))
    same_runs(straight(command), out)
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not aside.exists() and checkpoints.complete(out / "checkpoints") == [LEFT_AT, 9, 12]
    assert json.loads((out / "run.json").read_text())["resumed_from"] == LEFT_AT


def test_the_samples_of_a_run_can_be_read(straight):
    lines = [json.loads(line) for line in (straight("grpo") / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [step for step in range(1, STEPS + 1) for _ in range(2)]
    assert all("question.jsonl:" in line["source"] and line["reward"] >= 0.35 for line in lines)
    assert len({line["completion"] for line in lines}) > 3


def test_patience_ends_a_run_and_is_as_long_in_a_run_that_was_stopped(options, tmp_path, monkeypatch):
    found = iter((1.0, 3.0, 2.0, 2.5, 9.0, 2.5))  # before the first step, after 1, 2, 3 and what would follow
    monkeypatch.setattr(grpo.Evaluation, "__call__", lambda self, params: {"eval_reward": next(found)})
    changes = {"patience": 2, "eval_every": 1, "kl": 0.0, "updates": 1}
    last = run(options("grpo", tmp_path / "out", **changes))
    assert last["eval_reward"] == 2.5 and len(metrics.read(tmp_path / "out/metrics.jsonl")) == 4
    found = iter((1.0, 3.0, 2.0))
    with monkeypatch.context() as patched, pytest.raises(signals.Stopped):
        stopping_at(patched, 2)
        run(options("grpo", tmp_path / "two", **changes))
    found = iter((2.5, 9.0))
    run(options("grpo", tmp_path / "two", resume="auto", **changes))
    assert (tmp_path / "two/metrics.jsonl").read_bytes() == (tmp_path / "out/metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="--eval-every 1 is of evaluations; give --eval-data"):
        run(options("grpo", tmp_path / "three", eval_data=None, **changes))


def test_a_run_that_patience_ended_is_not_trained_on_when_it_was_killed_before_its_model(
    options, tmp_path, monkeypatch
):
    found = iter((1.0, 3.0, 2.0, 2.5))  # before the first step, after 1, 2 and 3
    monkeypatch.setattr(grpo.Evaluation, "__call__", lambda self, params: {"eval_reward": next(found)})
    changes = {"patience": 2, "eval_every": 1, "kl": 0.0, "updates": 1}

    def killed(fit, logs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(fitting.Fit, "save", killed)
        run(options("grpo", tmp_path / "out", **changes))
    assert checkpoints.complete(tmp_path / "out.unfinished/checkpoints") == [3] and not (tmp_path / "out").exists()
    log = (tmp_path / "out.unfinished/metrics.jsonl").read_bytes()
    last = run(options("grpo", tmp_path / "out", resume="auto", **changes))
    assert (tmp_path / "out/metrics.jsonl").read_bytes() == log and last["eval_reward"] == 2.5
    saved = state_of(tmp_path / "out", 3)
    for name, x in specs.flat({"params": models.load(tmp_path / "out")[0]}).items():
        np.testing.assert_array_equal(saved[name], x, name)


@pytest.fixture
def stopped(options, straight, tmp_path):
    """What a run leaves that was killed after its twelfth step: checkpoints 6, 9 and 12."""
    whole = straight("sft")
    aside = tmp_path / "out.unfinished"
    aside.mkdir()
    shutil.copytree(whole / "checkpoints", aside / "checkpoints")
    for name in ("metrics.jsonl", "run.json"):
        shutil.copy(whole / name, aside)
    return aside


def test_any_checkpoint_can_be_gone_on_from(options, straight, stopped, tmp_path):
    run(options("sft", tmp_path / "out", resume="6"))
    same_runs(straight("sft"), tmp_path / "out")


def test_a_damaged_one_is_passed_over_by_name(options, straight, stopped, tmp_path, capsys):
    for step, name in ((12, "default/_METADATA"), (9, "meta.json")):
        file = stopped / "checkpoints" / str(step) / name
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    run(options("sft", tmp_path / "out", resume="auto"))
    same_runs(straight("sft"), tmp_path / "out")
    said = capsys.readouterr().out
    assert "12 is damaged: default/_METADATA has other bytes" in said and "9 is damaged: meta.json has other" in said
    assert "Goes on from the checkpoint of step 6" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"resume": "never"}, "has checkpoints of a run that was stopped; give --resume auto to go on, or --overwrite"),
        ({"resume": "7"}, r"--resume 7: \S+ has checkpoints of the steps 6, 9, 12"),
        ({"resume": "maybe"}, "--resume maybe: must be auto, never, or the step"),
        ({"learning_rate": 1e-3}, r"--learning-rate was 0.01 in the run that the checkpoint is of, and is 0.001 now"),
        ({"steps": 20}, "--steps was 12 .* is 20 now"),
        ({"seed": 1}, "--seed was 0 .* is 1 now"),
        ({"lora_rank": 2}, "--lora-rank was None .* is 2 now"),
        ({"packing": True}, "--packing was False .* is True now"),
        ({"data": "{other}/data.jsonl"}, r"--data \S+ is not what the run was begun with"),
        ({"eval_data": "{other}/data.jsonl"}, r"--eval-data \S+: the run was begun without --eval-data; a run goes on"),
        ({"model": "{other}/wide"}, r"another state: params.embed is float32\[304,16\] there and float32\[304,24\]"),
        ({"model": "{other}/tiny"}, r"--model \S+ is not what the run was begun with"),
    ],
)  # fmt: skip
def test_a_run_goes_on_only_as_it_was_begun(options, stopped, folder, tmp_path, changes, said):
    other = tmp_path / "other"
    shutil.copytree(folder, other / "tiny")
    about = json.loads((folder / "config.json").read_text())
    (other / "tiny/config.json").write_text(json.dumps(about | {"rope_theta": 5e5, "rms_norm_eps": 1e-4}))
    if "wide" in str(changes):
        config = dataclasses.replace(models.load(folder)[1], width=24)
        models.save(other / "wide", models.init(config, jax.random.key(0)), config, common.open_model(folder).tokenizer)
    lines = pathlib.Path(options("sft", tmp_path).data).read_text().splitlines(keepends=True)
    (other / "data.jsonl").write_text("".join(reversed(lines)))
    changes = {k: v.format(other=other) if isinstance(v, str) else v for k, v in changes.items()}
    before = sorted(stopped.rglob("*"))
    with pytest.raises(ValueError, match=said):
        run(options("sft", tmp_path / "out", **{"resume": "auto"} | changes))
    assert sorted(stopped.rglob("*")) == before


def test_data_that_changes_while_a_run_trains_are_not_what_it_was_begun_with(options, tmp_path, monkeypatch):
    lines = pathlib.Path(options("sft", tmp_path).data).read_text().splitlines(keepends=True)
    data, changes = tmp_path / "data.jsonl", {"data": str(tmp_path / "data.jsonl"), "checkpoint_every": None}
    data.write_text("".join(lines))

    def rewritten(step):
        if step == 2:
            data.write_text("".join(reversed(lines)))
            return "SIGTERM"

    with monkeypatch.context() as patched, pytest.raises(signals.Stopped):
        patched.setattr(keeping, "stop", lambda options: rewritten)
        run(options("sft", tmp_path / "out", **changes))
    assert checkpoints.complete(tmp_path / "out.unfinished/checkpoints") == [2]
    with pytest.raises(ValueError, match=r"--data \S+ is not what the run was begun with"):
        run(options("sft", tmp_path / "out", resume="auto", **changes))


def test_another_command_does_not_go_on_with_a_run(options, stopped, tmp_path):
    with pytest.raises(ValueError, match="the checkpoint is of pt-jax sft, this is pt-jax dpo"):
        run(options("dpo", tmp_path / "out", resume="auto"))


@pytest.mark.slow
def test_what_may_change_does(options, straight, stopped, tmp_path):
    """Another mesh, other parts of a batch, another place for the data: the same to the rounding of float32."""
    shutil.copy(options("sft", tmp_path).data, tmp_path / "moved.jsonl")
    shutil.rmtree(stopped / "checkpoints/12")
    changes = {"fsdp": 2, "microbatches": 1, "log_every": 1, "keep": 1, "data": str(tmp_path / "moved.jsonl")}
    run(options("sft", tmp_path / "out", resume="auto", **changes))
    for name, x in state_of(straight("sft")).items():
        np.testing.assert_allclose(state_of(tmp_path / "out")[name], x, atol=1e-5, err_msg=name)
    assert checkpoints.complete(tmp_path / "out/checkpoints") == [12]


def test_beginning_anew_is_asked_for_and_leaves_nothing_of_the_old(options, straight, stopped, tmp_path):
    (stopped / "checkpoints/99").mkdir()
    run(options("sft", tmp_path / "out", overwrite=True, checkpoint_every=5))
    records = metrics.read(tmp_path / "out/metrics.jsonl")
    assert [r["step"] for r in records] == [*range(1, 13)]
    assert checkpoints.complete(tmp_path / "out/checkpoints") == [5, 10]
    assert not stopped.exists()


def test_resume_without_a_checkpoint_begins(options, tmp_path):
    run(options("sft", tmp_path / "out", resume="auto", checkpoint_every=None))
    assert len(metrics.read(tmp_path / "out/metrics.jsonl")) == 12 and not (tmp_path / "out/checkpoints").exists()


def test_rewards_that_are_infinite_change_nothing_and_end_the_run(options, folder, tmp_path):
    reward = tmp_path / "mine.py"
    reward.write_text("def f(completion, row):\n    return float('inf') if completion else 0.0\n")
    with pytest.raises(FloatingPointError, match=r"of step 2 is nan.*bad_step_2.npz"):
        run(options("grpo", tmp_path / "out", reward=f"{reward}:f", kl=0.0, updates=1, bad_steps=2, checkpoint_every=1))
    aside = tmp_path / "out.unfinished"
    with np.load(aside / "bad_step_2.npz") as left:
        assert not np.isfinite(left["advantages"]).all() and left["texts"].shape == (16,)
    begun, _ = models.load(folder)
    for name, x in specs.flat({"params": begun}).items():
        np.testing.assert_array_equal(state_of(aside, 1)[name], x, name)


def test_a_row_of_bad_steps_is_as_long_in_a_run_that_was_stopped(options, tmp_path, monkeypatch):
    """Of steps, not of their updates: with two of these a step, the second step's would be the fourth in a row."""
    make = grpo_recipe.make_batch

    def spoiled(*given, **how):
        batch = make(*given, **how)
        return batch | {"advantages": batch["advantages"] * np.float32(np.nan)}

    monkeypatch.setattr(grpo_recipe, "make_batch", spoiled)
    given = {"bad_steps": 3, "checkpoint_every": 1, "log_every": 1}
    with monkeypatch.context() as patched, pytest.raises(signals.Stopped):
        stopping_at(patched, 1)
        run(options("grpo", tmp_path / "out", **given))
    with pytest.raises(FloatingPointError, match="the loss of step 3 is nan"):
        run(options("grpo", tmp_path / "out", resume="auto", **given))
    aside = tmp_path / "out.unfinished"
    assert [r["skipped"] for r in metrics.read(aside / "metrics.jsonl") if r["step"]] == [1, 1, 1]
    assert [int(state_of(aside, step)["bad"]) for step in (1, 2)] == [1, 2]


def test_dropping_any_leaf_of_the_state_would_show(options, folder, tmp_path):
    """Were one not saved, a resumed run would have what a fresh one has, or nothing."""
    given = options("sft", tmp_path / "out")
    model = common.open_model(folder)
    fit = fitting.Fit(given, model, sft_recipe.make_loss(model.apply), 16)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 300, (6, 16, 8)).astype(np.int32)
    mask = np.ones((16, 8), bool)

    def on(state):
        for step in range(int(state.step), 6):
            weights = np.full((16, 8), np.nan if step == 2 else 1 / 128, np.float32)
            batch = fit.place({"tokens": tokens[step], "seen": mask, "mask": mask, "weights": weights})
            state, seen = fit.train_step(state, fit.frozen, batch)
        return jax.device_get((jax.tree.map(raw, state), seen))

    raw = lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    copy = lambda tree: jax.tree.map(lambda x: x.copy(), tree)
    fresh, half = copy(fit.state), copy(fit.state)
    for step in range(3):
        weights = np.full((16, 8), np.nan if step == 2 else 1 / 128, np.float32)
        batch = fit.place({"tokens": tokens[step], "seen": mask, "mask": mask, "weights": weights})
        half, _ = fit.train_step(half, fit.frozen, batch)
    equal = lambda a, b: all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))
    expected = on(copy(half))
    assert equal(expected, on(copy(half)))
    leaves, unsaved = specs.flat(half), specs.flat(fresh)
    assert len(leaves) > 30
    for name in leaves:
        lost = copy(jax.random.key(9)) if name == "key" else unsaved[name].copy()
        if name == "bad":  # the length of a row of bad steps, which a good one ends; test_loop.py goes on with it
            assert int(leaves[name]) == 1 and int(lost) == 0
            continue
        other = specs.unflat(copy(leaves) | {name: jax.device_put(lost, leaves[name].sharding)}, half)
        assert not equal(expected, on(other)), name


def equal(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_the_last_checkpoint_is_the_model_of_the_run(straight, tmp_path):
    full = straight("sft")
    export.run(export.Export(checkpoint=str(full / "checkpoints/12"), out=str(tmp_path / "last")))
    export.run(export.Export(checkpoint=str(full), out=str(tmp_path / "newest")))
    export.run(export.Export(checkpoint=str(full / "checkpoints/6"), out=str(tmp_path / "six")))
    last, _ = models.load(full)
    assert equal(last, models.load(tmp_path / "last")[0]) and equal(last, models.load(tmp_path / "newest")[0])
    assert not equal(last, models.load(tmp_path / "six")[0])
    assert common.open_model(tmp_path / "six").tokenizer is not None


def test_adapters_become_a_peft_folder_or_are_folded(straight, folder, tmp_path):
    adapted = straight("dpo")
    export.run(export.Export(checkpoint=str(adapted), out=str(tmp_path / "peft")))
    params, config = models.load(folder)
    there, here = (peft.load(path, config, params) for path in (adapted, tmp_path / "peft"))
    assert equal(there[0], here[0]) and there[1] == here[1]
    export.run(export.Export(checkpoint=str(adapted), out=str(tmp_path / "folded"), fold=True))
    assert equal(models.load(tmp_path / "folded")[0], jax.device_get(lora.fold(params, *there)))


def test_a_run_that_was_stopped_is_exported_by_its_name(straight, tmp_path):
    full = straight("sft")
    shutil.copytree(full / "checkpoints", tmp_path / "out.unfinished/checkpoints")
    export.run(export.Export(checkpoint=str(tmp_path / "out"), out=str(tmp_path / "model")))
    assert equal(models.load(full)[0], models.load(tmp_path / "model")[0])


def test_a_damaged_checkpoint_is_passed_over_by_name_and_the_step_of_the_model_is_told(straight, tmp_path, capsys):
    full = straight("sft")
    saved = tmp_path / "out.unfinished/checkpoints"
    shutil.copytree(full / "checkpoints", saved)
    (saved / "12/default/_METADATA").write_text("{}")
    export.run(export.Export(checkpoint=str(tmp_path / "out"), out=str(tmp_path / "newest")))
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"Warning: {saved}/12 is damaged: default/_METADATA has 2 bytes")
    assert said[1] == f"Exports step 9 of pt-jax sft: {saved}/9"
    export.run(export.Export(checkpoint=str(full / "checkpoints/9"), out=str(tmp_path / "nine")))
    assert equal(models.load(tmp_path / "newest")[0], models.load(tmp_path / "nine")[0])


def test_a_checkpoint_of_no_command_is_not_exported(tmp_path):
    with checkpoints.Checkpoints(tmp_path / "mine") as saved:
        saved.save(3, {"params": {"w": np.ones(2, np.float32)}}, wait=True)
    with pytest.raises(ValueError, match=r"mine/3: is not of pt-jax sft, dpo, grpo, so it does not say what its model"):
        export.run(export.Export(checkpoint=str(tmp_path / "mine"), out=str(tmp_path / "new")))
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_exported_is_told_and_nothing_is_written(straight, folder, tmp_path):
    full = straight("sft")
    broken = shutil.copytree(full / "checkpoints/6", tmp_path / "6")
    (broken / "default/_METADATA").write_text("{}")
    (tmp_path / "other").mkdir()
    shutil.copytree(folder, tmp_path / "wide")
    (tmp_path / "wide/config.json").write_text((folder / "config.json").read_text().replace("1e-05", "1e-04") + " ")
    for options, said in (
        ({"checkpoint": str(broken)}, "is damaged: default/_METADATA has 2 bytes"),
        ({"checkpoint": str(tmp_path / "other")}, "has no complete checkpoint; give the folder"),
        ({"checkpoint": str(full), "fold": True}, "--fold: .* trained all weights"),
        ({"checkpoint": str(full), "model": str(tmp_path / "wide")}, "--model .* is not what the run was begun with"),
    ):
        with pytest.raises(ValueError, match=said):
            export.run(export.Export(out=str(tmp_path / "new"), **options))
    with pytest.raises(ValueError, match="would replace checkpoint"):
        export.run(export.Export(checkpoint=str(full / "checkpoints/12"), out=str(full), overwrite=True))
    assert not (tmp_path / "new").exists() and checkpoints.complete(full / "checkpoints") == [6, 9, 12]
