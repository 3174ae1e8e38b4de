import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pt_jax.data.encode import Example
from pt_jax.data.packing import lay, pack, plan, share

LENGTHS = st.lists(st.integers(1, 10), min_size=1, max_size=7)


def fewest(lengths, length):
    """By trying every row for every text, over and over."""
    best = len(lengths)

    def place(i, rooms):
        nonlocal best
        if len(rooms) >= best:
            return
        if i == len(lengths):
            best = len(rooms)
            return
        for row in range(len(rooms)):
            if rooms[row] >= lengths[i]:
                place(i + 1, [room - lengths[i] * (j == row) for j, room in enumerate(rooms)])
        place(i + 1, [*rooms, length - lengths[i]])

    place(0, [])
    return best


@given(LENGTHS)
def test_every_text_has_one_place_and_no_row_is_too_full(lengths):
    rows = plan(lengths, 10)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 10 for row in rows)
    assert rows == plan(lengths, 10) and rows == sorted(rows) and all(row == sorted(row) for row in rows)


@given(LENGTHS)
def test_rows_are_about_as_few_as_can_be(lengths):
    assert len(plan(lengths, 10)) <= 11 / 9 * fewest(lengths, 10) + 6 / 9


def test_the_longest_come_first_and_go_where_the_least_room_is_left():
    assert plan([1, 2, 6, 7, 3], 10) == [[0, 1, 2], [3, 4]]  # first come, first served would take three rows
    assert plan([5, 6, 4, 1], 10) == [[0, 3], [1, 2]]
    assert plan([8, 5, 2], 10) == [[0, 2], [1]]


def test_thousands_of_texts_are_planned_at_once_and_fill_their_rows():
    lengths = np.random.default_rng(0).integers(1, 300, 20_000).tolist()
    rows = plan(lengths, 512)
    assert sum(lengths) / (len(rows) * 512) > 0.99


def example(n, scored, source=""):
    return Example(np.arange(10 * n, 11 * n, dtype=np.int32)[:n], np.arange(n) >= n - scored, source)


EXAMPLES = [example(5, 2), example(3, 3), example(7, 1), example(2, 1), example(8, 8)]


@pytest.mark.parametrize("pad_token", [0, 50])
def test_rows_hold_every_example_and_nothing_else(pad_token):
    packed = pack(EXAMPLES, length=11, pad_token=pad_token)
    assert packed.tokens.shape == (3, 11) and packed.tokens.dtype == packed.seen.dtype == np.int32
    found = np.zeros_like(packed.seen)
    for e, (row, start) in zip(EXAMPLES, packed.places):
        n = len(e.tokens)
        place = row, slice(start, start + n)
        np.testing.assert_array_equal(packed.tokens[place], e.tokens)
        assert len(set(packed.seen[place].tolist())) == 1 and packed.seen[place][0] > 0
        assert not packed.mask[row, start]  # what stands before it is another text
        np.testing.assert_array_equal(packed.mask[place][1:], e.mask[1:])
        found[place] += 1
    np.testing.assert_array_equal(found, packed.seen > 0)
    assert (packed.tokens[found == 0] == pad_token).all() and not packed.mask[found == 0].any()
    for numbers in packed.seen:  # 1, 2, 3, ... in order, padding behind
        shown = numbers[numbers > 0]
        assert (np.diff(shown) >= 0).all() and set(shown.tolist()) == set(range(1, shown.max() + 1))
        assert (numbers[len(shown) :] == 0).all()
    assert packed.filled == 25 / 33
    assert EXAMPLES[1].mask[0]  # what is handed in stays as it was


def test_rows_may_be_more_than_are_needed():
    few, more = (pack(EXAMPLES, length=11, pad_token=3, rows=rows) for rows in (None, 5))
    np.testing.assert_array_equal(more.tokens[:3], few.tokens)
    assert not more.seen[3:].any() and not more.mask[3:].any() and (more.tokens[3:] == 3).all()


