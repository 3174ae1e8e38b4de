"""The command line: exit codes and sentences."""

import contextlib
import math
import os
import subprocess
import sys

import pytest

from pt_jax import cli, signals
from pt_jax.commands import runs, sft
from pt_jax.training import loop


def run(*words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "pt_jax.cli", *map(str, words)], env=os.environ | environment,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def sentence(capsys, *words):
    """Of a command that must fail: its one line on standard error."""
    assert cli.main([str(w) for w in words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("pt-jax: ") and err.count("\n") == 1
    return err


def training(tmp_path, **options):
    given = {"model": tmp_path / "model", "data": tmp_path / "data.jsonl", "out": tmp_path / "out"} | options
    return ["sft", *(str(word) for name, value in given.items() for word in (f"--{name}", value))]


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(
        '{"model_type": "qwen3", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,'
        ' "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 8}'
    )


def test_help_lists_the_commands():
    done = run("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("quickstart", "sft", "dpo", "grpo", "generate", "chat", "inspect"))


def test_an_unknown_option_and_a_wrong_type_exit_with_2():
    for words, said in (
        (["quickstart", "--speed", "9"], "--speed"),
        (["sft", "--model", "a", "--data", "b", "--out", "c", "--steps", "many"], "many"),
        (["teach"], "teach"),
    ):
        done = run(*words)
        assert done.returncode == 2 and said in done.stderr + done.stdout and "Traceback" not in done.stderr


def test_a_folder_without_config(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    assert "has no config.json" in sentence(capsys, *training(tmp_path))


def test_an_unknown_family(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "mamba"}')
    said = sentence(capsys, *training(tmp_path))
    assert "model_type is 'mamba'" in said and "config.json" in said


@pytest.mark.parametrize(
    "line,said",
    [
        ('{"prompt": "a", ', "data.jsonl:2: is not JSON"),
        ('{"prompt": "a"}', "data.jsonl:2: has the columns prompt; expected"),
        ("[1]", "data.jsonl:2: is list"),
        ('{"prompt": "a", "completion": 7}', "data.jsonl:2: completion must be a string or a list of messages"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, capsys, model, line, said):
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' + line + "\n")
    assert said in sentence(capsys, *training(tmp_path))
    assert not (tmp_path / "out").exists()


def test_an_unwritable_out(tmp_path, capsys, model):
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "file").write_text("x")
    assert "cannot be written" in sentence(capsys, *training(tmp_path, out=tmp_path / "file" / "out"))
    assert "cannot be written" in sentence(capsys, "quickstart", "--out", tmp_path / "file" / "out")


def test_an_error_of_a_library_keeps_its_traceback(monkeypatch):
    """A bug must not look like bad input."""
    from pt_jax.commands import talk

    monkeypatch.setattr(talk, "generate", lambda options: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["generate", "folder", "--prompt", "x"])


def test_an_interruption_exits_with_130(monkeypatch, capsys):
    from pt_jax.commands import talk

    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(talk, "generate", interrupted)
    assert cli.main(["generate", "folder", "--prompt", "x"]) == 130
    assert capsys.readouterr().err == "pt-jax: stopped\n"


def interrupted():
    raise KeyboardInterrupt


def asked_to_stop():
    raise signals.Stopped("SIGTERM")


def diverged():
    loop.report(3, {"loss": math.nan}, lambda *_: None)


@pytest.mark.parametrize(
    "fails,code,said",
    [
        (interrupted, 130, "stopped"),
        (diverged, 2, "the loss of step 3 is nan; a lower learning rate usually helps"),
        (asked_to_stop, 75, "stopped by SIGTERM; start it again with --resume auto to go on"),
    ],
)
def test_a_run_that_ends_early_says_what_there_is(tmp_path, monkeypatch, capsys, model, fails, code, said):
    """Before anything was written, nothing; afterwards, where the metrics are."""

    def stderr(around):
        def run(options):
            with around(options):
                fails()

        monkeypatch.setattr(sft, "run", run)
        assert cli.main(training(tmp_path)) == code
        return capsys.readouterr().err

    assert stderr(contextlib.nullcontext) == f"pt-jax: {said}\n"
    left = f"what there is so far is in {tmp_path / 'out.unfinished'}"
    assert stderr(lambda options: runs.stage(options, "sft", 1)) == f"pt-jax: {said}; {left}\n"


@pytest.mark.parametrize("words", [
    ["quickstart", "--seed", "-1"], ["sft", "--model", "a", "--data", "b", "--out", "{out}", "--seed", "-1"],
    ["generate", "a", "--prompt", "x", "--seed", "99999999999999999999"], ["chat", "a", "--seed", str(2**32)],
])  # fmt: skip
def test_a_seed_that_is_none_is_found_first(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    assert "--seed must be in [0, 4294967296), got " in sentence(capsys, *words)
    assert not [*tmp_path.iterdir()]


def test_importing_the_package_imports_nothing_heavy():
    heavy = ("jax", "numpy", "transformers", "rich", "tyro", "matplotlib")
    code = f"import sys, pt_jax; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
