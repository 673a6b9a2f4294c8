"""Records of the activation store: sealed JSON, digests, a shard's sums, and their merging."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from saejax.data.layout import FORMAT, StoreSpec

_SUMS = ("sum", "norm_sum", "sq_norm_sum")


class CorruptStoreError(ValueError):
    """A file of the store does not hold what was written; the message names file and place."""


def sha256(data: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()


def seal(content: Mapping[str, Any]) -> bytes:
    """JSON with a checksum of itself, in the one form that `unseal` accepts."""
    return _canonical({**content, "checksum": sha256(_canonical(content))})


def unseal(data: bytes, name: str) -> dict[str, Any]:
    """The content of a sealed file.

    Raises:
      CorruptStoreError: a single byte differs from what `seal` made; `name` is in the message.
    """
    try:
        content = json.loads(data)
        content.pop("checksum")
        intact = seal(content) == data
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CorruptStoreError(f"{name}: damaged (not a sealed JSON file): {error}") from error
    if not intact:
        raise CorruptStoreError(f"{name}: damaged (checksum mismatch).")
    return content


def content_digest(rows: Iterable[np.ndarray], table: np.ndarray) -> str:
    """sha256 of a shard's chunks (uint16), in file order, and of its context table."""
    digest = hashlib.sha256()
    for bits_CD in rows:
        digest.update(bits_CD)
    digest.update(np.ascontiguousarray(table, "<u4"))
    return digest.hexdigest()


def shard_record(spec: StoreSpec, shard: int, bits_CRD: np.ndarray, digest: str) -> dict[str, Any]:
    """The commit record of a shard.

    Args:
      spec: the store's spec.
      shard: its index.
      bits_CRD: the activations in context order, bfloat16 seen as uint16.
      digest: their `content_digest`.

    Returns:
      `shard`, `rows`, `sha256`, `spec` (fingerprint) and, in float64, `sum` [D] of the rows,
      `norm_sum` [R] and `sq_norm_sum` [R]: of ||x|| and ||x||^2 over the contexts, by position.
    """
    n, rows, d = bits_CRD.shape
    sum_D, sq_norm_CR = np.zeros(d), np.empty((n, rows))
    block = max(1, 2**18 // (rows * d))  # a block of float64 rows stays in cache
    for start in range(0, n, block):
        part = (bits_CRD[start : start + block].astype(np.uint32) << 16).view(np.float32)
        part = part.astype(np.float64)
        sum_D += part.sum((0, 1))
        sq_norm_CR[start : start + block] = np.einsum("crd,crd->cr", part, part)
    return {
        "shard": shard,
        "rows": n * rows,
        "sha256": digest,
        "spec": spec.fingerprint(),
        "sum": sum_D.tolist(),
        "norm_sum": np.sqrt(sq_norm_CR).sum(0).tolist(),
        "sq_norm_sum": sq_norm_CR.sum(0).tolist(),
    }


def rounded_bits(path: str, spec: StoreSpec, shard: int, acts: np.ndarray) -> np.ndarray:
    """A shard's activations [C, R, D] as bfloat16 bits; ValueError for a wrong index or shape."""
    expected = (spec.contexts_per_shard, spec.rows_per_context, spec.d_model)
    if not 0 <= shard < spec.n_shards:
        raise ValueError(f"{path}: no shard {shard}; the store has {spec.n_shards}.")
    if acts.shape != expected:
        raise ValueError(
            f"{path}: shard {shard} has shape {acts.shape}, not the spec's "
            f"[contexts_per_shard, rows_per_context, d_model] = {expected}."
        )
    return np.ascontiguousarray(acts.astype(ml_dtypes.bfloat16, copy=False)).view(np.uint16)


def refuse_non_finite(
    spec: StoreSpec,
    shard: int,
    bits_CRD: np.ndarray,
    document_C: np.ndarray,
    names: Callable[[], Sequence[str]],
) -> None:
    """ValueError with count, site, shard and first document when a bfloat16 is not finite."""
    if all((block & 0x7FFF).max() < 0x7F80 for block in bits_CRD):  # the usual case, in cache
        return
    bad_C = ((bits_CRD & 0x7FFF) >= 0x7F80).sum((1, 2))
    first = int(document_C[int((bad_C > 0).argmax())])
    name = dict(enumerate(names())).get(first, f"document {first}")
    raise ValueError(
        f"{bad_C.sum()} NaN or infinite activations at site {spec.site!r}, in "
        f"{(bad_C > 0).sum()} contexts of shard {shard}, first in {name}. The shard was not "
        "written; check the subject model, or harvest in float32."
    )


def records_digest(records: Sequence[Mapping[str, Any]]) -> str:
    """Digest of the shards' digests, in order."""
    return sha256("".join(record["sha256"] for record in records).encode())


def merge(
    spec: StoreSpec, records: Sequence[Mapping[str, Any]], documents: int, provenance: Mapping
) -> dict[str, Any]:
    """The manifest of a complete store from its commit records, in order.

    Returns:
      `spec`, `fingerprint`, `rows`, `contexts`, `documents` (how many), `mean` (list [D]),
      `mean_norm` (mean of ||x||), `mean_sq_norm`, `total_variance` (mean of ||x - mean||^2),
      `norm_by_position` and `rms_norm_by_position` (lists [R], the first is of position
      `first_position`), `sha256` (of all shards) and `provenance` as given.
    """
    rows = sum(record["rows"] for record in records)
    total = {key: np.zeros(len(records[0][key])) for key in _SUMS}
    for record in records:
        for key in _SUMS:
            total[key] += record[key]
    per_position = rows // spec.rows_per_context
    mean = total["sum"] / rows
    mean_sq_norm = float(total["sq_norm_sum"].sum() / rows)
    return {
        "format": FORMAT,
        "spec": dataclasses.asdict(spec),
        "fingerprint": spec.fingerprint(),
        "rows": rows,
        "contexts": spec.n_shards * spec.contexts_per_shard,
        "documents": documents,
        "mean": mean.tolist(),
        "mean_norm": float(total["norm_sum"].sum() / rows),
        "mean_sq_norm": mean_sq_norm,
        "total_variance": mean_sq_norm - float(mean @ mean),
        "norm_by_position": (total["norm_sum"] / per_position).tolist(),
        "rms_norm_by_position": np.sqrt(total["sq_norm_sum"] / per_position).tolist(),
        "sha256": records_digest(records),
        "provenance": dict(provenance),
    }


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
