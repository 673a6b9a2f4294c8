"""Activations straight from a subject model, shuffled on the devices, with nothing stored.

Contexts are permuted once and dealt out to lanes, which the devices of the mesh share. A *group*
is what one forward pass gives: some contexts of every lane, whose kept rows are put into an order
drawn for (seed, group). Every lane has a swap buffer: step t takes B / lanes slots of it as its
part of the batch, and puts the next rows of the lane there. Slots are taken in rounds: each round
goes through all slots in a new order drawn for (seed, lane, round), so a row stays for one step at
least and two rounds less one step at most.

So what is in which slot is a function of (seed, step) alone, and no row older than two rounds is
there: nothing of the buffer is saved. A run that is resumed harvests the groups of the last two
rounds once more, and goes on with bit-identical batches. The sequence depends on the number of
lanes, not on that of devices or processes.

`StreamPlan` is the arithmetic of that, `Stream` the arrays on the devices.
"""

import collections
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saejax import mesh as mesh_lib
from saejax.data.feed import Provenance
from saejax.data.stream_plan import StreamPlan, row_order
from saejax.data.tokens import Contexts

_LOG = logging.getLogger(__name__)
_GROUPS_AHEAD = 2  # forward passes whose results were not looked at yet

Forward = Callable[[Any, jax.Array], Mapping[str, jax.Array]]
"""(parameters, tokens [N, T]) to site -> [N, T, D]; traced inside a jitted function."""


class Rows(NamedTuple):
    """Rows of one site.

    Attributes:
      values: bfloat16 `[lanes, n, D]`.
      context: int32 `[lanes, n]`, index into `Contexts`.
      position: int32 `[lanes, n]`, position in the context.
    """

    values: jax.Array
    context: jax.Array
    position: jax.Array


