"""What a compiled program sends between devices, read from its text."""

import collections
import re

NAMES = "all-gather|all-to-all|collective-permute|collective-broadcast|all-reduce|reduce-scatter|ragged-all-to-all"


def moved(program) -> collections.Counter:
    """(collective, type and shape of an array that comes out of it) -> how often it stands in the program."""
    out = collections.Counter()
    text = re.sub(r"/\*.*?\*/", "", program.as_text())
    for shapes, name in re.findall(rf"= ([^=]*?) ({NAMES})(?:-start)?\(", text):
        for shape in re.findall(r"\w+\[[\d,]*\]", shapes):
            out[name, shape] += 1
    return out


def numbers(shape: str) -> int:
    """How many numbers an array of this shape has.

    >>> numbers("f32[2,3]"), numbers("f32[]")
    (6, 1)
    """
    out = 1
    for n in re.findall(r"\d+", shape[shape.index("[") :]):
        out *= int(n)
    return out
