"""What several processes agree on before they begin, as one of them sees it: the others' words are made up here."""

import json
import math
import threading
import types
import urllib.error
from concurrent import futures
from functools import partial

import jax
import numpy as np
import pytest

from pt_jax import cli, signals
from pt_jax.commands import fitting, keeping, runs, several, sft
from pt_jax.training import checkpoints, distributed


@pytest.fixture
def two(monkeypatch):
    """``two(answers)``: from here on this is process 0 of two, and the other says ``answers(what this one says)``."""

    def become(answers=lambda said: said):
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(distributed, "everybodys", lambda said: [said, answers(said)])

    return become


@pytest.fixture
def options(folder, data, tmp_path):
    given = {"model": str(folder), "data": data["completion"], "out": str(tmp_path / "out"), "steps": 6}
    return lambda **more: sft.SFT(**given | {"batch_size": 8, "checkpoint_every": 2} | more)


def test_no_checkpoint_is_removed_before_all_agree_on_the_step(options, two, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(fitting.Fit, "save", lambda *_: 1 / 0)  # as if the run was stopped at its end
        with pytest.raises(ZeroDivisionError):
            sft.run(options())
    saved = tmp_path / "out.unfinished" / "checkpoints"
    assert checkpoints.complete(saved) == [2, 4, 6]
    monkeypatch.setattr(several, "check_shared", lambda out: None)
    two(lambda said: said.replace('"step": "2"', '"step": "4"'))
    with pytest.raises(ValueError, match=r"^step is 2 on process 0 and 4 on process 1; start all with the same$"):
        sft.run(options(resume="2"))
    assert checkpoints.complete(saved) == [2, 4, 6]


@pytest.mark.parametrize(
    ("error", "agreed"),
    [
        (urllib.error.HTTPError("http://here", 404, "no such row", None, None), False),
        (ValueError("row 7 is bad"), False),
        (signals.Stopped("SIGTERM"), True),
        (SystemExit(2), True),
    ],
)
def test_only_an_end_that_all_agreed_on_leaves_the_others_alone(monkeypatch, error, agreed):
    ended = []
    monkeypatch.setattr(distributed, "start", lambda *_, **__: None)
    monkeypatch.setattr(distributed, "give_up", ended.append)
    with pytest.raises(type(error)), distributed.joined("here:1", 2, 0):
        raise error
    assert ended == ([] if agreed else [error])


def each_says(monkeypatch, outs):
    """What ``check_shared`` says in processes with these --out, which are threads here."""
    me, together, said = threading.local(), threading.Barrier(len(outs), timeout=20), {}

    def everybodys(value):
        said[me.i] = value
        together.wait()
        everyones = [said[i] for i in range(len(outs))]
        together.wait()
        return everyones

    def check(i):
        me.i = i
        try:
            several.check_shared(outs[i])
        except ValueError as e:
            return str(e)

    monkeypatch.setattr(several, "jax", types.SimpleNamespace(
        process_count=lambda: len(outs), process_index=lambda: me.i
    ))  # fmt: skip
    monkeypatch.setattr(distributed, "everybodys", everybodys)
    monkeypatch.setattr(several, "PATIENCE", 0.2)
    with futures.ThreadPoolExecutor(len(outs)) as pool:
        return list(pool.map(check, range(len(outs))))


def test_processes_that_share_the_folder_go_on_and_leave_nothing_in_it(tmp_path, monkeypatch):
    assert each_says(monkeypatch, [tmp_path / "out"] * 3) == [None] * 3
    assert not [*tmp_path.iterdir()]


def test_a_folder_that_one_process_has_for_itself_ends_all(tmp_path, monkeypatch):
    outs = [tmp_path / host / "out" for host in ("here", "here", "there")]
    for out in outs:  # of an earlier run, with a token that was left
        runs.unfinished(out).mkdir(parents=True, exist_ok=True)
        (runs.unfinished(out) / "run.json").write_text("{}")
    (runs.unfinished(outs[2]) / runs.TOKEN).write_text("of another start")
    message = f"--out {outs[2]} of process 2 is not the folder that process 0 writes to; give one that all share"
    assert each_says(monkeypatch, outs) == [message] * 3
    assert [path.name for path in runs.unfinished(outs[0]).iterdir()] == ["run.json"]
    runs.check_out(outs[2], overwrite=False)  # the token of a start that was killed is in nobody's way


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_each_thing_is_judged_once_and_all_hear_of_it(monkeypatch, processes):
    asked, numbers = [], [0.1, math.nan, -2.5, 1 / 3]
    judge = lambda me, at: asked.append((me, [*range(4)[at]])) or numbers[at]
    parts = [json.dumps(numbers[i * (-(-4 // processes)) :][: -(-4 // processes)]) for i in range(processes)]
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    for me in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda me=me: me)
        monkeypatch.setattr(distributed, "everybodys", lambda said, me=me: [*parts[:me], said, *parts[me + 1 :]])
        np.testing.assert_array_equal(several.judged(partial(judge, me), 4), numbers)
    assert sorted(i for _, mine in asked for i in mine) == [0, 1, 2, 3]
    assert 0 in dict(asked)[0]  # whose texts are shown


def test_all_or_none_find_that_the_run_has_ended(options, two, monkeypatch):
    """Or some would end, and the others wait for them."""
    monkeypatch.setattr(keeping, "finished", lambda options: True)
    two(lambda said: said.replace("True", "False"))
    with pytest.raises(ValueError, match=r"^that the model is at --out already is True on process 0 and False on proc"):
        cli.trained(lambda options: 1 / 0)(options())


def test_one_process_asks_nobody_for_the_folder(tmp_path):
    several.check_shared(tmp_path / "out")
    assert not [*tmp_path.iterdir()]


def test_a_step_is_not_captured_in_several_processes(options, two, tmp_path):
    two()
    with pytest.raises(ValueError, match=r"^--capture: puts down whole arrays, of which each process has a part; "):
        sft.run(options(capture=(1,)))
    assert not [*tmp_path.iterdir()]


def test_each_process_writes_a_profile_of_its_own(two, tmp_path, monkeypatch):
    two()
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    fit = types.SimpleNamespace(options=types.SimpleNamespace(out=tmp_path / "out", profile=(2, 3)))
    with fitting.Fit._profiled(fit) as (profile,):
        assert profile.folder == tmp_path / "out.unfinished" / "profile" / "1"
