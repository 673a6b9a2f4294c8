"""The step's gradients against dense autodiff in float64, term by term, on every mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax import mesh as mesh_lib
from saejax.model.normalizer import Normalizer
from saejax.train.loss import LossSpec, Selection
from saejax.train.spec import StepSpec
from saejax.train.step import local_gradients

D, L, K, B = 12, 64, 4, 32
VARIANCE = 0.83
COUNTS = ("at_capacity", "multi_at_capacity", "auxk_at_capacity")
OTHER_MESHES = [(8, 1), (1, 8), (2, 4), (4, 2)]


def make_problem(seed=0):
    """Parameters, tokens and dead counters; a third of the latents count as dead."""
    rng = np.random.default_rng(seed)
    w_dec = rng.normal(size=(L, D))
    w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
    params = {
        "w_enc": w_dec + 0.3 * rng.normal(size=(L, D)),
        "w_dec": w_dec,
        "latent_bias": 0.1 * rng.normal(size=L),
        "pre_bias": 0.2 * rng.normal(size=D),
    }
    since = np.where(rng.random(L) < 0.6, 1000, 0).astype(np.int32)
    return params, rng.normal(size=(B, D)), since


def kept_mask(h, wanted: Selection, shards: int):
    """`[B, L]` bool: the k largest of what the shards offer; ties to the lowest index."""

    def best(h, k):
        order = jnp.argsort(h, axis=-1, descending=True, stable=True)[..., :k]
        return jnp.put_along_axis(jnp.zeros(h.shape, bool), order, True, axis=-1, inplace=False)

    by_shard = h.reshape(len(h), shards, -1)
    offered = best(by_shard, min(wanted.capacity, by_shard.shape[-1])).reshape(h.shape)
    return best(jnp.where(offered, h, -jnp.inf), wanted.k) & offered


def dense_loss(params, x, dead, spec: LossSpec, shards: int):
    """The loss as the paper writes it: dense codes, plain autodiff, no sharding."""
    h = (x - params["pre_bias"]) @ params["w_enc"].T + params["latent_bias"]

    def code(wanted, h):
        mask = kept_mask(jax.lax.stop_gradient(h), wanted, shards)
        return jnp.where(mask & jnp.isfinite(h), jnp.maximum(h, 0), 0)

    e = x - (code(spec.main, h) @ params["w_dec"] + params["pre_bias"])
    total = jnp.sum(e**2)
    if spec.multi_coefficient:
        wide = code(spec.multi, h) @ params["w_dec"] + params["pre_bias"]
        total += spec.multi_coefficient * jnp.sum((x - wide) ** 2)
    loss = total / (len(x) * VARIANCE)
    if spec.auxk_coefficient:
        e = jax.lax.stop_gradient(e)
        dead_h = jnp.where(dead[None, :], h, -1e30)
        e_hat = jnp.where(dead, code(spec.aux, dead_h), 0) @ params["w_dec"]
        spread = jnp.sum((e - e.mean(0, keepdims=True)) ** 2)
        loss += spec.auxk_coefficient * jnp.sum((e - e_hat) ** 2) / spread
    return loss


def step_gradients(params, x, since, spec: LossSpec, mesh_shape, chunks=1, variance=None):
    mesh = mesh_lib.make_mesh(mesh_lib.MeshShape(*mesh_shape))
    step_spec = StepSpec(
        loss=spec, normalizer=Normalizer(kind="none"), batch_tokens=len(x), chunks=chunks
    )
    params = jax.tree.map(jnp.asarray, params)
    fn = mesh_lib.per_device(
        functools.partial(local_gradients, spec=step_spec),
        mesh,
        in_trees=(params, "tokens_since_fired", "replicated", "tokens"),
        out_trees=(params, "tokens_since_fired", "replicated"),
    )
    variance = jnp.float64(VARIANCE) if variance is None else variance
    return jax.jit(fn)(params, jnp.asarray(since), variance, jnp.asarray(x))


def spec_of(auxk=0.0, multi=0.0, k_aux=16, capacities=(64, 64, 64), **options):
    main, wide, aux = capacities
    return LossSpec(
        main=Selection(k=K, capacity=min(main, K)),
        multi=Selection(k=4 * K, capacity=min(wide, 4 * K)) if multi else None,
        aux=Selection(k=k_aux, capacity=min(aux, k_aux)),
        multi_coefficient=multi,
        auxk_coefficient=auxk,
        dead_tokens=500,
        relu=True,
        dtype=jnp.dtype("float64"),
        **options,
    )


TERMS = {
    "reconstruction": spec_of(),
    "auxk": spec_of(auxk=1 / 32),
    "auxk, fewer dead than k_aux": spec_of(auxk=1 / 32, k_aux=64),
    "auxk, many more dead than k_aux": spec_of(auxk=1 / 32, k_aux=2),
    "multi": spec_of(multi=1 / 8),
    "all": spec_of(auxk=1 / 32, multi=1 / 8),
    "all, dense codes": spec_of(auxk=1 / 32, multi=1 / 8, dense_below=1000),
    "all, codes over data": spec_of(auxk=1 / 32, multi=1 / 8, gather_codes=True),
    "all, gathered candidates": spec_of(auxk=1 / 32, multi=1 / 8, exchange="all_gather"),
    "all, truncated": spec_of(auxk=1 / 32, multi=1 / 8, k_aux=6, capacities=(1, 3, 1)),
}


# The default run leaves out what lies between the shapes that it tries.
OFTEN = {s: () if s in ((1, 8), (2, 4)) else pytest.mark.slow for s in ((1, 1), *OTHER_MESHES)}

# Every term by itself on one device; the sum of all on every mesh; and where selection over shards
# differs most, with shards that hold fewer dead latents than k_aux, or many more.
CASES = [
    *((term, (1, 1)) for term in TERMS if term != "all"),
    *(pytest.param("all", shape, marks=OFTEN[shape]) for shape in ((1, 1), *OTHER_MESHES)),
    ("auxk, fewer dead than k_aux", (2, 4)),
    ("auxk, many more dead than k_aux", (1, 8)),
    ("all, dense codes", (2, 4)),
    pytest.param("all, codes over data", (8, 1), marks=pytest.mark.slow),
    ("all, codes over data", (4, 2)),
    ("all, gathered candidates", (2, 4)),
    ("all, truncated", (1, 8)),
    ("all, truncated", (2, 4)),
]


@functools.cache
def computed(term, mesh_shape, chunks=1):
    params, x, since = make_problem()
    return step_gradients(params, x, since, TERMS[term], mesh_shape, chunks)


@pytest.mark.parametrize("term, mesh_shape", CASES)
def test_gradients_equal_dense_autodiff(term, mesh_shape):
    with jax.enable_x64(True):
        spec = TERMS[term]
        params, x, _ = make_problem()
        got, new_since, sums = computed(term, mesh_shape)
        dead = np.asarray(new_since) >= spec.dead_tokens
        assert 0 < dead.sum() < L, "the problem must have dead and live latents"
        want = jax.jit(jax.grad(dense_loss), static_argnums=(3, 4))(
            params, x, dead, spec, mesh_shape[1]
        )
        for name, gradient in want.items():
            scale = np.abs(gradient).max()
            assert scale > 1e-6, f"{name}: the oracle's own gradient vanishes"
            np.testing.assert_allclose(got[name], gradient, rtol=0, atol=1e-9 * scale, err_msg=name)
        assert int(sums["auxk_skipped"]) == 0


def test_every_term_moves_every_parameter():
    with jax.enable_x64(True):
        base, _, _ = computed("reconstruction", (1, 1))
        for term in ("auxk", "multi"):
            got, _, _ = computed(term, (1, 1))
            for name in got:
                assert np.abs(got[name] - base[name]).max() > 1e-6, (term, name)


@pytest.mark.parametrize(
    "term, chunks, mesh_shape",
    [("all", 16, (1, 1)), ("all", 4, (2, 4)), ("all, codes over data", 4, (4, 2))],
)
def test_chunks_do_not_change_the_gradient(term, chunks, mesh_shape):
    with jax.enable_x64(True):
        whole, since_1, sums_1 = computed(term, mesh_shape)
        split, since_n, sums_n = computed(term, mesh_shape, chunks)
        for name in whole:
            np.testing.assert_allclose(split[name], whole[name], rtol=1e-11, atol=1e-14)
        np.testing.assert_array_equal(since_1, since_n)
        np.testing.assert_allclose(sums_1["auxk"], sums_n["auxk"], rtol=1e-12)


@pytest.mark.parametrize("mesh_shape", [(1, 8), (2, 4)])
def test_tokens_at_capacity_are_counted(mesh_shape):
    """Against numpy: shards whose offers were all kept and that had more to offer."""
    with jax.enable_x64(True):
        params, x, _ = make_problem()
        spec, shards = TERMS["all, truncated"], mesh_shape[1]
        _, since, sums = computed("all, truncated", mesh_shape)
        h = (x - params["pre_bias"]) @ params["w_enc"].T + params["latent_bias"]
        dead = np.asarray(since) >= spec.dead_tokens
        every = np.ones(L, bool)
        problems = ((spec.main, every), (spec.multi, every), (spec.aux, dead))
        for name, (wanted, eligible) in zip(COUNTS, problems):
            kept = np.asarray(kept_mask(jnp.where(eligible, h, -np.inf), wanted, shards)) & eligible
            by_shard = kept.reshape(len(x), shards, -1).sum(-1)
            more = eligible.reshape(shards, -1).sum(-1) > wanted.capacity
            want = ((by_shard == wanted.capacity) & more).sum()
            assert want > 0, name
            assert int(sums[name]) == want, name


def float32_gradients(mesh_shape, spec, change=lambda x: x):
    params, x, since = make_problem()
    return step_gradients(
        jax.tree.map(np.float32, params),
        change(np.float32(x)),
        since,
        spec,
        mesh_shape,
        variance=np.float32(VARIANCE),
    )


@pytest.mark.parametrize(
    "options, mesh_shape", [({}, (1, 8)), ({"gather_codes": True, "relu": False}, (2, 4))]
)
def test_bfloat16_is_the_same_on_every_mesh(options, mesh_shape):
    """Selection sees the same float32 sums, so that only the order of later sums differs."""
    spec = dataclasses.replace(TERMS["all"], dtype=jnp.dtype("bfloat16"), **options)
    want, since, _ = float32_gradients((1, 1), spec)
    got, got_since, _ = float32_gradients(mesh_shape, spec)
    np.testing.assert_array_equal(got_since, since)
    for name, gradient in want.items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(got[name], gradient, rtol=0, atol=1e-4 * scale, err_msg=name)


def test_a_number_that_is_none_surfaces_on_a_mesh():
    def change(x):
        x[5, 3] = np.nan
        return x

    spec = dataclasses.replace(TERMS["all"], dtype=jnp.dtype("float32"))
    _, _, sums = float32_gradients((2, 4), spec, change)
    assert not np.isfinite(sums["squared_error"])
    assert int(sums["auxk_skipped"]) == 1


def test_exact_capacity_is_never_reached():
    with jax.enable_x64(True):
        _, _, sums = computed("all", (2, 4))
        assert [int(sums[name]) for name in COUNTS] == [0, 0, 0]
