"""The quickstart keeps its promises: the identity changes, folders load, the same seed gives the same numbers."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from pt_jax import models
from pt_jax.commands import quickstart as command
from pt_jax.tracking import metrics
from pt_jax.tracking.progress import Progress
from pt_jax.tracking.tracker import Tracker


def quickstart(out, *options):
    """In a process of its own with one device, as on a laptop; whatever the tests' settings are."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "COLUMNS": "100"}
    words = [sys.executable, "-m", "pt_jax.cli", "quickstart", "--out", str(out), *options]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart") / "out"
    return out, quickstart(out, "--fast")


@pytest.mark.slow
def test_it_ends_with_tables_a_picture_models_and_the_way_on(fast):
    out, done = fast
    assert done.returncode == 0, done.stderr
    for text in ("What each stage answers", "implicit reward margin", f"pt-jax chat {out}/grpo"):
        assert text in done.stdout
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    for stage in ("base", "sft", "dpo", "grpo"):
        params, _ = models.load(out / stage)
        assert 0.4e6 < models.parameters.count(params) < 3e6
    stages = {r["stage"] for r in metrics.read(out / "metrics.jsonl")}
    assert {"pretrain", "sft", "dpo", "grpo"} <= stages


@pytest.mark.slow
def test_the_identity_changes_on_questions_that_training_never_saw(fast):
    records = metrics.read(fast[0] / "metrics.jsonl")
    asked = {r["stage"]: r for r in records if r["stage"].startswith("ask")}
    assert asked["ask base"]["share_sft_name"] == asked["ask base"]["share_dpo_name"] == 0
    assert asked["ask sft"]["share_sft_name"] > 0.8
    assert asked["ask dpo"]["share_dpo_name"] > 0.8
    chosen = [r["logps/chosen"] for r in records if r["stage"] == "dpo"]
    assert chosen[-1] > chosen[0]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(fast, tmp_path):
    out, _ = fast
    assert quickstart(tmp_path / "again", "--fast").returncode == 0
    assert (tmp_path / "again/metrics.jsonl").read_bytes() == (out / "metrics.jsonl").read_bytes()
    for stage in ("base", "sft", "dpo", "grpo"):
        weights = [(p / stage / "model.safetensors").read_bytes() for p in (out, tmp_path / "again")]
        assert weights[0] == weights[1]
    # a quickstart's own folder is replaced
    assert quickstart(tmp_path / "again", "--fast", "--seed", "1").returncode == 0
    assert (tmp_path / "again/metrics.jsonl").read_bytes() != (out / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_transformers_loads_every_stage_with_the_same_logits(fast):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for stage in ("base", "grpo"):
        params, config = models.load(fast[0] / stage)
        theirs = AutoModelForCausalLM.from_pretrained(fast[0] / stage)
        tokens = np.array([AutoTokenizer.from_pretrained(fast[0] / stage)("Who are you? 3 + 4 = 7.")["input_ids"]])
        logits = models.apply(config, params, tokens, np.ones_like(tokens, bool))[0]
        with torch.no_grad():
            expected = theirs(torch.tensor(tokens)).logits.numpy()
        assert np.abs(np.asarray(logits) - expected).max() < 1e-4


def test_a_folder_of_somebody_else_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    done = quickstart(tmp_path)
    assert done.returncode == 2 and "exists and is not empty" in done.stderr and "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.fixture
def earlier(tmp_path):
    """The folder of an earlier quickstart, and a link to it."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / command.MARK).write_text("{}")
    (tmp_path / "folder/metrics.jsonl").write_text("old")
    (tmp_path / "link").symlink_to("folder")
    return tmp_path / "folder"


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_an_earlier_run_survives_bad_input(earlier, seed):
    with pytest.raises(ValueError, match="--seed must be in"):
        command.run(command.Quickstart(out=str(earlier), seed=seed))
    assert (earlier / "metrics.jsonl").read_text() == "old"


@pytest.mark.parametrize("out", [".", ".."])
def test_the_folder_that_one_is_in_is_not_replaced(earlier, monkeypatch, out):
    monkeypatch.chdir(earlier)
    with pytest.raises(ValueError, match="is the folder that the command runs in"):
        command.run(command.Quickstart(out=out))
    assert (earlier / "metrics.jsonl").read_text() == "old"


def test_a_link_stands_for_its_folder(earlier, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "prepare", stopped)
    link = earlier.with_name("link")
    with pytest.raises(KeyboardInterrupt) as raised:
        command.run(command.Quickstart(out=str(link)))
    assert raised.value.left_in == earlier and link.is_symlink()
    assert (earlier / "metrics.jsonl").read_text() == ""  # replaced, and the new run's was begun


def test_the_way_on_can_be_pasted_into_a_shell():
    """Each command in one line, brackets as they stand, and a name with spaces quoted."""
    out = io.StringIO()
    console = Console(file=out, width=40, force_terminal=False, force_interactive=False)
    with Progress({"x": 1}, console=console) as progress:
        command.show(Tracker(progress), [], "runs/[red]my first")
    lines = out.getvalue().splitlines()
    assert "Go on:  pt-jax chat 'runs/[red]my first/grpo'" in lines
    path = "'runs/[red]my first/data/sft.jsonl'"
    assert lines[-1].strip() == f"pt-jax sft --model 'runs/[red]my first/base' --data {path} --out runs/sft"


def test_the_mark_of_a_quickstart_is_its_own(tmp_path):
    """Deleting is allowed by a file that only the quickstart writes."""
    (tmp_path / "run.json").write_text(json.dumps({"command": "sft"}))
    assert quickstart(tmp_path).returncode == 2 and (tmp_path / "run.json").exists()
