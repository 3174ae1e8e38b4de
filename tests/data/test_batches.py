import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pt_jax.data import batches


@given(count=st.integers(1, 23), batch=st.integers(1, 40), seed=st.integers(0, 5))
def test_every_row_comes_once_an_epoch(count, batch, seed):
    epochs = 3
    steps = -(-epochs * count // batch)
    drawn = np.concatenate([batches.rows_of_step(count, batch, step, seed=seed) for step in range(steps)])
    for epoch in drawn[: epochs * count].reshape(epochs, count):
        assert sorted(epoch) == list(range(count))


@given(count=st.integers(1, 23), batch=st.integers(1, 40), step=st.integers(0, 1000))
def test_a_step_says_which_rows_whatever_was_asked_before(count, batch, step):
    expected = batches.rows_of_step(count, batch, step, seed=3)
    np.random.seed(step)
    batches.rows_of_step(count, batch, step + 1, seed=3)
    got = batches.rows_of_step(count, batch, step, seed=3)
    assert got.shape == (batch,)
    np.testing.assert_array_equal(got, expected)


def test_the_order_is_shuffled_anew_each_epoch_and_by_each_seed():
    orders = [batches.rows_of_step(50, 50, epoch, seed=seed).tolist() for epoch in range(3) for seed in range(3)]
    assert len({*map(tuple, orders)}) == 9
    assert list(range(50)) not in orders


def test_a_step_of_any_size_reads_from_one_sequence():
    one = np.concatenate([batches.rows_of_step(7, 1, step, seed=0) for step in range(28)])
    four = np.concatenate([batches.rows_of_step(7, 4, step, seed=0) for step in range(7)])
    np.testing.assert_array_equal(one, four)


@pytest.mark.parametrize(("count", "batch"), [(0, 1), (3, 0), (3, -1)])
def test_a_batch_of_nothing_is_refused(count, batch):
    with pytest.raises(ValueError, match=rf"a batch of {batch} rows cannot be taken from {count}"):
        batches.rows_of_step(count, batch, 0, seed=0)


def test_a_bucket_holds_its_row_and_little_more():
    lengths = np.arange(1, 5000)
    buckets = np.array([batches.bucket(int(n)) for n in lengths])
    assert (buckets >= lengths).all()
    assert (buckets - lengths < 8)[:64].all()
    assert ((buckets - lengths)[64:] / buckets[64:] < 0.2).all()
    assert (buckets % 8 == 0).all()
    assert (np.diff(buckets) >= 0).all()
    np.testing.assert_array_equal([batches.bucket(int(n)) for n in buckets], buckets)  # a bucket is its own


def test_buckets_are_few():
    """Each is one trace of every jitted function."""
    assert [*dict.fromkeys(map(batches.bucket, range(1, 257)))] == [
        8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256,
    ]  # fmt: skip


ROWS = [np.array([5, 6, 7], np.int32), np.array([], np.int32), np.array([8], np.int32)]


def test_rows_are_filled_up_on_the_right():
    got = batches.pad(ROWS, 4, -1)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, [[5, 6, 7, -1], [-1, -1, -1, -1], [8, -1, -1, -1]])


def test_rows_are_filled_up_on_the_left():
    np.testing.assert_array_equal(
        batches.pad(ROWS, 4, -1, left=True), [[-1, 5, 6, 7], [-1, -1, -1, -1], [-1, -1, -1, 8]]
    )


@pytest.mark.parametrize("left", [False, True])
def test_a_full_row_is_left_as_it_is(left):
    np.testing.assert_array_equal(batches.pad([np.array([True, False])], 2, True, left=left), [[True, False]])


@pytest.mark.parametrize("left", [False, True])
def test_a_row_that_is_too_long_is_refused_and_not_cut(left):
    with pytest.raises(ValueError, match=r"row 1 has 3 tokens, more than the length of 2"):
        batches.pad([np.array([1]), np.array([1, 2, 3])], 2, 0, left=left)
