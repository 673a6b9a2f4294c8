"""What one shard holds: activations rounded, masked and put in order, with their commit record."""

import dataclasses
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from saejax.data import layout, records
from saejax.data.layout import LEFT_OUT, MASKED, StoreSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Content:
    """A shard as it is written; a pure function of the activations, the mask and the spec.

    Attributes:
      bits_JCD: its chunks, bfloat16 seen as uint16.
      table: uint32 [C, spec.columns], its contexts; see `shards`.
      row_JC: which of the R rows of its context each row is.
      sq_norm_JC: float64, the rows' squared norms.
      sum_D: float64, the rows' sum.
      left_out: how many rows are not stored, by reason; see `layout.LEFT_OUT`.
    """

    bits_JCD: np.ndarray
    table: np.ndarray
    row_JC: np.ndarray
    sq_norm_JC: np.ndarray
    sum_D: np.ndarray
    left_out: dict[str, int]

    @classmethod
    def of(
        cls,
        spec: StoreSpec,
        shard: int,
        acts: np.ndarray,
        *,
        tokens: np.ndarray,
        provenance: np.ndarray,
        masked: np.ndarray | None,
        name_of: Callable[[int], str],
    ) -> "Content":
        """Chooses and orders the rows of a shard.

        Args:
          spec: the store's spec.
          shard: its index.
          acts: [C, R, D] bfloat16 or a float type, in context order.
          tokens: [C, T].
          provenance: [C, 3], context id, document and offset.
          masked: [C, T] codes of `layout.MASKED`, or None.
          name_of: name of a document, for messages.

        Raises:
          ValueError: wrong index or shape; NaN or infinity in a row that is not masked.
        """
        bits_CRD = _rounded(spec, shard, acts)
        kept_CR, left_out = _unmasked(spec, shard, masked)
        bits_ND = bits_CRD.reshape(-1, spec.d_model)
        sq_norm_N, sum_D = _moments(bits_ND)
        sq_norm_CR = sq_norm_N.reshape(kept_CR.shape)
        if not np.isfinite(sq_norm_CR[kept_CR]).all():
            raise _non_finite(spec, shard, bits_CRD, kept_CR, provenance[:, 1], name_of)
        outlying_CR = _beyond(spec.max_norm_ratio, sq_norm_CR, kept_CR)
        kept_CR &= ~outlying_CR
        order_CR = layout.position_order(spec.seed, shard, *kept_CR.shape)
        places_JC = layout.chunk_places(order_CR, kept_CR)
        left_out["norm"] = int(outlying_CR.sum())
        left_out["last_chunk"] = int(kept_CR.sum()) - places_JC.size
        columns = [provenance, tokens, layout.pack_mask(kept_CR)]
        bits_JCD = bits_ND[places_JC]
        if places_JC.size < len(bits_ND):
            _, sum_D = _moments(bits_JCD.reshape(-1, spec.d_model))
        return cls(
            bits_JCD=bits_JCD,
            table=np.concatenate(columns, axis=1, dtype=np.uint32, casting="unsafe"),
            row_JC=places_JC % spec.rows_per_context,
            sq_norm_JC=sq_norm_N[places_JC],
            sum_D=sum_D,
            left_out=left_out,
        )

    def record(self, spec: StoreSpec, shard: int) -> dict[str, Any]:
        """The commit record.

        Returns:
          `shard`, `chunks`, `rows`, `left_out`, `sha256` (of the content), `spec` (fingerprint)
          and, in float64, `sum` [D] of the rows, and `count` [R], `norm_sum` [R] and `sq_norm_sum`
          [R]: of 1, ||x|| and ||x||^2 by position.
        """
        return {
            "shard": shard,
            "chunks": len(self.row_JC),
            "rows": self.row_JC.size,
            "left_out": {reason: self.left_out[reason] for reason in LEFT_OUT},
            "sha256": records.content_digest(self.bits_JCD, self.table),
            "spec": spec.fingerprint(),
            "sum": self.sum_D.tolist(),
            "count": self._by_position(spec, None),
            "norm_sum": self._by_position(spec, np.sqrt(self.sq_norm_JC)),
            "sq_norm_sum": self._by_position(spec, self.sq_norm_JC),
        }

    def _by_position(self, spec: StoreSpec, weights: np.ndarray | None) -> list[float]:
        flat = None if weights is None else weights.ravel()
        return np.bincount(self.row_JC.ravel(), flat, spec.rows_per_context).tolist()


