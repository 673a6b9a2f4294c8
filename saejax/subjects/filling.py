"""The work of a harvest: forward passes over a text's contexts, and their way into stores."""

import collections
import concurrent.futures
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from saejax.data.layout import CONTEXT_STREAM, MASKED, permutation
from saejax.data.shards import Store
from saejax.data.tokens import Contexts
from saejax.mesh import MeshShape, make_mesh, subject_batch_sharding
from saejax.subjects.base import Subject

FIRST_POSITION = 1  # the first position's norm is unlike all others: not stored unless asked for
_LOG_SECONDS = 5.0
_WRITERS = 2  # one prepares a shard while the other waits for the disk
_BOS, _SPECIAL, _PADDING = (MASKED.index(reason) for reason in ("bos", "special", "padding"))

Forward = Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]


def mask_codes(tokens_CT: np.ndarray, keep_CT: np.ndarray, length_C: np.ndarray, bos: int | None):
    """uint8 [C, T] codes of `layout.MASKED`: why a position of some contexts is not stored."""
    codes_CT = np.where(keep_CT, 0, _SPECIAL).astype(np.uint8)
    if bos is not None:
        codes_CT[~keep_CT & (tokens_CT == bos)] = _BOS
    codes_CT[np.arange(tokens_CT.shape[1]) >= length_C[:, None]] = _PADDING
    return codes_CT


def make_forward(
    subject: Subject,
    sites: Sequence[str],
    dtype: str,
    *,
    batch: int,
    contexts: int,
    subject_shards: int = 1,
    first_position: int = FIRST_POSITION,
) -> Forward:
    """The pass of a subject over contexts, on this process's devices.

    Args:
      subject: the model; one that is not a `Subject` is asked on the host (`capture_host`).
      sites: where it is tapped.
      dtype: precision of the forward pass.
      batch: contexts a forward pass, on each copy of the weights.
      contexts: how many are asked for at once; no more devices are used than have a batch.
      subject_shards: devices that share one copy of the weights.
      first_position: positions before it are left out.

    Returns:
      (tokens [C, T], length [C]) to bfloat16 activations [C, R, D] by site.

    Raises:
      ValueError: fewer devices than `subject_shards`.
    """
    if not isinstance(subject, Subject):
        return _host_forward(subject, sites, batch, first_position)
    mesh = own_mesh(subject_shards, -(-contexts // batch))
    copies = mesh.size // subject_shards
    params = subject.place(mesh).params
    rows, precision = subject_batch_sharding(mesh), jnp.dtype(dtype)

    @jax.jit
    def capture(params: Any, tokens_BT: jax.Array) -> dict[str, jax.Array]:
        captured = subject.capture(params, tokens_BT, sites, precision)
        return {s: x[:, first_position:].astype(jnp.bfloat16) for s, x in captured.items()}

    def forward(tokens_CT: np.ndarray, length_C: np.ndarray) -> dict[str, np.ndarray]:
        del length_C  # padding is on the right, where no token sees it
        n, size = len(tokens_CT), batch * copies
        padded = np.zeros((-(-n // size) * size, tokens_CT.shape[1]), np.int32)
        padded[:n] = tokens_CT
        parts = [
            capture(params, jax.device_put(padded[i : i + size], rows))
            for i in range(0, len(padded), size)
        ]
        return {s: np.concatenate([np.asarray(part[s]) for part in parts])[:n] for s in sites}

    return forward


def own_mesh(subject_shards: int, most: int | None = None) -> Mesh:
    """This process's devices, in as many copies of a subject as there are, or `most`.

    Raises:
      ValueError: fewer devices than `subject_shards`.
    """
    present = jax.local_devices()
    copies = len(present) // subject_shards
    if not copies:
        raise ValueError(
            f"subject_shards = {subject_shards}: this process has {len(present)} devices; "
            "give at most that many."
        )
    copies = copies if most is None else min(copies, most)
    shape = MeshShape(copies, subject_shards)
    return make_mesh(shape, present[: copies * subject_shards])


def _host_forward(subject: Any, sites: Sequence[str], batch: int, first: int) -> Forward:
    def forward(tokens_CT: np.ndarray, length_C: np.ndarray) -> dict[str, np.ndarray]:
        parts = [
            subject.capture_host(
                tokens_CT[i : i + batch].astype(np.int32), sites, length_C[i : i + batch]
            )
            for i in range(0, len(tokens_CT), batch)
        ]
        return {
            s: np.concatenate([part[s][:, first:].astype(ml_dtypes.bfloat16) for part in parts])
            for s in sites
        }

    return forward


class Filling:
    """Produces shards of some stores; while one is computed, those before are being written."""

    def __init__(
        self,
        stores: Mapping[str, Store],
        contexts: Contexts,
        bos: int | None,
        forward: Forward,
        log: Callable[[str], None],
    ) -> None:
        self._stores = stores
        self._contexts = contexts
        self._bos = bos
        self._forward = forward
        self._log = log
        self._spec = next(iter(stores.values())).spec
        self._order = permutation(len(contexts.tokens), self._spec.seed, CONTEXT_STREAM)

    def run(self, shards: Sequence[int]) -> None:
        """Produces the shards, in order, that nobody has committed meanwhile."""
        began = logged = time.monotonic()
        made = n_bytes = 0
        with concurrent.futures.ThreadPoolExecutor(_WRITERS) as writers:
            writing: collections.deque[concurrent.futures.Future] = collections.deque()
            for done, shard in enumerate(shards, 1):
                wanted = {s: x for s, x in self._stores.items() if not x.is_committed(shard)}
                if not wanted:  # by another process, since this one began
                    continue
                columns, length = self._columns(shard)
                acts = self._forward(columns["tokens"], length)
                while len(writing) >= _WRITERS:
                    writing.popleft().result()
                writing.append(writers.submit(_write, wanted, shard, acts, columns))
                made += 1
                n_bytes += sum(store.spec.bytes_per_shard for store in wanted.values())
                now = time.monotonic()
                if now - logged > _LOG_SECONDS or done == len(shards):
                    self._log(self._progress(done, len(shards), made, n_bytes, now - began))
                    logged = now
            while writing:
                writing.popleft().result()

    def _columns(self, shard: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        n, contexts = self._spec.contexts_per_shard, self._contexts
        ids = self._order[shard * n : (shard + 1) * n]
        tokens, length = np.asarray(contexts.tokens[ids]), np.asarray(contexts.length[ids])
        masked = mask_codes(tokens, np.asarray(contexts.keep[ids]), length, self._bos)
        columns = {
            "tokens": tokens,
            "context": ids,
            "document": contexts.document[ids],
            "offset": contexts.offset[ids],
            "masked": masked,
        }
        return columns, length

    def _progress(self, done: int, total: int, made: int, n_bytes: int, seconds: float) -> str:
        spec = self._spec
        tokens = made * spec.contexts_per_shard * spec.context_length
        left = round(seconds / done * (total - done))
        sites = spec.site if len(self._stores) == 1 else f"{len(self._stores)} sites"
        return (
            f"harvest {spec.split} {sites}: shard {done}/{total}, {tokens / seconds:,.0f} "
            f"tokens/s, {n_bytes / 1e9:.3f} GB, ETA {left // 3600}h{left % 3600 // 60:02d}m"
            f"{left % 60:02d}s"
        )


def _write(
    stores: Mapping[str, Store],
    shard: int,
    acts: Mapping[str, np.ndarray],
    columns: Mapping[str, np.ndarray],
) -> None:
    for site, store in stores.items():
        store.write_shard(shard, acts[site], **columns)
