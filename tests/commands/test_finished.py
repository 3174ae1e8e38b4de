"""A command that is started again once it has finished, or was killed in its last moment; what it reads has changed."""

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pt_jax import cli, signals
from pt_jax.commands import grpo, inputs, keeping, runs, sft
from pt_jax.training import checkpoints

pytestmark = pytest.mark.usefixtures("programs_are_kept")


@pytest.fixture(scope="module")
def words(folder, data, tmp_path_factory):
    """Those of a command; its model and its data are copies, to be changed."""
    at = tmp_path_factory.mktemp("project")
    shutil.copytree(folder, at / "model")
    shutil.copy(data["completion"], at / "data.jsonl")
    given = ["sft", "--model", str(at / "model"), "--data", str(at / "data.jsonl"), "--out", str(at / "out")]
    return at, [*given, "--steps", "2", "--batch-size", "8", "--checkpoint-every", "1", "--resume", "auto"]


@pytest.fixture(scope="module")
def finished(words):
    at, given = words
    assert cli.main(given) == 0
    return at, given


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_same_line_again_says_that_it_is_finished_and_does_nothing(finished, capsys, monkeypatch):
    at, given = finished
    before = contents(at)
    monkeypatch.setattr(sft, "run", lambda *_: pytest.fail("it ran"))
    assert cli.main(given) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{at}/out is finished already; nothing is left to do. Go on with: pt-jax chat {at}/out")
    assert cli.main([*given, "--log-every", "1", "--keep", "7"]) == 0  # which change no result
    assert contents(at) == before


def test_overwrite_replaces_the_model_of_another_run_and_not_that_of_the_same(finished, capsys, monkeypatch):
    """Or a line that starts again whatever ends would train for ever."""
    at, given = finished
    before, ran = contents(at), []
    monkeypatch.setattr(sft, "run", ran.append)
    assert cli.main([*given, "--overwrite"]) == 0
    assert "is finished already" in capsys.readouterr().out and not ran and contents(at) == before
    assert cli.main([*given, "--overwrite", "--learning-rate", "3e-3"]) == 0
    assert [options.learning_rate for options in ran] == [3e-3]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--learning-rate", "3e-3"], "has the model of another run; give another folder (--learning-rate was 0.0001"),
        (["--average", "0.5"], "(--average was None in the run that the checkpoint is of, and is 0.5 now"),
        (["--resume", "never"], "out: exists and is not empty"),
        (["--resume", "1"], "out: exists and is not empty"),
    ],
)
def test_another_line_does_not_take_the_model_for_its_own(finished, capsys, more, said):
    at, given = finished
    before = contents(at)
    assert cli.main([*given, *more]) == 2
    assert said in capsys.readouterr().err and contents(at) == before


def changed_data(at):
    lines = (at / "data.jsonl").read_text().splitlines(keepends=True)
    (at / "data.jsonl").write_text("".join(reversed(lines)))
    return "--data"


def changed_weights(at):
    """Others in a file of the same size with the same header: of one tensor, the last of its numbers."""
    tensors = load_file(at / "model/model.safetensors")
    x = tensors["model.norm.weight"]
    tensors["model.norm.weight"] = np.append(x[:-1], x[-1] * 2)
    size = (at / "model/model.safetensors").stat().st_size
    save_file(tensors, at / "model/model.safetensors", {"format": "pt"})
    assert (at / "model/model.safetensors").stat().st_size == size
    return "--model"


def changed_tokenizer(at):
    (at / "model/chat_template.jinja").write_text("{{ messages }}")
    return "--model"


@pytest.mark.parametrize("change", [changed_data, changed_weights, changed_tokenizer])
def test_what_was_read_is_compared(finished, tmp_path, capsys, change):
    at, given = finished
    shutil.copytree(at, tmp_path / "copy")
    given = [word.replace(str(at), str(tmp_path / "copy")) for word in given]
    assert cli.main(given) == 0  # another place is no change
    flag = change(tmp_path / "copy")
    capsys.readouterr()
    assert cli.main(given) == 2
    assert f"({flag} {tmp_path}/copy/" in (said := capsys.readouterr().err) and "is not what the run was begun" in said


def test_data_that_were_left_out_or_are_new_are_told(data):
    less = sft.SFT(model="m", data=data["completion"], out="o")
    more = sft.SFT(model="m", data=data["completion"], out="o", eval_data=data["held_out"])
    noted = lambda options: {"inputs": {k: inputs.content(path) for k, path in options.reads().items() if k != "model"}}
    for begun, now, said in (
        (
            less,
            more,
            "--eval-data .*held_out.jsonl: the run was begun without --eval-data; a run goes on with the same",
        ),
        (more, less, "no --eval-data: the run was begun with --eval-data; a run goes on with the same"),
    ):
        inputs.check(noted(now), now, ("data", "eval_data"))
        with pytest.raises(ValueError, match=said):
            inputs.check(noted(begun), now, ("data", "eval_data"))


def test_a_large_tensor_is_looked_at_in_three_places(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "PIECE", 8)
    content = lambda x: (save_file({"w": x}, tmp_path / "model.safetensors"), inputs.content(tmp_path))[1]
    x = np.arange(100, dtype=np.float32)
    seen = [i for i in range(100) if content(np.where(np.arange(100) == i, -1, x).astype(np.float32)) != content(x)]
    assert seen == [0, 1, 49, 50, 98, 99]


def test_the_base_of_an_adapter_is_looked_at_too(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text('{"base_model_name_or_path": "../model"}')
    before = inputs.content(tmp_path / "adapter")
    changed_weights(tmp_path)
    assert inputs.content(tmp_path / "adapter") != before


def test_a_run_that_was_killed_before_its_checkpoints_were_moved_is_finished_later(words, tmp_path, monkeypatch):
    given = [*words[1], "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patched:
        patched.setattr(runs, "close", lambda out: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli.main(given) == 130
    aside = tmp_path / "out.unfinished"
    assert checkpoints.complete(aside / "checkpoints") == [1, 2] and (tmp_path / "out/model.safetensors").is_file()
    assert cli.main(given) == 0
    assert checkpoints.complete(tmp_path / "out/checkpoints") == [1, 2] and not aside.exists()


def test_what_a_later_run_left_aside_is_not_the_models(finished, tmp_path):
    at, given = finished
    shutil.copytree(at / "out", tmp_path / "out")
    shutil.copytree(at / "out", tmp_path / "out.unfinished")
    with open(tmp_path / "out.unfinished/metrics.jsonl", "a") as log:
        log.write("{}\n")
    before = contents(tmp_path)
    assert cli.main([*given, "--out", str(tmp_path / "out")]) == 0
    assert contents(tmp_path) == before


def test_a_reward_of_ones_own_is_compared(folder, data, tmp_path, monkeypatch):
    reward = tmp_path / "mine.py"
    reward.write_text("def f(completion, row):\n    return float(len(completion) % 7)\n")
    given = {"model": str(folder), "data": data["question"], "out": str(tmp_path / "out"), "reward": f"{reward}:f"}
    given |= {"steps": 2, "batch_size": 8, "group": 2, "max_new_tokens": 2}
    with monkeypatch.context() as patched, pytest.raises(signals.Stopped):
        patched.setattr(keeping, "stop", lambda options: lambda at: "SIGTERM" if at == 1 else None)
        grpo.run(grpo.GRPO(**given))
    reward.write_text("def f(completion, row):\n    return float(len(completion) % 5)\n")
    with pytest.raises(ValueError, match=r"--reward \S+mine.py is not what the run was begun with"):
        grpo.run(grpo.GRPO(**given, resume="auto"))