def _rounded(spec: StoreSpec, shard: int, acts: np.ndarray) -> np.ndarray:
    """A shard's activations [C, R, D] as bfloat16 bits; ValueError for a wrong index or shape."""
    expected = (spec.contexts_per_shard, spec.rows_per_context, spec.d_model)
    if not 0 <= shard < spec.n_shards:
        raise ValueError(f"no shard {shard}; the store has {spec.n_shards}.")
    if acts.shape != expected:
        raise ValueError(
            f"activations of shard {shard} have shape {acts.shape}, not the spec's "
            f"[contexts_per_shard, rows_per_context, d_model] = {expected}."
        )
    return np.ascontiguousarray(acts.astype(ml_dtypes.bfloat16, copy=False)).view(np.uint16)


def _unmasked(
    spec: StoreSpec, shard: int, masked_CT: np.ndarray | None
) -> tuple[np.ndarray, dict[str, int]]:
    """Which rows the mask keeps, bool [C, R], and how many it leaves out, by reason."""
    shape = (spec.contexts_per_shard, spec.context_length)
    if masked_CT is None:
        masked_CT = np.zeros(shape, np.uint8)
    if masked_CT.shape != shape:
        raise ValueError(
            f"the mask of shard {shard} has shape {masked_CT.shape}, not the spec's "
            f"[contexts_per_shard, context_length] = {shape}."
        )
    masked_CR = masked_CT[:, spec.first_position :]
    left_out = {MASKED[code]: int((masked_CR == code).sum()) for code in range(1, len(MASKED))}
    return masked_CR == 0, {"first_positions": shape[0] * spec.first_position, **left_out}


def _non_finite(
    spec: StoreSpec,
    shard: int,
    bits_CRD: np.ndarray,
    kept_CR: np.ndarray,
    document_C: np.ndarray,
    name_of: Callable[[int], str],
) -> ValueError:
    """What to say of kept values that are not finite: count, site, shard and first document."""
    bad_C = (((bits_CRD & 0x7FFF) >= 0x7F80) & kept_CR[:, :, None]).sum((1, 2))
    first = int(document_C[int((bad_C > 0).argmax())])
    return ValueError(
        f"{bad_C.sum()} NaN or infinite activations at site {spec.site!r}, in "
        f"{(bad_C > 0).sum()} contexts of shard {shard}, first in {name_of(first)}. The shard was "
        "not written; check the subject model, or harvest in float32."
    )


def _moments(bits_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float64 [N] and [D]: ||x||^2 of each row of bfloat16 seen as uint16, and the rows' sum.

    No bfloat16 overflows when squared in float64: a squared norm is finite where its row is.
    """
    sq_norm_N, sum_D = np.empty(len(bits_ND)), np.zeros(bits_ND.shape[1])
    block = max(1, 2**17 // bits_ND.shape[1])  # of which every form stays in cache
    with np.errstate(invalid="ignore"):  # masked rows may hold anything
        for start in range(0, len(bits_ND), block):
            part = bits_ND[start : start + block].astype(np.uint32)
            part <<= 16
            wide = part.view(np.float32).astype(np.float64)
            np.einsum("nd,nd->n", wide, wide, out=sq_norm_N[start : start + block])
            sum_D += wide.sum(0)
    return sq_norm_N, sum_D


def _beyond(ratio: float | None, sq_norm_CR: np.ndarray, kept_CR: np.ndarray) -> np.ndarray:
    """bool [C, R]: kept rows whose norm is above `ratio` times the kept rows' median norm.

    None finds none, and so does a median of zero, which says nothing about the rest.
    """
    norms = np.sqrt(sq_norm_CR[kept_CR])
    median = float(np.median(norms)) if norms.size else 0.0
    if ratio is None or median == 0:
        return np.zeros_like(kept_CR)
    return kept_CR & (sq_norm_CR > (ratio * median) ** 2)
