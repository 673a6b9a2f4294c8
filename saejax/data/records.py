"""Records of the activation store: sealed JSON, digests, and the merging of shards' sums."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from saejax.data.layout import FORMAT, LEFT_OUT, StoreSpec

SUMS = ("sum", "count", "norm_sum", "sq_norm_sum")


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


def records_digest(digests: Iterable[str]) -> str:
    """Digest of the shards' digests, in order."""
    return sha256("".join(digests).encode())


def merge(
    spec: StoreSpec, records: Iterable[Mapping[str, Any]], documents: int, provenance: Mapping
) -> dict[str, Any]:
    """The manifest of a complete store from its commit records, in order; read once, none kept.

    Returns:
      `spec`, `fingerprint`, `rows`, `chunks` (of every shard), `computations` (how rows were, each
      once; not there where nobody said), `left_out` (rows not stored, by reason), `contexts`,
      `documents` (how many), `mean` (list [D]), `mean_norm` (mean of ||x||), `mean_sq_norm`,
      `total_variance` (mean of ||x - mean||^2), `count_by_position`, `norm_by_position` and
      `rms_norm_by_position` (lists [R], the first is of position `first_position`; None where no
      row is stored), `sha256` (of all shards) and `provenance` as given.

    Raises:
      ValueError: no row is left to store.
    """
    rows, chunks, digests, computations = 0, [], [], {}
    left_out = dict.fromkeys(LEFT_OUT, 0)
    total = {key: np.zeros(spec.rows_per_context) for key in SUMS}
    total["sum"] = np.zeros(spec.d_model)
    for record in records:
        rows += record["rows"]
        chunks.append(record["chunks"])
        digests.append(record["sha256"])
        if computation := record.get("computation"):
            computations[sha256(_canonical(computation))] = computation
        left_out = {key: left_out[key] + record["left_out"][key] for key in LEFT_OUT}
        total = {key: total[key] + record[key] for key in SUMS}
    if not rows:
        raise ValueError(
            f"site {spec.site!r}, {spec.split} split: nothing is left to store ({left_out}). Give "
            "more text, fewer contexts_per_shard, or mask less."
        )
    count, mean = total["count"], total["sum"] / rows
    mean_sq_norm = float(total["sq_norm_sum"].sum() / rows)

    def by_position(sums: np.ndarray) -> list[float | None]:
        return [float(s / n) if n else None for s, n in zip(sums, count, strict=True)]

    rms = [None if x is None else x**0.5 for x in by_position(total["sq_norm_sum"])]
    return {
        "format": FORMAT,
        "spec": dataclasses.asdict(spec),
        "fingerprint": spec.fingerprint(),
        "rows": rows,
        "chunks": chunks,
        **({"computations": list(computations.values())} if computations else {}),
        "left_out": left_out,
        "contexts": spec.n_shards * spec.contexts_per_shard,
        "documents": documents,
        "mean": mean.tolist(),
        "mean_norm": float(total["norm_sum"].sum() / rows),
        "mean_sq_norm": mean_sq_norm,
        "total_variance": mean_sq_norm - float(mean @ mean),
        "count_by_position": [int(n) for n in count],
        "norm_by_position": by_position(total["norm_sum"]),
        "rms_norm_by_position": rms,
        "sha256": records_digest(digests),
        "provenance": dict(provenance),
    }


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
