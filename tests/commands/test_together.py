"""What several processes agree on before they begin, as one of them sees it: the others' words are made up here."""

import urllib.error

import jax
import pytest

from pt_jax import signals
from pt_jax.commands import sft
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
        patched.setattr(sft.common.Fit, "save", lambda *_: 1 / 0)  # as if the run was stopped at its end
        with pytest.raises(ZeroDivisionError):
            sft.run(options())
    saved = tmp_path / "out.unfinished" / "checkpoints"
    assert checkpoints.complete(saved) == [2, 4, 6]
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
