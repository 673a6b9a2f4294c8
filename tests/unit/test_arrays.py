"""Activations in memory: every row once an epoch, pure in (seed, step), and checked first."""

import jax.numpy as jnp
import numpy as np
import pytest

from saejax.data.arrays import ArraySource, refuse_non_finite


def numbered(n: int, width: int = 3) -> np.ndarray:
    """Rows that say which they are."""
    return np.repeat(np.arange(n, dtype=np.float32)[:, None], width, axis=1)


@pytest.mark.parametrize(("n", "size"), [(12, 4), (14, 4), (5, 5), (7, 1)])
def test_an_epoch_holds_whole_batches_of_distinct_rows(n, size):
    source = ArraySource(numbered(n), size)
    per_epoch = n // size
    assert source.tokens_per_epoch == per_epoch * size and source.d_model == 3
    epochs = []
    for epoch in range(3):
        batches = [source.batch(epoch * per_epoch + i) for i in range(per_epoch)]
        assert all(batch.shape == (size, 3) for batch in batches)
        seen = np.concatenate(batches)[:, 0]
        assert len(np.unique(seen)) == per_epoch * size
        epochs.append(seen.tolist())
    if n > 5:
        assert epochs[0] != epochs[1] != epochs[2], "shuffled anew each epoch"
        assert epochs[0] != sorted(epochs[0])
    if n % size:
        left = {frozenset(range(n)) - frozenset(map(int, epoch)) for epoch in epochs}
        assert len(left) > 1, "not always the same rows are left out"


def test_a_batch_depends_on_seed_and_step_alone():
    source = ArraySource(numbered(20), 4)
    whole = [source.batch(step) for step in range(13)]
    for start in (0, 3, 5, 11):
        batches = ArraySource(numbered(20), 4).iterate(start)
        for step in range(start, 13):
            np.testing.assert_array_equal(next(batches), whole[step])
    for step in (12, 0, 7, 7):  # in any order
        np.testing.assert_array_equal(source.batch(step), whole[step])
    other = ArraySource(numbered(20), 4, seed=1)
    assert not np.array_equal(other.batch(0), whole[0])


def test_a_process_gets_its_rows_of_the_global_batch():
    source, ranges = ArraySource(numbered(20), 8), ((0, 1), (3, 5))
    for step in range(5):
        np.testing.assert_array_equal(source.batch(step, ranges), source.batch(step)[[0, 3, 4]])
    np.testing.assert_array_equal(next(source.iterate(4, ranges)), source.batch(4)[[0, 3, 4]])
    with pytest.raises(ValueError, match="must be ascending, disjoint"):
        source.batch(0, ((3, 5), (0, 1)))


def test_the_sample_is_the_start_of_the_stream():
    source = ArraySource(numbered(20), 4)
    stream = np.concatenate([source.batch(step) for step in range(5)])
    for n in (1, 4, 7, 20):
        np.testing.assert_array_equal(source.sample_rows(n), stream[:n])


def test_the_fingerprint_is_of_shape_type_and_content():
    rows = numbered(6)
    same = [rows, rows.copy(), np.asfortranarray(rows), rows[::-1][::-1]]
    assert len({ArraySource(r, 2).fingerprint for r in same}) == 1
    changed = rows.copy()
    changed[5, 2] += 1e-6 + changed[5, 2] * 1e-6
    others = [rows, changed, rows.astype(np.float64), rows.reshape(9, 2), rows[::-1]]
    assert len({ArraySource(r, 2).fingerprint for r in others}) == len(others)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32, np.float64])
def test_any_floating_dtype(dtype):
    source = ArraySource(numbered(8).astype(dtype), 4)
    assert source.batch(0).dtype == dtype
    broken = numbered(8).astype(dtype)
    broken[2] = np.inf
    with pytest.raises(
        ValueError, match="1 of 8 activations hold NaN or infinity, the first at ro"
    ):
        ArraySource(broken, 4)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (numbered(6)[0], r"shape \(3,\) must be a matrix"),
        (numbered(6)[None], r"shape \(1, 6, 3\) must be a matrix"),
        (np.float32(3), r"shape \(\) must be a matrix"),
        (numbered(6).astype(int), "dtype int64 must be floating-point"),
        (numbered(6) > 1, "dtype bool must be floating-point"),
        (numbered(6).astype(complex), "dtype complex128 must be floating-point"),
        (numbered(6).astype(object), "dtype object must be floating-point"),
        (numbered(3), "3 activations are fewer than batch_size = 4"),
    ],
)
def test_what_is_no_matrix_of_floats_is_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        ArraySource(rows, 4)


def test_non_finite_rows_are_counted_once_each():
    rows = numbered(10)
    refuse_non_finite(rows)
    rows[4] = np.nan
    rows[9, 1] = -np.inf
    with pytest.raises(ValueError, match=r"2 of 10 .* the first at row 4; remove them"):
        refuse_non_finite(rows)
    large = np.full((2, 2), 1e39)  # finite, but not in the float32 of training
    with pytest.raises(ValueError, match=r"2 of 2 .* infinity"):
        refuse_non_finite(large)
