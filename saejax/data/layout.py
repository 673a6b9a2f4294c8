"""Layout of the activation store: its spec and the orders that follow from (seed, index)."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

FORMAT = "saejax-store-2"
CONTEXT_STREAM, POSITION_STREAM, SHARD_STREAM, CHUNK_STREAM = 1, 2, 3, 4
CONTEXT_COLUMNS = 3  # context id, document, offset; the tokens follow, then the mask's bits
MASKED = ("kept", "bos", "special", "padding")
"""What the codes of a text's masks mean: why a position is not stored, 0 where it may be."""
LEFT_OUT = ("first_positions", *MASKED[1:], "norm", "last_chunk")
"""Why rows of a shard are not stored: the keys of a commit record's counts, each row in one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """What a store is: with a shard's index it fixes every byte of that shard.

    Attributes:
      subject: name of the subject model, for the reader: the same weights may go by another path,
        so it is no part of what the spec is.
      subject_fingerprint: digest of its weights and config.
      text_fingerprint: digest of the packed contexts (text, tokenizer, packing).
      split: 'train' or 'held_out'.
      site: the tapped site, e.g. '1.resid_post'.
      d_model: width of the site.
      context_length: tokens a context, T.
      first_position: positions before this one are not stored (their norms are unlike the rest).
      contexts_per_shard: contexts a shard, C; also the rows of a chunk.
      n_shards: shards of the complete store.
      max_norm_ratio: rows whose norm is above this multiple of their shard's median are left out;
        None keeps them.
      dtype: storage type; 'bfloat16' is the only one.
      compute_dtype: precision of the subject's forward pass.
      seed: seed of the context permutation and of the position order.
    """

    subject: str
    subject_fingerprint: str
    text_fingerprint: str
    split: str
    site: str
    d_model: int
    context_length: int
    first_position: int = 1
    contexts_per_shard: int = 1024
    n_shards: int
    max_norm_ratio: float | None = None
    dtype: str = "bfloat16"
    compute_dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("d_model", "context_length", "contexts_per_shard", "n_shards"):
            if getattr(self, name) < 1:
                raise ValueError(f"StoreSpec.{name} = {getattr(self, name)}: must be at least 1.")
        if self.n_shards > 999_999:
            raise ValueError(
                f"StoreSpec.n_shards = {self.n_shards}: at most 999999; raise contexts_per_shard."
            )
        if not 0 <= self.first_position < self.context_length:
            raise ValueError(
                f"StoreSpec.first_position = {self.first_position}: must be at least 0 and below "
                f"context_length = {self.context_length}."
            )
        if self.max_norm_ratio is not None and not self.max_norm_ratio > 1:
            raise ValueError(
                f"StoreSpec.max_norm_ratio = {self.max_norm_ratio}: must be above 1, or None."
            )
        if self.dtype != "bfloat16":
            raise ValueError(f"StoreSpec.dtype = {self.dtype!r}: only 'bfloat16' is stored.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"StoreSpec.seed = {self.seed}: must be in [0, 2**63).")

    @property
    def rows_per_context(self) -> int:
        """Positions of a context from `first_position` on, R; also the most chunks of a shard."""
        return self.context_length - self.first_position

    @property
    def rows_per_shard(self) -> int:
        """Rows of a shard of which nothing is left out, R * C."""
        return self.rows_per_context * self.contexts_per_shard

    @property
    def bytes_per_shard(self) -> int:
        """Bytes of such a shard's two files, without their indices (16 bytes a chunk)."""
        return self.rows_per_shard * self.d_model * 2 + self.contexts_per_shard * self.columns * 4

    @property
    def columns(self) -> int:
        """Width of the context table."""
        return CONTEXT_COLUMNS + self.context_length + -(-self.rows_per_context // 32)

    def fingerprint(self) -> str:
        """First 16 hex digits of the sha256 of the spec and the format's version."""
        return _digest({key: x for key, x in dataclasses.asdict(self).items() if key != "subject"})

    def former_fingerprint(self) -> str:
        """The same with the subject's name, as records of older stores have it."""
        return _digest(dataclasses.asdict(self))


def _digest(spec: Mapping[str, Any]) -> str:
    content = json.dumps({"format": FORMAT, **spec}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class ShardRows:
    """One shard in context order.

    Attributes:
      rows: bfloat16 [C, R, D]; rows[c, r] is position `r + spec.first_position` of context c,
        zeros where it is not stored.
      stored: bool [C, R], whether the store holds the row.
      tokens: uint32 [C, T].
      context: uint32 [C], index of the context in the packed text.
      document: uint32 [C], index into `Store.documents`.
      offset: int64 [C]: token p of the context is token `offset + p` of its document; -1 where a
        BOS that belongs to no document stands before the context's own tokens.
    """

    rows: np.ndarray
    stored: np.ndarray
    tokens: np.ndarray
    context: np.ndarray
    document: np.ndarray
    offset: np.ndarray

    @classmethod
    def of(
        cls,
        spec: StoreSpec,
        table: np.ndarray,
        bits_ND: np.ndarray,
        stored_N: np.ndarray,
        lead: int,
    ) -> "ShardRows":
        """From a shard's context table, its rows as uint16 and `Store.lead`."""
        shape = (spec.contexts_per_shard, spec.rows_per_context)
        return cls(
            rows=bits_ND.reshape(*shape, spec.d_model).view(ml_dtypes.bfloat16),
            stored=stored_N.reshape(shape),
            tokens=table[:, CONTEXT_COLUMNS : CONTEXT_COLUMNS + spec.context_length],
            context=table[:, 0],
            document=table[:, 1],
            offset=table[:, 2].astype(np.int64) - lead,
        )


def random_keys(shape: tuple[int, ...], seed: int, stream: int, index: int = 0) -> np.ndarray:
    """uint64 sort keys, a pure function of (seed, stream, index).

    Raw Philox output, because numpy promises that it never changes (unlike `Generator` methods).
    """
    bits = np.random.Philox(key=np.array([seed, (stream << 48) | index], np.uint64))
    return bits.random_raw(int(np.prod(shape))).reshape(shape)


def permutation(n: int, seed: int, stream: int, index: int = 0) -> np.ndarray:
    """int64 permutation of range(n), a pure function of (n, seed, stream, index)."""
    return np.argsort(random_keys((n,), seed, stream, index), kind="stable")


@functools.lru_cache(maxsize=32)
def position_order(seed: int, shard: int, contexts: int, rows: int) -> np.ndarray:
    """int32 [C, R]: the order in which the rows of context c are drawn."""
    keys = random_keys((contexts, rows), seed, POSITION_STREAM, shard)
    order_CR = np.argsort(keys, axis=1, kind="stable").astype(np.int32)
    order_CR.flags.writeable = False
    return order_CR


def chunk_places(order_CR: np.ndarray, kept_CR: np.ndarray) -> np.ndarray:
    """int64 [J, C]: the row `c * R + r` of the shard in each slot of each of its J chunks.

    Slot c belongs to context c, whose kept rows are dealt to the J chunks in the order drawn: one
    to each, or, of a context that has fewer, to chunks at equal distances. The slots it leaves are
    given to further rows of contexts that have more, so that every chunk is full; C - 1 rows at
    most are left over. With nothing masked, each chunk is one row of each of the C contexts.

    Args:
      order_CR: see `position_order`.
      kept_CR: bool, rows that are not masked.
    """
    n, rows = order_CR.shape
    place_CR = np.arange(n)[:, None] * rows + order_CR
    taken_CR = np.take_along_axis(kept_CR, order_CR, axis=1)
    if taken_CR.all():
        return np.ascontiguousarray(place_CR.T)
    kept_first_CR = np.argsort(~taken_CR, axis=1, kind="stable")
    place_RC = np.take_along_axis(place_CR, kept_first_CR, axis=1).T
    count_C, rank_R1 = taken_CR.sum(axis=1), np.arange(rows)[:, None]
    chunks = int(count_C.sum()) // n
    own_C = np.minimum(count_C, chunks)
    shift_C = order_CR[:, 0].astype(np.int64) * chunks // rows  # as good as a draw from the chunks
    chunk_RC = (rank_R1 * chunks + shift_C) // np.maximum(own_C, 1)
    rank, context = np.nonzero(rank_R1 < own_C)
    place_JC = np.full((chunks, n), -1)
    place_JC[chunk_RC[rank, context], context] = place_RC[rank, context]
    hole_JC = place_JC < 0
    # In rounds over the longer contexts, so that a chunk meets few of them twice.
    spare = place_RC[(rank_R1 >= own_C) & (rank_R1 < count_C)]
    place_JC[hole_JC] = spare[: hole_JC.sum()]
    return place_JC


def pack_mask(kept_CR: np.ndarray) -> np.ndarray:
    """bool [C, R] as uint32 [C, ceil(R / 32)], the first row in the lowest bit."""
    words = -(-kept_CR.shape[1] // 32)
    padded = np.zeros((len(kept_CR), 32 * words), bool)
    padded[:, : kept_CR.shape[1]] = kept_CR
    return np.packbits(padded, axis=1, bitorder="little").view("<u4").astype(np.uint32)


def unpack_mask(words_CW: np.ndarray, rows: int) -> np.ndarray:
    """The inverse of `pack_mask`: bool [C, rows]."""
    octets = np.ascontiguousarray(words_CW, "<u4").view(np.uint8)
    return np.unpackbits(octets, axis=1, count=rows, bitorder="little").astype(bool)


def zarr_spec(
    kvstore: Any, dtype: str, n_shards: int, shard_chunk: tuple[int, int], width: int
) -> dict[str, Any]:
    """A zarr3 array of `n_shards` files; both the chunks and a shard's index carry a crc32c."""
    shard, chunk = shard_chunk
    checked = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    inner = {
        "chunk_shape": [chunk, width],
        "codecs": checked,
        "index_codecs": checked,
        "index_location": "end",
    }
    grid = {"name": "regular", "configuration": {"chunk_shape": [shard, width]}}
    return {
        "driver": "zarr3",
        "kvstore": kvstore,
        "fill_missing_data_reads": False,  # a missing shard would read as zeros
        "store_data_equal_to_fill_value": True,  # an all-zero shard would not be written
        "metadata": {
            "shape": [n_shards * shard, width],
            "data_type": dtype,
            "chunk_grid": grid,
            "codecs": [{"name": "sharding_indexed", "configuration": inner}],
        },
    }


def stored_spec(name: str, content: Mapping[str, Any]) -> StoreSpec:
    """The spec in a store's spec.json; ValueError when the format is not this version's."""
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{name}: format {content.get('format')!r}; this version of saejax reads {FORMAT!r}."
        )
    return StoreSpec(**content["spec"])


def check_same(path: str, stored: StoreSpec, wanted: StoreSpec) -> None:
    """ValueError that names every field in which two specs differ, but for the subject's name."""
    old, new = dataclasses.asdict(stored), dataclasses.asdict(wanted)
    keys = [key for key in old if key != "subject" and old[key] != new[key]]
    differing = [f"{key}: stored {old[key]!r}, wanted {new[key]!r}" for key in keys]
    if differing:
        hint = ""
        if "subject_fingerprint" in keys:
            hint = (
                "The fingerprint follows the subject's weights and the type they are held in: give "
                "the same weights, in the Harvest.weights_dtype that the store was made with "
                "(Harvest.dtype for a 'torch:' subject). "
            )
        raise ValueError(
            f"{path} holds the activations of another spec ({'; '.join(differing)}). {hint}"
            "Choose another path, or delete that store."
        )
