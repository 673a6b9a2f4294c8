"""The mask of the top k against a stable sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import top_k_mask

quick = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def by_numpy(x, k):
    order = np.lexsort((np.broadcast_to(np.arange(x.shape[-1]), x.shape), -x, ~np.isnan(x)))
    mask = np.zeros(x.shape, bool)
    np.put_along_axis(mask, order[:, :k], True, -1)
    return mask


def rows(kind, seed, n):
    rng = np.random.default_rng(seed)
    return {
        "random": lambda: rng.normal(size=(5, n)),
        "tied": lambda: rng.integers(-1, 2, size=(5, n)).astype(float),
        "negative": lambda: -1 - rng.random((5, n)),
        "equal": lambda: np.full((5, n), -0.5),
        "infinite": lambda: rng.choice([-np.inf, -0.0, 0.0, np.inf], size=(5, n)),
        "nan": lambda: np.where(rng.random((5, n)) < 0.2, -np.nan, rng.normal(size=(5, n))),
    }[kind]()


@quick
@given(
    kind=st.sampled_from(["random", "tied", "negative", "equal", "infinite", "nan"]),
    n=st.sampled_from([1, 7, 64]),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**16),
    implementation=st.sampled_from(["xla", "reference"]),
)
def test_equals_a_stable_sort(kind, n, share, seed, implementation):
    k = max(1, round(share * n))
    x = rows(kind, seed, n).astype(np.float32)
    got = top_k_mask(jnp.asarray(x), k, implementation=implementation)
    np.testing.assert_array_equal(got, by_numpy(x, k))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_every_width_of_number(dtype):
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 40)), dtype)
        want = by_numpy(np.asarray(x, np.float64), 11)
        np.testing.assert_array_equal(top_k_mask(x, 11), want)


def test_k_out_of_range():
    with pytest.raises(ValueError, match=r"top_k_mask: k = 9 must be a whole number in \[1, 8\]"):
        top_k_mask(jnp.zeros((2, 8)), 9)
