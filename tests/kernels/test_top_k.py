"""Row-wise top-k against a numpy stable sort and `lax.top_k`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from pallas_kernels import top_k, top_k_mask
from pallas_kernels.top_k import xla

IMPLEMENTATIONS = ["xla", "reference"]
# (row length, k): searched in two stages, and by `lax.top_k` over whole rows.
TWO_STAGE = [(128, 1), (4096, 8), (1024, 3), (1024, 8), (264, 1), (2056, 8)]
PLAIN = [(120, 1), (512, 17), (1024, 9), (500, 8), (24, 1), (7, 7), (1, 1), (33, 1)]

quick = settings(max_examples=10, deadline=None, derandomize=True, database=None)


def by_numpy(x, k):
    """Descending value, then ascending index; NaN above every number."""
    order = np.lexsort((np.broadcast_to(np.arange(x.shape[-1]), x.shape), -x, ~np.isnan(x)))
    idx = order[..., :k]
    return np.take_along_axis(x, idx, -1), idx


def rows(kind, n, dtype, n_rows=9, seed=0):
    rng = np.random.default_rng(seed)
    x = {
        "random": lambda: rng.normal(size=(n_rows, n)),
        "tied": lambda: rng.integers(0, 3, size=(n_rows, n)).astype(float),
        # Ties below the group maxima: rare high values put their groups ahead of lower ones.
        "tied, few high": lambda: rng.choice(4, p=[0.93, 0.04, 0.02, 0.01], size=(n_rows, n)),
        "all negative": lambda: -1 - rng.random((n_rows, n)),
        "all equal": lambda: np.full((n_rows, n), 0.5),
        "zeros": lambda: rng.choice([-0.0, 0.0], size=(n_rows, n)),
        "infinite": lambda: rng.choice([-np.inf, 0.0, np.inf], size=(n_rows, n)),
        "some nan": lambda: np.where(rng.random((n_rows, n)) < 0.1, np.nan, rng.normal(size=n)),
    }[kind]()
    return x.astype(dtype)


KINDS = ["random", "tied", "tied, few high", "all negative", "all equal", "infinite", "some nan"]


def assert_top_k(x, k, implementation):
    values, indices = top_k(jnp.asarray(x), k, implementation=implementation)
    want_values, want_indices = by_numpy(x, k)
    np.testing.assert_array_equal(indices, want_indices)
    np.testing.assert_array_equal(values, want_values)
    assert indices.dtype == jnp.int32
    assert values.dtype == x.dtype


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", TWO_STAGE + PLAIN)
def test_every_kind_of_row(shape, implementation):
    n, k = shape
    for kind in KINDS:
        assert_top_k(rows(kind, n, np.float32), k, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float64(implementation):
    with jax.enable_x64(True):
        # These differ in float64 alone.
        x = 1 + 1e-12 * np.random.default_rng(0).permutation(512)[None, :].astype(np.float64)
        assert len(np.unique(x.astype(np.float32))) == 1
        assert_top_k(x, 8, implementation)


@quick
@given(
    groups=st.integers(16, 128),
    k=st.integers(1, 4),
    levels=st.integers(1, 6),
    seed=st.integers(0, 2**16),
    ragged=st.booleans(),
)
def test_two_stages_equal_one_under_heavy_ties(groups, k, levels, seed, ragged):
    n = 8 * groups + (5 if ragged else 0)
    x = np.random.default_rng(seed).geometric(0.85, size=(6, n)).clip(max=levels)
    x = x.astype(np.float32)
    values, indices = xla.top_k(jnp.asarray(x), k)
    want_values, want_indices = lax.top_k(jnp.asarray(x), k)
    np.testing.assert_array_equal(indices, want_indices)
    np.testing.assert_array_equal(values, want_values)


def sorts(n, k, n_rows=2):
    """How many `lax.top_k` the traced program holds."""
    program = jax.make_jaxpr(lambda x: xla.top_k_of_ordered(x, k))(jnp.zeros((n_rows, n)))
    return str(program).count("top_k[")


def test_two_stage_path_is_taken():
    assert [sorts(n, k) for n, k in TWO_STAGE] == [2] * len(TWO_STAGE)
    assert [sorts(n, k) for n, k in PLAIN] == [1] * len(PLAIN)


@pytest.mark.parametrize("n_rows, pieces", [(127, 1), (131, 16), (160, 16), (1000, 16)])
@pytest.mark.parametrize("n, k", [(40, 7), (264, 1)])
def test_any_number_of_rows_is_cut_into_pieces(n_rows, pieces, n, k):
    assert sorts(n, k, n_rows) == pieces * sorts(n, k)
    for kind in ("random", "tied", "some nan"):
        assert_top_k(rows(kind, n, np.float32, n_rows), k, "xla")


@pytest.mark.parametrize(
    "n_rows, n, k", [(127, 4096, 64), (131, 4096, 64), (64, 2048, 32), (160, 4096, 64), (9, 512, 1)]
)
def test_a_slice_of_the_result_does_not_make_it_a_sort(n_rows, n, k):
    x = jnp.zeros((n_rows, n))
    for function in (
        xla.top_k,
        lambda x, k: [part[..., : max(k // 2, 1)] for part in xla.top_k(x, k)],
    ):
        text = jax.jit(function, static_argnums=1).lower(x, k).compile().as_text()
        # The groups' numbers, of which there are k, are sorted by themselves.
        sorts = [line for line in text.splitlines() if re.search(r"\bsort\(", line)]
        assert all(f"[{n_rows},{k}]" in line for line in sorts), sorts
        assert "TopK" in text


@pytest.mark.parametrize("n, k", [(512, 4), (500, 4)])
def test_signed_zeros_tie(n, k):
    x = np.zeros((1, n), np.float32)
    x[0, ::3] = -0.0
    for implementation in IMPLEMENTATIONS:
        _, indices = top_k(jnp.asarray(x), k, implementation=implementation)
        np.testing.assert_array_equal(indices, [[0, 1, 2, 3]], err_msg=implementation)


@pytest.mark.parametrize("dtype, least", [("float32", 1e-40), ("bfloat16", 1e-40)])
@pytest.mark.parametrize("n", [128, 120])
def test_what_is_too_small_to_be_normal_is_zero_in_any_company(n, dtype, least):
    row = jnp.asarray([[0.0, least] + [-1.0] * (n - 2)], dtype)
    for others in (row, jnp.full_like(row, jnp.nan), jnp.ones_like(row)):
        for implementation in IMPLEMENTATIONS:
            x = jnp.concatenate([row, others])
            _, indices = top_k(x, 1, implementation=implementation)
            assert indices[0, 0] == 0, (implementation, others[0, 0])
        assert top_k_mask(x, 1)[0, 0]


@pytest.mark.parametrize("n, k", [(512, 4), (512, 17), (100, 4)])
@pytest.mark.parametrize("kind", [*KINDS, "zeros"])
def test_gradients_go_to_what_is_kept(n, k, kind):
    x = rows(kind, n, np.float32)
    weights = np.random.default_rng(1).normal(size=(len(x), k)).astype(np.float32)
    got = jax.grad(lambda x: (top_k(x, k)[0] * weights).sum())(jnp.asarray(x))
    want = np.zeros_like(x)
    np.put_along_axis(want, by_numpy(x, k)[1], weights, axis=1)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("n", [512, 500])
def test_nan_of_either_sign_is_selected(n):
    """What arithmetic makes (inf - inf) carries the sign bit on x86; it must not hide."""
    x = np.random.default_rng(0).normal(size=(1, n)).astype(np.float32)
    x[0, [3, 300]] = np.array([0xFFC00000, 0x7FC00000], np.uint32).view(np.float32)
    for implementation in IMPLEMENTATIONS:
        values, indices = top_k(jnp.asarray(x), 3, implementation=implementation)
        assert np.isnan(values[0, :2]).all(), implementation
        np.testing.assert_array_equal(indices[0, :2], [3, 300])


def test_leading_dimensions():
    x = rows("tied", 512, np.float32, n_rows=12).reshape(3, 4, 512)
    for implementation in IMPLEMENTATIONS:
        assert_top_k(x, 5, implementation)


@pytest.mark.parametrize("k", [0, -1, 9])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=rf"k = {k} must be a whole number in \[1, 8\]"):
        top_k(jnp.zeros((2, 8)), k)


def test_unknown_implementation():
    with pytest.raises(ValueError, match=r"top_k: implementation = 'cuda'.*reference.*xla"):
        top_k(jnp.zeros((2, 8)), 1, implementation="cuda")
