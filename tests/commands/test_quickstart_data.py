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


# "twenty-four" before "twenty" and "four"
NAMES = sorted(world.WORDS.items(), key=lambda item: -len(item[1]))


def added(text):
    """The pairs of numbers that stand within a few words of each other, smaller first."""
    for number, name in NAMES:
        text = re.sub(rf"\b{name}\b", str(number), text)
    found = re.finditer(r"\b(?=(\d+)(?: plus | and | \+ )(\d+)\b)", text)
    return [tuple(sorted((int(m[1]), int(m[2])))) for m in found]


def test_a_pair_is_found_in_digits_and_in_words():
    assert added("What is forty plus ten? 40 + 10 = 50. Add 3 and twenty-four.") == [(10, 40), (10, 40), (3, 24)]
    for how, _ in enumerate(world.SUM_QUESTIONS):
        assert added(world.ask_sum(43, 20, how)) == [(20, 43)]


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_pairs_are_added_in_no_training_data(seed):
    """In neither order and no phrasing: what is asked of them cannot have been learnt by heart."""
    training = [
        *world.corpus(6000, seed),
        *world.supervised(seed),
        *world.preferences(),
        *world.sums(seed, held_out=False),
    ]
    seen = {pair for text in texts(training) for pair in added(text)}
    asked = [pair for text in texts(world.sums(seed, held_out=True)) for pair in added(text)]
    apart = set(world.pairs(seed, held_out=True))
    assert len(asked) == 100 and set(asked) <= apart and len(set(asked)) > 35 and len(apart) == 42
    assert len(seen) == 168 and not seen & apart
    assert len(set(texts(world.sums(seed, held_out=True)))) == 100
    assert len(set(texts(world.sums(seed, held_out=False)))) == len(world.sums(seed, held_out=False)) > 1000


def test_every_digit_of_a_held_out_sum_occurs_in_training_and_nothing_is_carried():
    """Otherwise the answer could not be known, or not by adding place by place."""
    place = lambda pairs: {
        (a // n % 10, b // n % 10, n) for x, y in pairs for a, b in ((x, y), (y, x)) for n in (1, 10)
    }
    for seed in (0, 1, 2):
        known, apart = (place(world.pairs(seed, held_out=held_out)) for held_out in (False, True))
        assert apart <= known and all(a + b < 10 for a, b, _ in known)


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
