import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pt_jax import weights
from pt_jax.objectives import overlong


@given(st.lists(st.lists(st.integers(0, 40), min_size=3, max_size=3), min_size=2, max_size=2))
def test_the_punishment_grows_over_the_cache(lengths):
    expected = [
        [0 if n <= 12 else (12 - n) / 8 if n <= 20 else -1 for n in row] for row in lengths
    ]  # the three cases of the paper
    got = overlong.soft_overlong(np.array(lengths), max_length=20, cache=8)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_the_papers_lengths():
    """16384 tokens are expected, 4096 more are the cache."""
    got = overlong.soft_overlong(np.array([[1, 16384, 18432, 20480, 30000]]))
    np.testing.assert_array_equal(got, [[0, 0, -0.5, -1, -1]])


def test_an_answer_that_was_cut_off_neither_teaches_nor_counts():
    mask = np.array([[True, True, False], [True, True, True], [False] * 3])
    kept = overlong.without_unfinished(mask, np.array([True, False, True]))
    np.testing.assert_array_equal(kept, [[1, 1, 0], [0, 0, 0], [0, 0, 0]])
    alone = weights.sequence_mean(mask[:1])
    np.testing.assert_array_equal(weights.sequence_mean(kept)[:1], alone)


def test_the_result_is_a_mask_to_every_function_of_tokens():
    mask, x = np.ones((2, 3), bool), np.float32([[1, 2, 3], [np.nan] * 3])
    kept = overlong.without_unfinished(mask, np.array([True, False]))
    np.testing.assert_array_equal(weights.scored(kept, x=x)[0], [[1, 2, 3], [0, 0, 0]])