class Stream:
    """Batches of one or several sites, from a subject on the mesh; `Loader`'s streaming twin.

    Attributes:
      plan: which rows go where.
      batch_size: rows of a batch, B.
      tokens_per_epoch: rows of an epoch.
      outliers: rows of this process's lanes found with outlying norms so far, by site.
    """

    def __init__(
        self,
        forward: Forward,
        params: Any,
        contexts: Contexts,
        plan: StreamPlan,
        mesh: Mesh,
        *,
        keep: np.ndarray,
        max_norm_ratio: float | None,
    ) -> None:
        """Opens a stream; nothing is computed yet.

        Args:
          forward: the subject up to its sites.
          params: its parameters, placed on the mesh.
          contexts: the text.
          plan: see there.
          mesh: of the training; the lanes are dealt out to all its devices.
          keep: `[N, T]` bool, the positions that may be used.
          max_norm_ratio: a row whose norm is above this multiple of the median of its group and
            lane is no part of the batches: another of the same group and lane takes its place.
            None keeps all.

        Raises:
          ValueError: the lanes do not divide by the devices.
        """
        if plan.lanes % mesh.size:
            raise ValueError(
                f"Stream.lanes = {plan.lanes} does not divide by the {mesh.size} devices of the "
                f"mesh; use a multiple of {mesh.size}."
            )
        self.plan = plan
        self.batch_size, self.tokens_per_epoch = plan.batch_size, plan.rows_per_epoch
        self._params, self._contexts, self._mesh, self._keep = params, contexts, mesh, keep
        self._harvest = _harvester(forward, plan, mesh, max_norm_ratio)
        self._write = _writer(mesh)
        self._take = _taker(mesh)
        self._sharding = mesh_lib.token_sharding(mesh)
        self._unchecked: collections.deque = collections.deque()
        self.outliers: collections.Counter[str] = collections.Counter()
        self._at: tuple[int, Any] | None = None  # the latest of `at`
        self._after: tuple[int, Iterator] | None = None  # and what goes on behind it
        self._counted = -1  # groups are harvested again after a restart, but counted once

    def iterate(self, start_step: int = 0) -> Iterator[dict[str, tuple[jax.Array, Rows]]]:
        """Batches from `start_step` on, without end.

        Each is, by site, the batch `[B, D]`, split over the mesh by rows, and the `Rows` that it is
        made of. Every process of the mesh must iterate alike.

        Raises:
          ValueError: an activation is not finite.
        """
        buffers = self._filled(start_step)
        number, group = -1, None
        step = start_step
        while True:
            slots = self._placed(self.plan.slots_of(step))
            batch = {site: self._take(rows, slots) for site, rows in buffers.items()}
            done = 0
            for wanted, first, last in self.plan.pieces(*self.plan.fresh(step)):
                if wanted != number:
                    number, group = wanted, self._harvested(wanted)
                part = self.plan.slots_of(step)[:, done : done + last - first]
                done += last - first
                buffers = self._written(buffers, group, first, part, self.plan.rows_per_step)
            yield batch
            step += 1

    def at(self, step: int) -> dict[str, tuple[jax.Array, Rows]]:
        """One batch of `iterate`.

        The one asked for before and the one behind that are at hand; any other costs the forward
        passes that fill the buffers.

        Raises:
          ValueError: the step is negative; an activation is not finite.
        """
        if step < 0:
            raise ValueError(f"step = {step}: must be 0 or more.")
        if self._at is None or self._at[0] != step:
            (follows, batches), self._at, self._after = self._after or (None, None), None, None
            if follows != step:
                if batches is not None:
                    batches.close()  # or two sets of buffers were held
                batches = self.iterate(step)
            self._at = step, next(batches)
            self._after = step + 1, batches
        return self._at[1]

    def provenance(self, rows: Rows) -> Provenance:
        """Where the rows of a batch are from, in its order; every process is told all of them."""
        whole = mesh_lib.replicated(self._mesh)
        context_B, position_B = (
            np.asarray(jax.device_put(a, whole)).reshape(-1).astype(np.int64)
            for a in (rows.context, rows.position)
        )
        document_B = self._contexts.document[context_B].astype(np.int64)
        return Provenance(context_B, document_B, position_B)

    def sample_rows(self, n: int, site: str) -> np.ndarray:
        """bfloat16 `[n, D]` for statistics: rows of the first groups, in every process alike.

        Raises:
          ValueError: an epoch has fewer than n rows.
        """
        if not 0 < n <= self.tokens_per_epoch:
            raise ValueError(
                f"sample of {n} rows: an epoch of the stream has {self.tokens_per_epoch}; ask for "
                "at least 1 and at most that many."
            )
        parts, found, number = [], 0, 0
        whole = mesh_lib.replicated(self._mesh)
        while found < n:
            each = -(-(n - found) // self.plan.lanes)  # of all lanes alike, and no more than needed
            values = jax.device_put(self._harvested(number)[site].values[:, :each], whole)
            parts.append(np.asarray(values).reshape(-1, values.shape[-1]))
            found, number = found + len(parts[-1]), number + 1
        self._check(wait=True)
        return np.concatenate(parts)[:n]

    def _filled(self, step: int) -> dict[str, Rows]:
        """The buffers as they are before step `step`."""
        row_LM = self.plan.row_of_slot(step)
        q, slots = self.plan.rows_per_group, self.plan.slots
        buffers: dict[str, Rows] | None = None
        for number in np.unique(row_LM // q):
            group = self._harvested(int(number))
            if buffers is None:
                buffers = {site: _empty(rows, slots, self._mesh) for site, rows in group.items()}
            # Where each row of the group goes: beyond the buffer, if it is not in it.
            place_LQ = np.tile(slots + np.arange(q, dtype=np.int32), (self.plan.lanes, 1))
            lane, slot = np.nonzero(row_LM // q == number)
            place_LQ[lane, row_LM[lane, slot] % q] = slot
            buffers = self._written(buffers, group, 0, place_LQ, q)
            jax.block_until_ready(buffers)  # or all forward passes would be queued at once
        return buffers

    def _harvested(self, number: int) -> dict[str, Rows]:
        """The rows of the `number`-th group of the stream, by site."""
        plan = self.plan
        ids_LG = plan.contexts[plan.group(number)]
        shape = (plan.lanes * plan.group_contexts, -1)
        tokens = self._contexts.tokens[ids_LG].reshape(shape).astype(np.int32)
        order_LP, count_L = row_order(self._keep[ids_LG], plan.seed, number)
        placed = [self._placed(a) for a in (tokens, ids_LG, order_LP, count_L[:, None])]
        rows, outliers, bad = self._harvest(self._params, *placed)
        self._unchecked.append((number, outliers, bad))
        self._check()
        return rows

    def _written(self, buffers, group, first: int, place: np.ndarray, width: int):
        """The buffers with rows `first`, `first + 1`, ... of a group at `place` `[lanes, n]`."""
        lanes, n = place.shape
        source = np.zeros((lanes, width), np.int32)
        target = np.tile(self.plan.slots + np.arange(width, dtype=np.int32), (lanes, 1))  # dropped
        source[:, :n], target[:, :n] = np.arange(first, first + n), place
        source, target = self._placed(source), self._placed(target)
        return {
            site: self._write(buffer, group[site], source, target)
            for site, buffer in buffers.items()
        }

    def _placed(self, array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, self._sharding, lambda at: array[at])

    def _check(self, wait: bool = False) -> None:
        """Looks at the counts of earlier forward passes, whose results are there by now."""
        while self._unchecked and (wait or len(self._unchecked) > _GROUPS_AHEAD):
            number, outliers, bad = self._unchecked.popleft()
            for site in bad:
                if number > self._counted:
                    self._count_outliers(site, _own_sum(outliers[site]))
                if count := _own_sum(bad[site]):
                    ids = self.plan.contexts[self.plan.group(number)]
                    names = [self._contexts.names[d] for d in self._contexts.document[ids.flat]]
                    raise ValueError(
                        f"{count} activations at site {site!r} are NaN or infinite, in one of the "
                        f"documents {', '.join(sorted(set(names))[:4])}, ...; check the subject "
                        "model, or run it in float32."
                    )
            self._counted = max(self._counted, number)

    def _count_outliers(self, site: str, count: int) -> None:
        before = self.outliers[site]
        self.outliers[site] += count
        if self.outliers[site].bit_length() > before.bit_length():  # the first, and each doubling
            _LOG.info(
                "stream %s: %d rows with outlying norms so far, others in their place",
                site,
                self.outliers[site],
            )


def _own_sum(array: jax.Array) -> int:
    """The sum over this process's part of an array that is not replicated."""
    return sum(int(np.asarray(shard.data).sum()) for shard in array.addressable_shards)


def _harvester(forward: Forward, plan: StreamPlan, mesh: Mesh, max_norm_ratio: float | None):
    """(params, tokens, contexts, order, count) to rows, and counts `[lanes, 1]` of outliers and of
    rows that are not finite; each by site.
    """
    q = plan.rows_per_group

    def choose(acts_PD, context_G, order_P, count_1):
        """The q rows of one lane."""
        acts_PD = acts_PD.astype(jnp.bfloat16)
        norm_P = jnp.linalg.norm(acts_PD.astype(jnp.float32), axis=-1)[order_P]
        there_P = jnp.arange(len(order_P)) < count_1[0]
        sound_P = there_P
        if max_norm_ratio is not None:
            ranked_P = jnp.sort(jnp.where(there_P, norm_P, jnp.inf))
            median = ranked_P[jnp.maximum(count_1[0] - 1, 0) // 2]
            # Where most rows are zero there is no scale, hence no outlier.
            sound_P = there_P & ~((norm_P > max_norm_ratio * median) & (median > 0))
        # Sound rows first, each set in its own order; were they too few, the first ones come again.
        order_P = order_P[jnp.argsort(~sound_P, stable=True)]
        n_sound = jnp.maximum(sound_P.sum(dtype=jnp.int32), 1)
        row_q = order_P[jnp.arange(q) % n_sound]
        length = len(order_P) // len(context_G)
        rows = Rows(acts_PD[row_q], context_G[row_q // length], row_q % length)
        outliers = (there_P & ~sound_P).sum(dtype=jnp.int32, keepdims=True)
        finite_P = jnp.isfinite(acts_PD).all(-1)[order_P]
        bad = (there_P & ~finite_P).sum(dtype=jnp.int32, keepdims=True)
        return rows, outliers, bad

    def choose_all(acts_NTD, context_LG, order_LP, count_L1):
        """The rows of this device's lanes."""
        acts_LPD = acts_NTD.reshape(len(context_LG), -1, acts_NTD.shape[-1])
        return jax.vmap(choose)(acts_LPD, context_LG, order_LP, count_L1)

    # On every device by itself: programs that talk would have to be kept apart from the step.
    local = mesh_lib.per_device(choose_all, mesh, ("tokens",) * 4, ("tokens",) * 3)

    def harvest(params, tokens_NT, *of_lanes):
        acts = forward(params, tokens_NT)
        chosen = {site: local(acts_NTD, *of_lanes) for site, acts_NTD in acts.items()}
        return tuple({site: parts[i] for site, parts in chosen.items()} for i in range(3))

    return jax.jit(harvest)


def _writer(mesh: Mesh):
    """(buffer, rows, source, target) to the buffer with rows `source` at slots `target`."""

    def write(buffer: Rows, rows: Rows, source_Ln, target_Ln) -> Rows:
        def one(slots, found, source_n, target_n):
            return slots.at[target_n].set(found[source_n], mode="drop", unique_indices=True)

        return jax.tree.map(
            lambda slots, found: jax.vmap(one)(slots, found, source_Ln, target_Ln), buffer, rows
        )

    local = mesh_lib.per_device(write, mesh, ("tokens",) * 4, "tokens")
    return jax.jit(local, donate_argnums=0)


def _taker(mesh: Mesh):
    """(buffer, slots) to the batch `[B, D]` and its rows `[lanes, b]`."""

    def take(buffer: Rows, slots_Lb):
        rows = jax.tree.map(lambda a: jax.vmap(lambda x, i: x[i])(a, slots_Lb), buffer)
        return rows.values.reshape(-1, rows.values.shape[-1]), rows

    local = mesh_lib.per_device(take, mesh, ("tokens",) * 2, ("tokens", "tokens"))
    return jax.jit(local)


def _empty(rows: Rows, slots: int, mesh: Mesh) -> Rows:
    """A buffer for such rows."""

    def zeros() -> Rows:
        return jax.tree.map(
            lambda a: jnp.zeros((a.shape[0], slots, *a.shape[2:]), a.dtype), rows_like
        )

    rows_like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), rows)
    return jax.jit(zeros, out_shardings=mesh_lib.token_sharding(mesh))()


def usable_positions(contexts: Contexts, first_position: int) -> np.ndarray:
    """`[N, T]` bool: `Contexts.keep` without the first positions."""
    keep = contexts.keep.copy()
    keep[:, :first_position] = False
    return keep
