"""The library's whole training step."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk
from pallas_kernels.bench.inputs import DEAD_SHARE, Inputs
from pallas_kernels.bench.timing import Run
from pallas_kernels.shapes import Shape

STEPS = 1000  # of the training that the step is one of
DEAD_TOKENS = 10_000_000
RATE, AUXK = 2e-4, 1 / 32


class Step(NamedTuple):
    """A compiled step with its state.

    Attributes:
      run: makes the thing to time, with or without dead latents.
      memory: of the compiled program, bytes by kind.
      picks: what the operations inside chose, and why not the others.
    """

    run: Callable[[bool], Run]
    memory: dict[str, int]
    picks: str


class Program(NamedTuple):
    """The library's training step, compiled for the first device.

    Attributes:
      step: `(state, x [B, D]) -> (state, metrics)`; the state is donated.
      mesh: of one device.
      token_sharding, state_shardings: where its arguments lie.
      picks: what the operations inside chose, and why not the others.
    """

    step: Any
    mesh: Any
    token_sharding: Any
    state_shardings: Any
    picks: str


def program(
    sae: Any,
    loss: Any,
    optimizer: Any,
    normalizer: Any,
    steps: int,
    x_BD: Any,
    *,
    chunks: int = 1,
    implementation: str | None = None,
) -> Program:
    """Compiles the step of some configurations for batches like `x_BD`."""
    from saejax import mesh as mesh_lib
    from saejax.capacity import TopKConfig
    from saejax.train.spec import KernelConfig
    from saejax.train.state import abstract_state
    from saejax.train.step import jit_step, make_step

    mesh = mesh_lib.make_mesh(mesh_lib.MeshShape(), jax.devices()[:1])
    parts = (sae, loss, optimizer, TopKConfig(), normalizer, mesh)
    kernels = KernelConfig(implementation=implementation)
    sizes = {"batch_tokens": len(x_BD), "chunks": chunks, "steps": steps}
    step = make_step(*parts, **sizes, kernels=kernels)
    abstract = abstract_state(sae, optimizer, steps)
    x_BD = jax.ShapeDtypeStruct(x_BD.shape, x_BD.dtype)
    return Program(
        step=jit_step(step, abstract, mesh).lower(abstract, x_BD).compile(),
        mesh=mesh,
        token_sharding=mesh_lib.token_sharding(mesh),
        state_shardings=mesh_lib.tree_shardings(mesh, abstract),
        picks=pk.explain(step, abstract, x_BD),
    )


def sparse(
    shape: Shape,
    pool: Sequence[Inputs],
    dtype: str,
    *,
    microbatch: int | None = None,
    implementation: str | None = None,
) -> Step:
    """The library's step, with AuxK, from weights that explain the inputs.

    Args:
      shape: of the step.
      pool: inputs; the first's rows are encoder and decoder.
      dtype: of the multiplications.
      microbatch: tokens at once; None is the whole batch.
      implementation: of the operations that have it; None picks.
    """
    from saejax.model.normalizer import Normalizer
    from saejax.model.sae import SAEConfig
    from saejax.train import state as state_lib
    from saejax.train.loss import LossConfig
    from saejax.train.optim import OptimizerConfig

    sae = SAEConfig(d_model=shape.d, n_latents=shape.n, k=shape.k, compute_dtype=dtype)
    loss = LossConfig(k_aux=shape.k_aux, dead_tokens=DEAD_TOKENS, auxk_coefficient=AUXK)
    optimizer = OptimizerConfig(learning_rate=RATE)
    compiled = program(
        sae,
        loss,
        optimizer,
        Normalizer(),
        STEPS,
        pool[0].x_BD,
        chunks=shape.tokens // (microbatch or shape.tokens),
        implementation=implementation,
    )
    x = [jax.device_put(p.x_BD, compiled.token_sharding) for p in pool]
    build = jax.jit(
        lambda params: state_lib.build_state(params, sae, optimizer, STEPS, jnp.ones(())),
        out_shardings=compiled.state_shardings,
    )
    held = [build(planted(pool[0]))]

    def call(i: int):
        held[0], metrics = compiled.step(held[0], x[i % len(x)])
        return held[0], metrics

    def run(dead: bool) -> Run:
        since_L = since_fired(pool[0], dead)

        def before(i: int):
            del i
            held[0] = with_counters(held[0], since_L, compiled)

        return Run(call, before)

    return Step(run, memory_of(compiled.step), compiled.picks)


def with_counters(state: Any, since_L: np.ndarray, compiled: Program) -> Any:
    """The state with these tokens since each latent fired, in new arrays: a step donates them."""
    fresh = jax.device_put(since_L, compiled.state_shardings.tokens_since_fired)
    return dataclasses.replace(state, tokens_since_fired=jax.block_until_ready(fresh))


def planted(inputs: Inputs) -> dict[str, jax.Array]:
    """Parameters that explain the inputs: encoder and decoder are the rows that made them."""
    w_LD = inputs.w_LD.astype(jnp.float32)
    return {
        "w_enc": w_LD + 0,
        "w_dec": w_LD + 0,
        "latent_bias": jnp.zeros(w_LD.shape[0]),
        "pre_bias": jnp.zeros(w_LD.shape[1]),
    }


def since_fired(inputs: Inputs, dead: bool) -> np.ndarray:
    """`[L]` int32 tokens since each latent fired: 0, or long for those that never do."""
    n = len(inputs.w_LD)
    since_L = np.zeros(n, np.int32)
    if dead:
        counts_L = np.bincount(np.asarray(inputs.indices_BK).reshape(-1), minlength=n)
        rarest = np.argsort(counts_L, kind="stable")[: max(int(DEAD_SHARE * n), 1)]
        since_L[rarest] = DEAD_TOKENS
    return since_L


def memory_of(compiled: Any) -> dict[str, int]:
    """Bytes of a compiled program: what it is given, makes besides, and holds at most."""
    m = compiled.memory_analysis()
    arguments, temporary = m.argument_size_in_bytes, m.temp_size_in_bytes
    outputs = m.output_size_in_bytes - m.alias_size_in_bytes
    return {
        "arguments": arguments,
        "outputs": outputs,
        "temporary": temporary,
        "peak": arguments + outputs + temporary,
    }
