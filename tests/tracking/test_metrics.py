"""The file of metrics: what is logged is what is read, whatever happened to the process."""

import json
import math

import pytest

from pt_jax.tracking.metrics import JsonlLog, read


def lines(path):
    return path.read_bytes().split(b"\n")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_every_digit_of_a_float_comes_back(path):
    values = [0.1 + 0.2, 1 / 3, 1e-310, -0.0, 1e300, 12345678901234567.0]
    with JsonlLog(path) as log:
        for step, value in enumerate(values, 1):
            log.log(step, "sft", **{"rewards/margins": value})
    got = [r["rewards/margins"] for r in read(path)]
    assert [v.hex() for v in got] == [v.hex() for v in values]


def test_nan_and_infinities_come_back_from_lines_that_are_strict_json(path):
    with JsonlLog(path) as log:
        log.log(1, "dpo", loss=math.nan, top=math.inf, bottom=-math.inf)

    def forbidden(name):
        raise AssertionError(f"{name} is not JSON")

    json.loads(lines(path)[0], parse_constant=forbidden)
    (record,) = read(path)
    assert math.isnan(record["loss"]) and record["top"] == math.inf and record["bottom"] == -math.inf


def test_a_line_is_the_stage_the_step_and_the_metrics_and_nothing_else(path):
    with JsonlLog(path) as log:
        log.log(3, "sft", loss=1.25, accuracy=1)
    assert path.read_bytes() == b'{"stage": "sft", "step": 3, "loss": 1.25, "accuracy": 1.0}\n'
    assert read(path) == [{"stage": "sft", "step": 3, "loss": 1.25, "accuracy": 1.0}]


def test_a_line_is_on_disk_before_the_next_call(path):
    with JsonlLog(path) as log:
        log.log(1, "sft", loss=1.0)
        assert len(read(path)) == 1


def test_a_torn_last_line_is_left_out_with_a_warning(path):
    with JsonlLog(path) as log:
        log.log(1, "sft", loss=1.0)
        log.log(2, "sft", **{"größe": 0.5})
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first + 1, len(whole) - 1):  # at the last byte only the newline is missing
        path.write_bytes(whole[:cut])
        with pytest.warns(UserWarning, match="line 2: cut short"):
            assert [r["step"] for r in read(path)] == [1]
    path.write_bytes(whole[:-1])
    assert [r["step"] for r in read(path)] == [1, 2]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"stage": "sft", "st', "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1, 2]", 'an object with a "stage"'),
        (b'{"stage": "sft", "loss": 1.0}', '"step"'),
        (b'{"stage": "sft", "step": 1, "loss": "high"}', "loss is 'high', not a number"),
    ],
)
def test_a_broken_line_is_named_with_its_file(path, line, why):
    path.write_bytes(b'{"stage": "sft", "step": 1}\n' + line + b'\n{"stage": "sft", "step": 3}\n')
    with pytest.raises(ValueError, match=rf"metrics\.jsonl, line 2: .*{why}"):
        read(path)


def test_a_broken_last_line_that_ends_in_a_newline_is_no_torn_line(path):
    path.write_bytes(b'{"stage": "sft", "st\n')
    with pytest.raises(ValueError, match="line 1: is not JSON"):
        read(path)


def test_an_existing_file_is_never_overwritten(path):
    path.write_text("precious")
    with pytest.raises(ValueError, match="exists already; give another name"):
        JsonlLog(path)
    assert path.read_text() == "precious"


def test_a_file_that_cannot_be_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="cannot be created"):
        JsonlLog(tmp_path / "nowhere" / "metrics.jsonl")
    with pytest.raises(ValueError, match="cannot be read"):
        read(tmp_path / "nowhere.jsonl")


def test_what_is_not_a_number_is_refused_and_leaves_no_line(path):
    with JsonlLog(path) as log:
        for value in ("0.5", None, [1.0]):
            with pytest.raises(ValueError, match=r"loss must be a number, got .*float\(\)"):
                log.log(1, "sft", loss=value)
    assert path.read_bytes() == b""


def test_a_file_that_goes_on_has_the_lines_of_one_that_was_never_cut(tmp_path):
    straight, resumed = tmp_path / "straight.jsonl", tmp_path / "resumed.jsonl"
    with JsonlLog(straight) as log:
        for step in range(5):
            log.log(step, "sft", loss=step / 3)
    with JsonlLog(resumed) as log:
        for step in range(4):
            log.log(step, "sft", loss=step / 3)
    with open(resumed, "ab") as file:
        file.write(b'{"stage": "sft", "step": 1')  # cut short by a crash
    with JsonlLog(resumed, after=2) as log:
        for step in (3, 4):
            log.log(step, "sft", loss=step / 3)
    assert resumed.read_bytes() == straight.read_bytes()
    with JsonlLog(tmp_path / "new.jsonl", after=3) as log:
        log.log(4, "sft", loss=1.0)
    assert len(read(tmp_path / "new.jsonl")) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new.jsonl", "resumed.jsonl", "straight.jsonl"]
