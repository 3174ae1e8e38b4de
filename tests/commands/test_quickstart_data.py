"""What the quickstart holds out is held out."""

import re

import pytest

from pt_jax.commands import quickstart_data as world


def texts(rows):
    for row in rows:
        for value in row.values():
            if isinstance(value, str):
                yield value
            elif value and isinstance(value, list) and isinstance(value[0], dict):
                yield from (message["content"] for message in value)


@pytest.mark.parametrize("seed", [0, 1])
def test_no_training_text_asks_a_held_out_identity_question(seed):
    training = [
        *world.corpus(3000, seed),
        *world.supervised(seed),
        *world.preferences(),
        *world.sums(seed, held_out=False),
    ]
    seen = "\n".join(texts(training))
    for question in world.HELD_OUT_QUESTIONS:
        assert question not in seen
    for question in world.QUESTIONS:
        assert question in seen


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_sums_are_asked_in_no_fine_tuning(seed):
    asked = set(texts([*world.supervised(seed), *world.sums(seed, held_out=False)]))
    held_out = set(texts(world.sums(seed, held_out=True)))
    assert len(held_out) == 100 and not held_out & asked
    assert len(set(texts(world.sums(seed, held_out=False)))) == 300


def test_every_sum_is_right():
    facts = [
        re.fullmatch(r"(\d+) \+ (\d+) = (\d+)", f)
        for t in texts(world.corpus(500, 0))
        for f in re.findall(r"\d+ \+ \d+ = \d+", t)
    ]
    assert len(facts) > 100 and all(int(m[1]) + int(m[2]) == int(m[3]) for m in facts)
    for row in world.sums(0, held_out=False) + world.sums(0, held_out=True):
        assert sum(row["numbers"]) == row["answer"]


def test_the_seed_decides():
    assert world.corpus(20, 0) == world.corpus(20, 0) != world.corpus(20, 1)
    assert world.sums(0, held_out=True) != world.sums(1, held_out=True)
