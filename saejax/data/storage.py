"""What a store costs, on paper: bytes, files, reading rate; and what streaming costs instead.

Arithmetic alone: no subject, text or disk is looked at, so that a store of petabytes can be judged.
"""

import dataclasses
from collections.abc import Sequence

from saejax.data.layout import CONTEXT_COLUMNS, StoreSpec

# Assumptions that give a cost its shape: the order of what object storage is listed at.
DOLLARS_PER_GB_MONTH = 0.02
DOLLARS_PER_MILLION_WRITES = 5.0
BUFFER_BATCHES = 64
"""Batches that a swap buffer holds: from 16 on its order is as good as a full shuffle."""
MAX_DROPPED = 0.05
"""Share of the contexts asked for that whole shards may leave out, or take more."""
_SLOT_BYTES = 8  # context and position of a row in the buffer, for the checkpoint
_JSON_FLOAT = 20  # bytes of a float64 in a commit record
_MAX_SHARDS = 999_999


@dataclasses.dataclass(frozen=True, kw_only=True)
class StorePlan:
    """The size of a harvest.

    Attributes:
      tokens: activations to store at each site.
      widths: width of each site.
      context_length: tokens a context.
      contexts_per_shard: contexts a shard, also the rows of a chunk.
      n_shards: shards of each site's store.
      first_position: positions before it are not stored.
    """

    tokens: int
    widths: tuple[int, ...]
    context_length: int
    contexts_per_shard: int
    n_shards: int
    first_position: int = 1

    @property
    def rows_per_context(self) -> int:
        """Activations of a context."""
        return self.context_length - self.first_position

    @property
    def rows(self) -> int:
        """Activations of a site, in whole shards."""
        return self.n_shards * self.contexts_per_shard * self.rows_per_context

    @property
    def forward_tokens(self) -> int:
        """Tokens that the subject reads, positions that are not stored among them."""
        return self.n_shards * self.contexts_per_shard * self.context_length

    @property
    def activation_bytes(self) -> int:
        """Of all sites, in bfloat16."""
        return 2 * self.rows * sum(self.widths)

    @property
    def table_bytes(self) -> int:
        """Of the context tables: tokens and provenance."""
        columns = CONTEXT_COLUMNS + self.context_length + -(-self.rows_per_context // 32)
        return 4 * columns * self.n_shards * self.contexts_per_shard * len(self.widths)

    @property
    def record_bytes(self) -> int:
        """Of the commit records, about."""
        return _JSON_FLOAT * sum(w + 3 * self.rows_per_context for w in self.widths) * self.n_shards

    @property
    def total_bytes(self) -> int:
        """Of everything."""
        return self.activation_bytes + self.table_bytes + self.record_bytes

    @property
    def objects(self) -> int:
        """Files: activations, contexts and record of each shard."""
        return 3 * self.n_shards * len(self.widths)


def plan_shards(available: int, goal: int, contexts_per_shard: int) -> tuple[int, int]:
    """Contexts a shard and the number of shards, for `goal` of `available` contexts.

    Takes the largest power of two, at most `contexts_per_shard`, that comes within 5 % of the
    goal in whole shards.
    """
    size = 1 << (contexts_per_shard.bit_length() - 1)
    while size > 1:
        n_shards = min(max(1, round(goal / size)), available // size)
        if abs(n_shards * size - goal) <= MAX_DROPPED * goal:
            return size, n_shards
        size //= 2
    return 1, goal


def plan_store(
    tokens: int,
    widths: Sequence[int],
    context_length: int,
    *,
    contexts_per_shard: int = 1024,
    first_position: int = 1,
) -> StorePlan:
    """The store of so many activations, cut into shards as a harvest cuts more text than that."""
    contexts = -(-tokens // (context_length - first_position))
    enough = contexts + contexts_per_shard
    contexts_per_shard, n_shards = plan_shards(enough, contexts, contexts_per_shard)
    return StorePlan(
        tokens=tokens,
        widths=tuple(widths),
        context_length=context_length,
        contexts_per_shard=contexts_per_shard,
        n_shards=n_shards,
        first_position=first_position,
    )


def plan_of(specs: Sequence[StoreSpec]) -> StorePlan:
    """The size of stores of one split, all of the same shards."""
    first = specs[0]
    return StorePlan(
        tokens=first.n_shards * first.rows_per_shard,
        widths=tuple(spec.d_model for spec in specs),
        context_length=first.context_length,
        contexts_per_shard=first.contexts_per_shard,
        n_shards=first.n_shards,
        first_position=first.first_position,
    )


def describe_store(plan: StorePlan, tokens_per_second: float | None = None) -> list[str]:
    """The store in lines of text; `tokens_per_second` is what the subject reads, for the time."""
    shard = 2 * plan.contexts_per_shard * plan.rows_per_context
    months = plan.total_bytes / 1e9 * DOLLARS_PER_GB_MONTH
    writes = plan.objects / 1e6 * DOLLARS_PER_MILLION_WRITES
    widths = " + ".join(map(str, plan.widths))
    lines = [
        f"activations stored, bfloat16 ({len(plan.widths)} site(s) of width {widths})",
        _row("rows", f"{plan.rows:,} a site, of {plan.forward_tokens:,} tokens read"),
        _row(
            "shards",
            f"{plan.n_shards:,} a site, of {plan.contexts_per_shard:,} contexts x "
            f"{plan.rows_per_context} rows, {size(shard * max(plan.widths))} each, in chunks of "
            f"{size(2 * plan.contexts_per_shard * max(plan.widths))}",
        ),
        _row(
            "bytes",
            f"{size(plan.total_bytes)}: activations {size(plan.activation_bytes)}, contexts "
            f"{size(plan.table_bytes)}, records {size(plan.record_bytes)}",
        ),
        _row(
            "cost",
            f"{size(plan.total_bytes)} in {plan.objects:,} files; as objects about "
            f"${months:,.0f} a month and ${writes:,.0f} to write (at ${DOLLARS_PER_GB_MONTH} a "
            f"GB-month and ${DOLLARS_PER_MILLION_WRITES:g} a million writes)",
        ),
    ]
    if plan.n_shards > _MAX_SHARDS:
        lines.append(_row("", f"more than {_MAX_SHARDS:,} shards: raise contexts_per_shard"))
    rate = 2 * max(plan.widths)
    lines.append(
        _row(
            "reading", f"{size(rate)} a token: training at 1 M tokens/s reads {size(1e6 * rate)}/s"
        )
    )
    if tokens_per_second is None:
        lines.append(_row("time", f"{plan.forward_tokens:,} tokens / the subject's tokens/s"))
    else:
        seconds = plan.forward_tokens / tokens_per_second
        lines.append(
            _row(
                "time",
                f"{duration(seconds)} at {tokens_per_second:,.0f} tokens/s, writing "
                f"{size(plan.total_bytes / seconds)}/s",
            )
        )
    return lines


def describe_stream(
    batch_size: int,
    width: int,
    sae_flops: float | None = None,
    buffer_batches: int = BUFFER_BATCHES,
) -> list[str]:
    """The streaming alternative: a swap buffer on the devices, and the subject run every epoch.

    Args:
      batch_size: rows of a training batch.
      width: of a row.
      sae_flops: floating-point operations of the autoencoder's encoder, a token; None when not
        known.
      buffer_batches: batches that the buffer holds.
    """
    rows = buffer_batches * batch_size
    held = size(rows * (2 * width + _SLOT_BYTES))
    layer = 24.0 * width**2  # 12 d^2 weights a GPT block, a multiply-add each
    lines = [
        "streamed instead: nothing is stored, every epoch runs the subject again",
        _row("swap buffer", f"{rows:,} rows ({buffer_batches} batches): {held}"),
        _row(
            "subject",
            f"about {short(layer / 1e9)} GFLOP a token and layer below the site (24 width^2)",
        ),
    ]
    if sae_flops is not None:
        lines.append(
            _row(
                "against it",
                f"the encoder takes {short(sae_flops / 1e9)} GFLOP a token, as much as "
                f"{short(sae_flops / layer)} such layers",
            )
        )
    return lines


def size(n: float) -> str:
    """Bytes in decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n < 999.5:
            return f"{short(n)} {unit}"
        n /= 1000
    return f"{short(n)} PB"


def duration(seconds: float) -> str:
    """`3 days`, `2.5 h`, `40 s`."""
    for unit, length in (("years", 31_557_600), ("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{short(seconds / length)} {unit}"
    return f"{short(seconds)} s"


def short(n: float) -> str:
    """Three digits, or all before the point."""
    return f"{n:,.0f}" if abs(n) >= 999.5 else f"{n:.3g}"


def _row(name: str, text: str) -> str:
    return f"  {name:<18}{text}".rstrip()
