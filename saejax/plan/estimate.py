"""Memory, time and bytes of a step from the recipe alone; what needs no compiler."""

import dataclasses
import functools
from typing import NamedTuple

from saejax.model import sparse
from saejax.plan import traffic
from saejax.plan.hlo import Collective
from saejax.plan.workload import Workload

# Share of the peak rate that large products are taken to reach.
PRODUCT_EFFICIENCY = 0.6

# Bytes per parameter that the update moves, without the EMA, and filling and writing the gradient's
# sum. Of the programs that XLA makes of it: 28 for the encoder and 64 for the decoder with its
# projection and norms. The kernels for TPUs read and write everything once.
_UPDATE_BYTES = {"tpu": 28 + 8}
_UPDATE_BYTES_ELSEWHERE = (28 + 64) / 2 + 8
_EMA_BYTES = 8

# Bytes per pre-activation that selection moves: what the encoder writes is read twice. The kernels
# for TPUs leave sketches, of 16 bytes for 64 latents or more, and sort them.
_SELECTION_BYTES = {"tpu": 1}
_SELECTION_BYTES_ELSEWHERE = 3 * 4


class _Held(NamedTuple):
    """Copies that XLA holds at once, fitted to compiled programs (`tests/aot/test_memory.py`).

    Attributes:
      auxk: of a float32 array of the AuxK block, most of them gradients.
      pre_activations: of those of as many tokens as are selected from at once.
      whole_rows: more of them, where selection does not go by groups.
      dense: of AuxK's, of as many tokens as it takes at once, where its code is dense.
      tokens: of a float32 array of the tokens of a microbatch.
    """

    auxk: int
    pre_activations: int
    whole_rows: int
    dense: int
    tokens: int