def test_what_is_known_of_an_example_goes_where_it_stands():
    packed = pack(EXAMPLES, length=11, pad_token=0, rows=4)
    values = np.arange(5 * 9, dtype=np.float32).reshape(5, 9) + 1
    out = lay(values, packed)
    assert out.shape == (4, 11) and out.dtype == np.float32 and not out[packed.seen == 0].any()
    for value, e, (row, start) in zip(values, EXAMPLES, packed.places):
        np.testing.assert_array_equal(out[row, start : start + len(e.tokens)], value[: len(e.tokens)])


def test_an_example_that_fits_no_row_is_named():
    with pytest.raises(
        ValueError, match=r"^rows.jsonl:7: has 12 tokens, a packed row has room for 11; make rows longer$"
    ):
        pack([*EXAMPLES, example(12, 1, "rows.jsonl:7")], length=11, pad_token=0)
    with pytest.raises(ValueError, match=r"^example 2: has 7 tokens"):
        pack(EXAMPLES[:3], length=6, pad_token=0)


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match=r"^5 examples take 3 rows of 11 tokens, there are 2$"):
        pack(EXAMPLES, length=11, pad_token=0, rows=2)


# ---- a shared beginning

PAIR = [Example(np.int32([5, 6, 7, *rest]), np.arange(3 + len(rest)) >= 3) for rest in ([1, 2], [1], [3, 4, 8])]


@pytest.mark.parametrize("pad_token", [0, 7])
def test_a_group_is_a_row_of_its_beginning_and_its_branches(pad_token):
    """The last token of the beginning is repeated before each answer, which is predicted from it."""
    shared = share([PAIR, PAIR[1:]], length=13, pad_token=pad_token)
    assert shared.tokens.dtype == shared.seen.dtype == np.int32 and shared.seen.shape == (2, 13, 2)
    fill = [pad_token] * 6
    assert shared.tokens.tolist() == [[5, 6, 7, 1, 2, 7, 1, 7, 3, 4, 8, *fill[:2]], [5, 6, 7, 1, 7, 3, 4, 8, *fill[:5]]]
    assert shared.seen[..., 0].tolist() == [[1] * 11 + [0] * 2, [1] * 8 + [0] * 5]
    assert shared.seen[0, :, 1].tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 3, 0, 0]
    assert np.flatnonzero(shared.mask[0]).tolist() == [3, 4, 6, 8, 9, 10]
    assert np.flatnonzero(shared.mask[1]).tolist() == [3, 5, 6, 7]


def test_what_is_scored_is_not_shared_even_where_it_is_alike():
    """PAIR[0] and PAIR[1] both go on with a 1: each answer has its own."""
    shared = share([PAIR[:2]], length=8, pad_token=0)
    assert shared.tokens.tolist() == [[5, 6, 7, 1, 2, 7, 1, 0]] and shared.mask.sum() == 3


def test_texts_without_a_common_beginning_are_branches_from_nothing():
    texts = [Example(np.int32([1, 2]), np.ones(2, bool)), Example(np.int32([3, 4, 5]), np.ones(3, bool))]
    shared = share([texts], length=6, pad_token=0)
    assert shared.tokens.tolist() == [[1, 2, 3, 4, 5, 0]] and shared.seen[0, :, 1].tolist() == [1, 1, 2, 2, 2, 0]
    assert shared.mask.tolist() == [[False, True, False, True, True, False]]  # nothing predicts a text's first token


def test_a_group_that_does_not_fit_is_named():
    with pytest.raises(
        ValueError, match=r"^group 1: takes 11 tokens together, a row has room for 10; make rows longer$"
    ):
        share([PAIR[1:], PAIR], length=10, pad_token=0)
    with pytest.raises(ValueError, match=r"^rows.jsonl:3: takes 11 tokens together"):
        share([[dataclasses.replace(e, source="rows.jsonl:3") for e in PAIR]], length=10, pad_token=0)
