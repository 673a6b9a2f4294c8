"""How many candidates each latent shard offers to a global top-k, and what that may lose.

With latents placed on S shards at random, the number X of a token's k kept latents that one shard
holds is hypergeometric: n latents, k of them kept, n / S drawn. A shard that offers c candidates
loses max(X - c, 0) of them, so the expected share of the exact top-k that is lost is
S / k * E[max(X - c, 0)]. The paper's rule c = 2 k / S (Gao et al. 2024, App. D) loses 21 % at
k = 256 on 512 shards, and a model trained so is wrong when it is evaluated exactly.

Initialisation gives every latent the same distribution, so placement is random whatever training
makes of them, and the expectation is the same however latents are correlated or dense. One
placement scatters around it, the more so the fewer latents carry the activations;
`saejax.evals.truncation` measures the loss of a trained model.
"""

import bisect
import dataclasses
import functools
import math
from typing import Literal

MAX_EXPECTED_LOSS = 1e-5
"""The share of the exact top-k that default capacities may lose, in expectation."""

_ALARM = 5
"""A measured share this many times the expected one is worth a warning."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopKConfig:
    """Selection of the k largest latents over latent shards.

    Attributes:
      capacity_factor: each shard offers at least capacity_factor * k / shards candidates (2 in the
        paper); None offers min(k, latents of the shard), which is exact.
      max_expected_loss: and at least the smallest number that loses less than this share of the
        exact top-k, in expectation; None drops this floor and leaves the paper's rule.
      exchange: 'all_to_all' sends each shard the candidates of its share of the tokens, and
        returns how many of them are kept; 'all_gather' sends every shard all candidates, as in
        the paper. The selection is the same.
    """

    capacity_factor: float | None = 2.0
    max_expected_loss: float | None = MAX_EXPECTED_LOSS
    exchange: Literal["all_to_all", "all_gather"] = "all_to_all"

    def __post_init__(self):
        factor, loss = self.capacity_factor, self.max_expected_loss
        if factor is not None and not 1 <= factor < math.inf:
            raise ValueError(
                f"capacity_factor = {factor} would keep fewer than k latents in total; it must be "
                f"at least 1, or None to offer every candidate (exact)"
            )
        if loss is not None and not 0 < loss < 1:
            raise ValueError(
                f"max_expected_loss = {loss} must lie between 0 and 1 (1e-5, say), or be None for "
                f"the bare capacity_factor"
            )
        if self.exchange not in ("all_to_all", "all_gather"):
            raise ValueError(f"exchange = {self.exchange!r} must be 'all_to_all' or 'all_gather'")

    def capacity(self, k: int, n_latents: int, shards: int) -> int:
        """Candidates that each of `shards` shards offers for k kept latents.

        Between k / shards, which would suffice if every shard held its share, and
        min(k, n_latents / shards), which is exact; 0 if nothing is kept.

        Raises:
          ValueError: k does not lie in [0, n_latents], or the shards do not divide the latents.
        """
        most = exact_capacity(k, n_latents, shards)
        if self.capacity_factor is None or most == 0:
            return most
        floor = math.ceil(self.capacity_factor * k / shards)
        if self.max_expected_loss is not None and floor < most:
            floor = max(floor, smallest_capacity(k, n_latents, shards, self.max_expected_loss))
        return min(floor, most)


def exact_capacity(k: int, n_latents: int, shards: int) -> int:
    """The fewest candidates a shard that cannot lose anything: min(k, n_latents / shards).

    Raises:
      ValueError: k does not lie in [0, n_latents], or the shards do not divide the latents.
    """
    if not 0 <= k <= n_latents:
        raise ValueError(f"k = {k} must lie between 0 and n_latents = {n_latents}")
    if shards < 1 or n_latents % shards:
        raise ValueError(
            f"shards = {shards} must be at least 1 and divide n_latents = {n_latents} evenly"
        )
    return min(k, n_latents // shards)


def smallest_capacity(k: int, n_latents: int, shards: int, max_loss: float) -> int:
    """The fewest candidates a shard whose expected loss is below `max_loss`.

    Raises:
      ValueError: as `exact_capacity`, or `max_loss` is not above 0.
    """
    if not max_loss > 0:
        raise ValueError(
            f"max_loss = {max_loss} must be above 0; for no loss at all take "
            f"min(k, n_latents / shards) candidates"
        )
    fits = range(exact_capacity(k, n_latents, shards) + 1)
    return bisect.bisect_left(
        fits, True, key=lambda c: expected_loss(k, n_latents, shards, c) < max_loss
    )


def expected_loss(k: int, n_latents: int, shards: int, capacity: int) -> float:
    """Expected share of the exact top-k that shards of this capacity lose, in [0, 1]."""
    if k == 0:
        return 0.0
    chances = _chances(k, n_latents, shards)
    lost = math.fsum((x - capacity) * p for x, p in chances.items() if x > capacity)
    return lost * shards / k


def expected_share_at_capacity(k: int, n_latents: int, shards: int, capacity: int) -> float:
    """Expected share of (token, shard) pairs with at least `capacity` of the exact top-k.

    0 where the capacity is exact, since nothing can be cut there.
    """
    if capacity >= exact_capacity(k, n_latents, shards):
        return 0.0
    return math.fsum(p for x, p in _chances(k, n_latents, shards).items() if x >= capacity)


def warning_share(k: int, n_latents: int, shards: int) -> float:
    """The share of (token, shard) pairs at capacity above which too much is being cut.

    Five times what is expected at the smallest capacity that loses less than `MAX_EXPECTED_LOSS`:
    far above it lie the paper's rule on many shards, and latents that crowd into few shards.
    """
    capacity = smallest_capacity(k, n_latents, shards, MAX_EXPECTED_LOSS)
    return min(1.0, _ALARM * expected_share_at_capacity(k, n_latents, shards, capacity))


@functools.lru_cache(maxsize=64)
def _chances(k: int, n_latents: int, shards: int) -> dict[int, float]:
    """P(a shard holds x of the k kept latents), by x.

    Ratios of neighbours, from the mode outwards: nothing cancels, where differences of
    log-factorials lose six digits at a billion latents.
    """
    most = exact_capacity(k, n_latents, shards)
    drawn = n_latents // shards
    rest = n_latents - drawn - k  # the latents neither drawn nor kept, less x of both kinds
    least = max(0, -rest)
    mode = min((k + 1) * (drawn + 1) // (n_latents + 2), most)
    weights = {mode: 1.0}
    for x in range(mode, most):
        weights[x + 1] = weights[x] * ((k - x) * (drawn - x)) / ((x + 1) * (rest + x + 1))
    for x in range(mode, least, -1):
        weights[x - 1] = weights[x] * (x * (rest + x)) / ((k - x + 1) * (drawn - x + 1))
    total = math.fsum(weights.values())
    return {x: weight / total for x, weight in weights.items()}