_HELD = {"tpu": _Held(4, 1, 0, 4, 1), "gpu": _Held(2, 2, 0, 0, 10), "cpu": _Held(2, 1, 1, 4, 4)}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a step costs each device, by arithmetic.

    Attributes:
      work: the step.
    """

    work: Workload

    @functools.cached_property
    def memory(self) -> dict[str, int]:
        """Bytes held at the fullest moment, by part."""
        work = self.work
        f32, narrow = 4, work.itemsize
        _, dead = work.auxk_blocks
        held = _HELD[work.topology.chip.kind]
        reconstructions = held.tokens + (work.spec.loss.multi is not None)
        parts = dict(work.state_bytes)
        parts["batch"] = work.own_rows * work.width * 2
        parts["gradients"] = 2 * f32 * work.matrix
        parts["weights in the compute dtype"] = 2 * narrow * work.matrix if narrow < f32 else 0
        # A TPU sums the block's gradients over 'data' in one more.
        summed = work.shape.data > 1 and work.topology.chip.kind == "tpu"
        copies = held.auxk + summed
        parts["AuxK"] = copies * f32 * dead * work.width
        parts["pre-activations of a block"] = f32 * self._selected_from(held)
        parts["tokens of a microbatch"] = reconstructions * f32 * work.block * work.width
        if work.spec.loss.gather_codes:
            size = 2 * work.shape.data * narrow * work.block * work.width
            parts["codes of all data rows"] = size
        parts["own tokens and residuals"] = (f32 + narrow) * work.own_rows * work.width
        return {name: size for name, size in parts.items() if size}

    def _selected_from(self, held: _Held) -> int:
        """Pre-activations held at once, and a dense code's."""
        work = self.work
        loss = work.spec.loss
        _, dead = work.auxk_blocks

        def of_block(latents: int) -> int:
            return work.encoded_tokens(latents) * latents

        found = held.pre_activations * of_block(work.latents)
        if work.is_dense(dead, loss.aux.k):
            return found + held.dense * of_block(dead)
        selections = [(work.latents, one.capacity) for one in (loss.main, loss.multi) if one]
        selections += [(dead, loss.aux.capacity)] if dead else []
        platform = work.topology.chip.kind
        whole = [n for n, kept in selections if not sparse.in_two_stages(n, kept, platform)]
        return found + held.whole_rows * max(map(of_block, whole), default=0)

    @property
    def peak(self) -> int:
        """Bytes per device."""
        return sum(self.memory.values())

    @functools.cached_property
    def collectives(self) -> list[Collective]:
        """Of a step of the expected case; those of a compiled program are of the worst."""
        return traffic.expected_collectives(self.work)

    def collective_seconds(self, one: Collective) -> float:
        """Of all calls of a step."""
        return traffic.seconds(one, self.work.topology, self.work.shape)

    @functools.cached_property
    def seconds(self) -> dict[str, float]:
        """Expected time by part, nothing overlapped; see `describe` for what is assumed."""
        chip, flops = self.work.topology.chip, self.work.flops()
        rate = chip.bf16_flops if self.work.itemsize == 2 else chip.f32_flops
        products = flops["encoder forward"] + flops["AuxK"]
        parts = {"products": products / rate / PRODUCT_EFFICIENCY}
        parts |= {name: size / chip.bandwidth for name, size in self.traffic().items()}
        for axis in ("latent", "data", "data, latent"):
            over = sum(self.collective_seconds(c) for c in self.collectives if c.axis == axis)
            parts[f"collectives over {axis.replace(', ', ' and ')}"] = over
        return {name: time for name, time in parts.items() if time}

    def traffic(self) -> dict[str, float]:
        """Bytes to and from the device's memory, by part."""
        work = self.work
        loss, narrow, kind = work.spec.loss, work.itemsize, work.topology.chip.kind
        dead, _ = work.auxk_blocks
        update = _UPDATE_BYTES.get(kind, _UPDATE_BYTES_ELSEWHERE)
        ema = _EMA_BYTES if work.recipe.optimizer.ema_decay is not None else 0
        pairs = work.pairs(loss.main.k) + (work.pairs(loss.multi.k) if loss.multi else 0)
        outer = pairs * work.outer_rows
        if dead and not work.is_dense(dead, loss.aux.k):
            pairs += work.pairs(loss.aux.k)
            outer += work.pairs(loss.aux.k)
        # Decoding and the values' gradients gather three rows and add to one; each of the two outer
        # products gathers one and adds to one. Adding reads and writes.
        sparse = work.width * (pairs * (3 * narrow + 8) + 2 * outer * (narrow + 8))
        selection = _SELECTION_BYTES.get(kind, _SELECTION_BYTES_ELSEWHERE)
        of_dead = _SELECTION_BYTES_ELSEWHERE if work.is_dense(dead, loss.aux.k) else selection
        # Each block of tokens reads every row of the encoder.
        read = sum(n / work.encoded_tokens(n) for n in (work.latents, dead) if n)
        return {
            "optimizer": (update + ema) * 2 * work.matrix,
            "pre-activations": work.rows * (selection * work.latents + of_dead * dead),
            "sparse rows": sparse,
            "weights": narrow * work.rows * work.width * read,
            "tokens": 8 * 4 * work.rows * work.width,
        }

    @property
    def step_seconds(self) -> float:
        """Expected, of one step."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Expected, of the whole mesh."""
        return self.work.recipe.train.batch_size / self.step_seconds

    @property
    def floors(self) -> dict[str, float]:
        """Seconds below which no overlap can bring the step."""
        chip = self.work.topology.chip
        rate = chip.bf16_flops if self.work.itemsize == 2 else chip.f32_flops
        return {
            "arithmetic": sum(self.work.flops().values()) / rate,
            "memory": sum(self.traffic().values()) / chip.bandwidth,
            "communication": sum(self.collective_seconds(c) for c in self.collectives),
        }

    def fits(self, peak: int | None = None) -> bool:
        """Whether the memory of a device holds it; always where that is not known."""
        memory = self.work.topology.chip.memory
        return not memory or (self.peak if peak is None else peak) <= memory
