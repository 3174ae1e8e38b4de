"""Metrics of a run as JSON lines: one object a line, whole or not there, the same bytes for the same run.

A line is ``{"stage": "sft", "step": 3, "loss": 1.25}``. JSON has no NaN and no infinity; they are written as the
strings "NaN", "Infinity" and "-Infinity", and ``read`` gives the floats back.
"""

import json
import math
import numbers
import pathlib
import warnings

_NAMES = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class JsonlLog:
    """Creates a file, or goes on with one, and writes one line a call, flushed at once; a context manager.

    Nothing is written that the caller did not hand in (no clock, no host name), and floats are written with all
    their digits: a bitwise rerun makes an identical file.

    Args:
      path: the file; its folder must exist.
      after: the last step that an existing file is to keep (see ``cut``); None when there is to be no such file.

    Raises:
      ValueError: the file exists already, or cannot be created.
    """

    def __init__(self, path, after: int | None = None):
        self.path = pathlib.Path(path)
        if after is not None:
            cut(self.path, after)
        try:
            self._file = open(self.path, "xb" if after is None else "ab")  # noqa: SIM115 (closed by close)
        except FileExistsError as e:
            raise ValueError(f"{self.path}: exists already; give another name, or move it away first") from e
        except OSError as e:
            raise ValueError(f"{self.path}: cannot be created ({e.strerror}); give another place") from e

    def log(self, step: int, stage: str, **metrics: float) -> None:
        """Writes one line.

        Args:
          step: how many steps of the stage are done.
          stage: the name of the stage.
          **metrics: name to number. Names with a slash go in as ``**{"rewards/margins": 0.5}``.

        Raises:
          ValueError: a metric is not a plain number, for example an array that is still on its device.
        """
        record = {"stage": stage, "step": int(step)}
        record.update((name, _written(name, value)) for name, value in metrics.items())
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def cut(path, step: int) -> None:
    """Takes the lines of later steps, and one that a crash cut short, out of a file of lines that have a "step".

    A run that goes on from a checkpoint writes them again. The file is replaced in one move; one that is not there is
    let be.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        return
    kept, new = [], fresh(path)
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            whole = json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            whole = False
        kept += [line + b"\n"] if whole else []
    new.write_bytes(b"".join(kept))
    new.replace(path)


def fresh(path) -> pathlib.Path:
    """Where the lines that ``cut`` keeps are until they replace the file: there after a crash in between."""
    path = pathlib.Path(path)
    return path.with_name(f".{path.name}.new")


def append(path, step: int, records) -> None:
    """Adds lines that are of a step, such as samples with their texts, to a file.

    Args:
      path: the file; made when it is not there.
      step: of all of them; they can be ``cut``.
      records: dicts of strings and numbers.
    """
    plain = lambda name, value: value if isinstance(value, str) else _written(name, value)
    with open(path, "a") as file:
        for record in records:
            line = {"step": step} | {name: plain(name, value) for name, value in record.items()}
            file.write(json.dumps(line, allow_nan=False) + "\n")


def read(path) -> list[dict]:
    """The records of a file that ``JsonlLog`` wrote, in order.

    Args:
      path: the file. A last line that a crash cut short is left out, with a warning.

    Returns:
      One dict a line: "stage", "step" and the metrics, NaN and infinities as floats.

    Raises:
      ValueError: the file cannot be read, or a line is not such a record; file and line are named.
    """
    try:
        lines = pathlib.Path(path).read_bytes().split(b"\n")
    except OSError as e:
        raise ValueError(f"{path}: cannot be read ({e.strerror}); give a file that JsonlLog wrote") from e
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            records.append(_record(line))
        except ValueError as e:
            if number == len(lines):  # whole lines end in a newline, so what follows the last one was cut short
                warnings.warn(f"{path}, line {number}: cut short, left out", stacklevel=2)
            else:
                raise ValueError(f"{path}, line {number}: {e}; mend or remove the line") from e
    return records


def check(name: str, value) -> None:
    """Fails unless a metric is a plain number."""
    if not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be a number, got {type(value).__name__}; fetch it with float()")


def _written(name, value):
    check(name, value)
    value = float(value)
    if math.isnan(value):
        return "NaN"
    return value if math.isfinite(value) else "Infinity" if value > 0 else "-Infinity"


def _record(line: bytes) -> dict:
    try:
        record = json.loads(line.decode())
    except ValueError as e:
        raise ValueError(f"is not JSON ({e})") from e
    fields = record if isinstance(record, dict) else {}
    if not isinstance(fields.get("stage"), str) or type(fields.get("step")) is not int:
        raise ValueError('is not an object with a "stage" and a whole "step"')
    for name, value in record.items():
        if name in ("stage", "step"):
            continue
        if isinstance(value, str) and value in _NAMES:
            record[name] = _NAMES[value]
        elif type(value) not in (int, float):
            raise ValueError(f"{name} is {value!r}, not a number")
    return record
