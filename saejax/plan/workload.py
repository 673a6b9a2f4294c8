"""The sizes of one training step on one device, from a recipe, a mesh shape and the hardware."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from saejax.mesh import LATENT, MeshShape, tree_specs
from saejax.model import sparse
from saejax.model.normalizer import Normalizer
from saejax.plan.hardware import Topology
from saejax.recipe import Recipe
from saejax.train import state as state_lib
from saejax.train.spec import StepSpec, step_spec
from saejax.train.step import auxk_capacities as auxk_capacities

DEAD_FRACTION = 0.05
"""Share of latents taken for dead, which decides the size of the AuxK block: few runs have more."""

# Projection, Adam, unit norm and EMA: arithmetic per parameter, counted from their equations.
_UPDATE_FLOPS = 30


@dataclasses.dataclass(frozen=True)
class Workload:
    """One step on one device.

    Attributes:
      recipe: what to train.
      shape: of the mesh.
      topology: the hardware.
    """

    recipe: Recipe
    shape: MeshShape
    topology: Topology

    @functools.cached_property
    def spec(self) -> StepSpec:
        """The static settings that the step itself would have."""
        recipe = self.recipe
        return step_spec(
            recipe.sae,
            recipe.loss,
            recipe.topk,
            Normalizer(kind=recipe.sae.normalization),
            self.shape,
            batch_tokens=recipe.train.batch_size,
            chunks=recipe.train.chunks(self.shape),
            platform=self.topology.chip.kind,
            device_kind=self.topology.chip.name,
            data_exchange=recipe.mesh.data_exchange,
        )

    @property
    def width(self) -> int:
        """Of the activations."""
        return self.recipe.sae.d_model

    @property
    def latents(self) -> int:
        """Of this device."""
        return self.recipe.sae.n_latents // self.shape.latent

    @property
    def matrix(self) -> int:
        """Entries of this device's part of one weight matrix."""
        return self.latents * self.width

    @property
    def rows(self) -> int:
        """Tokens of its data row, which it encodes, per step."""
        return self.recipe.train.batch_size // self.shape.data

    @property
    def own_rows(self) -> int:
        """Tokens that it is fed."""
        return self.rows // self.shape.latent

    @property
    def block(self) -> int:
        """Tokens of its data row in one microbatch."""
        return self.rows // self.spec.chunks

    def encoded_tokens(self, latents: int) -> int:
        """Tokens that are encoded at once, by so many latents: of a microbatch, or part of it."""
        tokens = sparse.block_tokens(latents, platform=self.topology.chip.kind)
        return min(self.block, tokens)

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the compute dtype."""
        return jnp.dtype(self.spec.loss.dtype).itemsize

    @property
    def auxk_blocks(self) -> tuple[int, int]:
        """Dead latents of this device's AuxK block: with `DEAD_FRACTION` dead, and the most."""
        if not self.spec.loss.auxk_coefficient:
            return 0, 0
        sizes = auxk_capacities(self.spec.loss.aux.k, self.latents)
        dead = DEAD_FRACTION * self.latents
        return next(size for size in sizes if size >= dead), sizes[-1]

    def is_dense(self, latents: int, k: int) -> bool:
        """Whether AuxK's code of k out of so many latents on each shard has a value for all."""
        shards = self.shape.latent
        return latents > 0 and (shards == 1 or latents * shards <= self.spec.loss.dense_below * k)

    def pairs(self, k: int) -> float:
        """Kept (token, latent) pairs of this device and step, of a selection of k."""
        return self.rows * k / self.shape.latent

    @property
    def outer_rows(self) -> int:
        """Data rows whose tokens' outer products this device makes: all, where codes are sent."""
        return self.shape.data if self.spec.loss.gather_codes else 1

    @functools.cached_property
    def state_bytes(self) -> dict[str, int]:
        """Of this device's part of the training state."""
        recipe = self.recipe
        state = state_lib.abstract_state(recipe.sae, recipe.optimizer, recipe.train.steps)
        sizes = {
            "parameters": self._local(state.params),
            "optimizer state": self._local(state.opt_state),
            "EMA": self._local(state.ema) if state.ema is not None else 0,
        }
        return sizes | {"counters": self._local(state) - sum(sizes.values())}

    def _local(self, tree) -> int:
        def size(leaf, spec) -> int:
            return leaf.size * leaf.dtype.itemsize // (self.shape.latent if LATENT in spec else 1)

        return sum(jax.tree.leaves(jax.tree.map(size, tree, tree_specs(tree))))

    def flops(self) -> dict[str, float]:
        """Floating-point operations of this device and step, by part; a multiply-add is two.

        The encoder is the only dense part; the sparse ones move k rows of each (Gao et al. 2024,
        App. D). AuxK multiplies the whole of its block.
        """
        row = 2.0 * self.width
        loss = self.spec.loss
        kept = self.pairs(loss.main.k) + (self.pairs(loss.multi.k) if loss.multi else 0)
        block, _ = self.auxk_blocks
        auxk = row * self.rows * block
        if self.is_dense(block, loss.aux.k):
            auxk *= 5  # the decoder, the values' gradients and both matrices' are products too
        elif block:
            auxk += 4 * row * self.pairs(loss.aux.k)
        return {
            "encoder forward": row * self.latents * self.rows,
            "sparse decode": row * kept,
            # The values' gradients, and the outer products of both matrices.
            "sparse gradients": (1 + 2 * self.outer_rows) * row * kept,
            "AuxK": auxk,
            "optimizer": _UPDATE_FLOPS * 2.0 * self.matrix,
        }
