"""The operations of a training step against float64 numpy, on every kind of input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import pallas_kernels as pk
from pallas_kernels.topk_encode import xla as encode_xla
from pallas_kernels.weight_grads.xla import _parts

quick = settings(max_examples=12, deadline=None, derandomize=True, database=None)
IMPLEMENTATIONS = ["xla", "reference"]
KINDS = ["random", "whole numbers", "all negative", "all equal", "masked"]


def problem(kind, tokens, d, n, seed):
    """x, w and b; sums of whole numbers are exact in float32, so that ties are ties."""
    rng = np.random.default_rng(seed)
    draw = {"whole numbers": lambda s: rng.integers(-2, 3, s), "all equal": np.ones}
    x, w = (draw.get(kind, lambda s: rng.normal(size=s))(s) for s in ((tokens, d), (n, d)))
    b = rng.integers(-2, 3, n).astype(float) if kind != "all equal" else np.zeros(n)
    if kind == "all negative":
        x, w, b = np.abs(x), -np.abs(w), b - 3
    if kind == "masked":
        b[rng.random(n) < 0.5] = -np.inf
    return (np.float32(a) for a in (x, w, b))


def stable_top_k(h, k):
    order = np.lexsort((np.broadcast_to(np.arange(h.shape[1]), h.shape), -h), axis=-1)[:, :k]
    return np.take_along_axis(h, order, -1), order


@quick
@given(
    kind=st.sampled_from(KINDS),
    tokens=st.integers(1, 20),
    d=st.integers(1, 40),
    n=st.integers(1, 300),
    k=st.integers(1, 12) | st.just(300),
    seed=st.integers(0, 2**16),
    implementation=st.sampled_from(IMPLEMENTATIONS),
)
@example(kind="random", tokens=5, d=7, n=300, k=300, seed=0, implementation="xla")
@example(kind="whole numbers", tokens=5, d=7, n=64, k=64, seed=0, implementation="xla")
@example(kind="all negative", tokens=3, d=4, n=24, k=24, seed=0, implementation="xla")
@example(kind="all equal", tokens=3, d=4, n=16, k=16, seed=0, implementation="xla")
@example(kind="masked", tokens=5, d=7, n=41, k=41, seed=0, implementation="xla")
@example(kind="masked", tokens=2, d=1, n=1, k=1, seed=0, implementation="reference")
def test_topk_encode(kind, tokens, d, n, k, seed, implementation):
    k = min(k, n)
    x, w, b = problem(kind, tokens, d, n, seed)
    got = pk.topk_encode(x, w, b, k, implementation)
    h = x.astype(np.float64) @ w.T.astype(np.float64) + b
    want_values, want_indices = stable_top_k(h, k)
    np.testing.assert_allclose(got.values_BK, want_values, rtol=1e-5, atol=1e-5)
    if kind in ("whole numbers", "all equal"):
        np.testing.assert_array_equal(got.indices_BK, want_indices)
    chosen = np.take_along_axis(h, np.asarray(got.indices_BK), -1)
    np.testing.assert_allclose(chosen, want_values, rtol=1e-5, atol=1e-5)
    assert int(got.fallback_tokens) == 0


@pytest.mark.parametrize("tokens", [1, 8, 24, 37])
def test_blocks_of_tokens_change_nothing(monkeypatch, tokens):
    x, w, b = problem("whole numbers", tokens, 16, 64, 0)
    whole = pk.topk_encode(x, w, b, 5)
    monkeypatch.setattr(encode_xla, "_BLOCK_BYTES", {"cpu": 8 * 4 * 64})
    assert pk.block_tokens(64) == 8
    for got, want in zip(pk.topk_encode(x, w, b, 5), whole, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("where", ["x", "w", "b"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_surfaces(where, implementation):
    arrays = dict(zip("xwb", problem("random", 6, 8, 300, 0), strict=True))
    arrays[where].reshape(-1)[3] = np.nan
    values, indices, _ = pk.topk_encode(*arrays.values(), 2, implementation)
    tokens = [0] if where == "x" else range(6)
    assert np.isnan(np.asarray(values)[tokens, 0]).all()
    squared = pk.decode_loss(values, indices, arrays["w"], arrays["x"]).squared_error_B
    assert np.isnan(np.asarray(squared)[tokens]).all()


def code(tokens, k, n, seed):
    rng = np.random.default_rng(seed)
    indices = np.argsort(rng.random((tokens, n)), axis=1)[:, :k].astype(np.int32)
    return rng.normal(size=(tokens, k)), indices, rng


@settings(quick, max_examples=6)
@given(
    tokens=st.integers(1, 70),
    d=st.integers(1, 40),
    n=st.integers(1, 50),
    k=st.integers(1, 9),
    seed=st.integers(0, 2**16),
    implementation=st.sampled_from(IMPLEMENTATIONS),
)
def test_decode_loss_and_weight_grads(tokens, d, n, k, seed, implementation):
    values, indices, rng = code(tokens, min(k, n), n, seed)
    w, target = rng.normal(size=(n, d)), rng.normal(size=(tokens, d))
    dense = np.zeros((tokens, n))
    np.put_along_axis(dense, indices, values, 1)
    want_e = target - dense @ w
    with jax.enable_x64(True):
        got = pk.decode_loss(values, indices, w, target, implementation=implementation)
        np.testing.assert_allclose(got.residual_BD, want_e, rtol=0, atol=1e-12)
        want_inner = np.take_along_axis(want_e @ w.T, indices, 1)
        np.testing.assert_allclose(got.inner_BK, want_inner, rtol=0, atol=1e-11)
        np.testing.assert_allclose(got.squared_error_B, np.square(want_e).sum(1), rtol=1e-12)
        totals = pk.WeightGrads(*(jnp.asarray(rng.normal(size=s)) for s in ((n, d), (n, d), n)))
        d_values, x = rng.normal(size=values.shape), rng.normal(size=(tokens, d))
        d_dense = np.zeros((tokens, n))
        np.put_along_axis(d_dense, indices, d_values, 1)
        sums = (dense.T @ want_e, d_dense.T @ x, d_dense.sum(0))
        arguments = (values, d_values, indices, want_e, x, n)
        for start in (None, totals):
            got = pk.weight_grads(*arguments, totals=start, implementation=implementation)
            for one, want, more in zip(got, sums, start or (0, 0, 0), strict=True):
                np.testing.assert_allclose(one, want + np.asarray(more), rtol=0, atol=1e-11)
        kept = rng.random(values.shape) < 0.7
        pairs = pk.pair_list.compact(kept, values, indices, n)
        order = pk.pair_list.compact(kept, d_values, indices, n).values_P
        got = pk.weight_grads_of_pairs(pairs, order, want_e, x, n, implementation=implementation)
        part = np.zeros((tokens, n))
        np.put_along_axis(part, indices, np.where(kept, values, 0), 1)
        np.testing.assert_allclose(got.w_dec_LD, part.T @ want_e, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "tokens, n, k, parts",
    [
        (600, 1000, 2, 1),
        (600, 1300, 2, None),  # fewer pairs than latents
        (4000, 40_000, 30, 2),  # (latent, pair) in 32 bits for half of them
        (4001, 40_000, 30, None),  # in parts that are not equal
        (2048, 65_536, 32, 1),
    ],
)
def test_pairs_are_summed_latent_by_latent_where_that_pays(tokens, n, k, parts):
    assert _parts(tokens, k, n) == parts
    rng = np.random.default_rng(0)
    indices = rng.integers(0, n, (tokens, k)).astype(np.int32)
    indices[:2, 0] = 0, n - 1  # the ends, of pairs and of latents
    indices[-1] = n - 1
    # Whole numbers: sums of them are exact in any order.
    values, d_values = rng.integers(-4, 5, (2, tokens, k)).astype(np.float32)
    e, x = rng.integers(-4, 5, (2, tokens, 2)).astype(np.float32)
    want = [rng.integers(-4, 5, shape).astype(np.float32) for shape in ((n, 2), (n, 2), n)]
    totals = pk.WeightGrads(*map(jnp.array, want))
    arrays = (values, d_values, indices, e, x, n)
    got = jax.jit(lambda: pk.weight_grads(*arrays, totals=totals, implementation="xla"))()
    np.add.at(want[0], indices, values[..., None] * e[:, None])
    np.add.at(want[1], indices, d_values[..., None] * x[:, None])
    np.add.at(want[2], indices, d_values)
    for one, expected in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, expected)
    with pk.target("tpu", "TPU v5 lite"):  # its XLA adds whole batches at once
        program = jax.make_jaxpr(lambda: pk.weight_grads(*arrays, implementation="xla"))()
    assert "sort[" not in str(program)


def test_the_inner_products_are_of_the_residual_that_is_returned():
    values, indices, rng = code(5, 3, 20, 0)
    w, target = rng.normal(size=(20, 8)), rng.normal(size=(5, 8))
    arrays = (np.float32(values), indices, np.float32(w), np.float32(target))
    for implementation in IMPLEMENTATIONS:
        e, inner, _ = pk.decode_loss(
            *arrays, residual_dtype=jnp.bfloat16, implementation=implementation
        )
        assert e.dtype == jnp.bfloat16 and inner.dtype == jnp.float32
        want = np.einsum("bd,bkd->bk", np.float64(e), np.float64(np.float32(w))[indices])
        np.testing.assert_allclose(inner, want, rtol=1e-5, atol=1e-5)


def spec(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_bfloat16_products_are_summed_in_float32():
    """As many ones as bfloat16 cannot count to."""
    ones = jnp.ones((600, 1), jnp.bfloat16)
    first = jnp.zeros((600, 1), jnp.int32)
    for implementation in IMPLEMENTATIONS:
        total = pk.sparse_transpose_matmul(ones, first, ones, 1, implementation=implementation)
        assert float(total[0, 0]) == 600
        row = pk.dense_sparse_matmul(ones.T, first.T, ones[:1], implementation)
        assert float(row[0, 0]) == 600


def test_what_is_picked_is_explained():
    arguments = (spec(8, 128), spec(512, 128), spec(512), 4)
    said = pk.explain(pk.topk_encode, *arguments)
    assert said.startswith("topk_encode: xla (mosaic_gpu: it ") and "mosaic_tpu: it runs on" in said
    with pytest.raises(ValueError, match=r"topk_encode: implementation = 'cuda' does not exist"):
        pk.topk_encode(*arguments, "cuda")
    with pytest.raises(NotImplementedError, match=r"'mosaic_tpu' cannot run: it runs on tpu dev"):
        pk.topk_encode(*arguments, "mosaic_tpu")
    with pk.preferring("reference"):
        assert pk.explain(pk.topk_encode, *arguments).startswith("topk_encode: reference")


def test_a_function_compiled_before_is_not_explained():
    encode = jax.jit(lambda *arrays: pk.topk_encode(*arrays, 4))
    arrays = (spec(8, 128), spec(512, 128), spec(512))
    assert pk.explain(encode, *arrays).startswith("topk_encode: xla")
    with pytest.raises(ValueError, match="traced no operation; give the function"):
        pk.explain(encode, *arrays)


def test_reruns_are_bit_identical():
    values, indices, rng = code(200, 8, 30, 0)
    e, x = (np.float32(rng.normal(size=(200, 16))) for _ in range(2))
    call = jax.jit(lambda *a: pk.weight_grads(*a, 30))
    first, second = (call(np.float32(values), np.float32(values), indices, e, x) for _ in "ab")
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n", [16, 1000])  # pairs are sorted, and are not
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_sums_keep_the_dtype_of_totals(implementation, n):
    with jax.enable_x64(True):
        values, indices, rng = code(64, 4, n, 0)
        e, x = rng.normal(size=(2, 64, 8))
        totals = pk.WeightGrads(*(jnp.ones(s, jnp.float32) for s in ((n, 8), (n, 8), n)))
        options = {"totals": totals, "implementation": implementation}
        got = pk.weight_grads(values, values, indices, e, x, n, **options)
        pairs = pk.pair_list.compact(np.ones(indices.shape, bool), values, indices, n)
        of_pairs = pk.weight_grads_of_pairs(pairs, pairs.values_P, e, x, n, **options)
    for one, other in zip(got, of_pairs, strict=True):
        assert one.dtype == other.dtype == jnp.float32
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
