"""What the subject model loses when it reads the reconstruction instead of its own activation.

Gao et al. 2024, §4.1: the site's activation is replaced by the reconstruction, un-normalised back,
and the next-token loss is compared with the clean run; zero and mean ablation of the same site say
how much there was to lose. Nats come first: the recovered fraction flatters (the paper's own 98.2 %
equals a tenth of the pre-training compute).

The first ``first_position`` positions of each context and the masked ones (BOS, padding, outlying
norms) are left clean in every variant, the ablations too: they are not in the activation store, so
the autoencoder was never trained on them. Losses are taken at the replaced positions whose next
token is not masked either.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from saejax.mesh import replicated

VARIANTS = ("clean", "sae", "zero_ablation", "mean_ablation")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DownstreamInputs:
    """What the downstream evaluation needs besides the autoencoder.

    Attributes:
      subject: the subject model (``saejax.subjects``), with ``params`` and ``apply``.
      contexts: blocks of held-out token ids ``[C, T]``, any integer dtype; or of pairs of them and
        a mask, bool ``[C, T]``, false at positions that stay clean and are not counted.
      site: the tap's name.
      mean: ``[D]``, mean activation of the site over training tokens, for mean ablation.
      first_position: positions before it stay clean.
    """

    subject: object
    contexts: Iterable[np.ndarray | tuple[np.ndarray, np.ndarray]]
    site: str
    mean: np.ndarray
    first_position: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class DownstreamState:
    """Mergeable sums of per-prediction losses.

    Attributes:
      contexts: contexts seen.
      predictions: next-token predictions counted.
      loss: sum of cross-entropy per variant, nats; see ``VARIANTS``.
      divergence: sum of KL(clean || variant), nats.
      delta_square, delta_count, count_square: sums over contexts of d^2, d c and c^2, for the error
        bar; d is a context's summed difference sae - clean, c its number of predictions.
    """

    contexts: int = 0
    predictions: int = 0
    loss: tuple[float, ...] = (0.0,) * len(VARIANTS)
    divergence: tuple[float, ...] = (0.0,) * len(VARIANTS)
    delta_square: float = 0.0
    delta_count: float = 0.0
    count_square: int = 0

    @classmethod
    def of(
        cls, loss_VBP: np.ndarray, kl_VBP: np.ndarray, counted_BP: np.ndarray | None = None
    ) -> DownstreamState:
        """The state of one block: per-prediction losses and divergences, variants first.

        ``counted_BP`` tells which predictions count; all of them when None. Contexts without any
        are not counted either.
        """
        loss_VBP, kl_VBP = np.asarray(loss_VBP, np.float64), np.asarray(kl_VBP, np.float64)
        if not (np.isfinite(loss_VBP).all() and np.isfinite(kl_VBP).all()):
            raise ValueError(
                "downstream loss: NaN or infinity; allowed: finite logits; check the subject's "
                "weights and the autoencoder's checkpoint"
            )
        if counted_BP is None:
            counted_BP = np.ones(loss_VBP.shape[1:], bool)
        loss_VBP, kl_VBP = loss_VBP * counted_BP, kl_VBP * counted_BP
        delta_B = (loss_VBP[1] - loss_VBP[0]).sum(axis=-1)
        count_B = counted_BP.sum(axis=-1)
        return cls(
            contexts=int((count_B > 0).sum()),
            predictions=int(count_B.sum()),
            loss=tuple(loss_VBP.sum(axis=(1, 2)).tolist()),
            divergence=tuple(kl_VBP.sum(axis=(1, 2)).tolist()),
            delta_square=float((delta_B**2).sum()),
            delta_count=float((delta_B * count_B).sum()),
            count_square=int((count_B**2).sum()),
        )

    def merge(self, other: DownstreamState) -> DownstreamState:
        """The state of both sets of contexts together."""
        return DownstreamState(
            contexts=self.contexts + other.contexts,
            predictions=self.predictions + other.predictions,
            loss=tuple(a + b for a, b in zip(self.loss, other.loss, strict=True)),
            divergence=tuple(a + b for a, b in zip(self.divergence, other.divergence, strict=True)),
            delta_square=self.delta_square + other.delta_square,
            delta_count=self.delta_count + other.delta_count,
            count_square=self.count_square + other.count_square,
        )

    def compute(self) -> dict[str, float | int]:
        """The figures, in nats per prediction; ``delta_ce_stderr`` treats contexts as the sample.

        Raises ValueError when no context was seen.
        """
        if not self.predictions:
            raise ValueError(
                "downstream_tokens: no context was evaluated; allowed: at least one context; "
                "raise EvaluationConfig.downstream_tokens or harvest held-out text"
            )
        clean, sae, zero, mean = (s / self.predictions for s in self.loss)
        _, kl, kl_zero, kl_mean = (s / self.predictions for s in self.divergence)
        # The mean is a ratio of two sums over contexts, which may hold different numbers.
        delta, n = sae - clean, self.contexts
        squares = self.delta_square - 2 * delta * self.delta_count + delta**2 * self.count_square
        variance = max(squares, 0.0) * n / max(n - 1, 1) / self.predictions**2
        return {
            "ce_clean": clean,
            "ce_sae": sae,
            "delta_ce": delta,
            "delta_ce_stderr": variance**0.5,
            "delta_ce_zero_ablation": zero - clean,
            "delta_ce_mean_ablation": mean - clean,
            "kl": kl,
            "kl_zero_ablation": kl_zero,
            "kl_mean_ablation": kl_mean,
            "recovered_zero_ablation": _recovered(sae, clean, zero),
            "recovered_mean_ablation": _recovered(sae, clean, mean),
            "downstream_tokens": self.predictions,
            "downstream_contexts": self.contexts,
        }


def _recovered(sae: float, clean: float, ablated: float) -> float:
    if ablated == clean:
        raise ValueError(
            "site: ablating it changes no prediction; allowed: a site the logits depend on; "
            "choose a site below the last layer's output"
        )
    return (ablated - sae) / (ablated - clean)


class _Programs:
    """The compiled parts: what the site holds, the rest of the subject from there, the scores."""

    def __init__(self, subject, site: str, first: int):
        def capture(params, tokens_BT):
            return subject.capture(params, tokens_BT, [site])[site]

        def variant(kind, sae, x_BTD, mask_BT, mean_D):
            x_BRD = x_BTD[:, first:]
            new_BRD = {
                "sae": lambda: sae.decode(sae.encode(x_BRD.astype(jnp.float32))),
                "zero_ablation": lambda: jnp.zeros_like(x_BRD),
                "mean_ablation": lambda: jnp.broadcast_to(mean_D[None, None], x_BRD.shape),
            }[kind]()
            new_BRD = jnp.where(mask_BT[:, first:, None], new_BRD.astype(x_BTD.dtype), x_BRD)
            return jnp.concatenate([x_BTD[:, :first], new_BRD], axis=1)

        def logp(params, tokens_BT, x_BTD):
            logits_BTV = subject.apply(params, tokens_BT, edits={site: lambda own: x_BTD})
            return jax.nn.log_softmax(logits_BTV[:, first:-1].astype(jnp.float32))

        def score(clean_BPV, logp_BPV, tokens_BT):
            target_BP1 = tokens_BT[:, first + 1 :, None]
            loss_BP = -jnp.take_along_axis(logp_BPV, target_BP1, axis=-1)[..., 0]
            return loss_BP, (jnp.exp(clean_BPV) * (clean_BPV - logp_BPV)).sum(axis=-1)

        self.capture, self.logp, self.score = jax.jit(capture), jax.jit(logp), jax.jit(score)
        self.variant = jax.jit(variant, static_argnums=0)

    def losses(self, params, sae, tokens_BT, mask_BT, mean_D) -> tuple[np.ndarray, np.ndarray]:
        """Loss and KL of every variant, both ``[variants, B, P]``."""
        x_BTD = self.capture(params, tokens_BT)
        clean_BPV = self.logp(params, tokens_BT, x_BTD)
        scores = [self.score(clean_BPV, clean_BPV, tokens_BT)]
        to_sae, to_subject = _placing(sae), _placing(params)
        for kind in VARIANTS[1:]:
            new_BTD = to_subject(self.variant(kind, sae, to_sae(x_BTD), mask_BT, mean_D))
            logp_BPV = self.logp(params, tokens_BT, new_BTD)
            scores.append(self.score(clean_BPV, logp_BPV, tokens_BT))
        loss, divergence = zip(*scores, strict=True)
        return np.stack(jax.device_get(loss)), np.stack(jax.device_get(divergence))


def _placing(tree) -> Callable[[jax.Array], jax.Array]:
    """Brings an array, whole, to the devices that a tree is on, if it is bound to any.

    Subject and autoencoder may be on different ones, of which one program cannot take arrays.
    """
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and leaf.committed:
            at = leaf.sharding
            at = replicated(at.mesh) if isinstance(at, NamedSharding) else at
            return functools.partial(jax.device_put, device=at)
    return lambda array: array


def _with_masks(blocks: Iterable[np.ndarray | tuple[np.ndarray, np.ndarray]]):
    """Blocks as int32 ``[C, 2, T]``: tokens, and 1 where the mask lets a position be replaced."""
    for block in blocks:
        tokens_CT, mask_CT = block if isinstance(block, tuple) else (block, True)
        tokens_CT = np.asarray(tokens_CT).astype(np.int32)
        yield np.stack([tokens_CT, np.broadcast_to(mask_CT, tokens_CT.shape)], axis=1)


def _context_batches(
    blocks: Iterable[np.ndarray], batch: int, limit: int | None
) -> Iterator[np.ndarray]:
    held: list[np.ndarray] = []
    left = limit
    for whole_C2T in blocks:
        block_C2T = whole_C2T[:left]
        left = None if left is None else left - len(block_C2T)
        held.append(block_C2T)
        if sum(map(len, held)) >= batch:
            joined_C2T = np.concatenate(held)
            full = len(joined_C2T) - len(joined_C2T) % batch
            yield from np.split(joined_C2T[:full], full // batch)
            held = [joined_C2T[full:]]
        if left == 0:
            break
    if sum(map(len, held)):
        yield np.concatenate(held)


def downstream(
    sae, inputs: DownstreamInputs, *, batch_contexts: int = 32, tokens: int | None = None
) -> DownstreamState:
    """Runs the subject clean, reconstructed, zero- and mean-ablated over held-out contexts.

    Args:
      sae: the autoencoder, anything with ``encode`` and ``decode`` that is a pytree.
      inputs: subject, contexts, site, mean and first position.
      batch_contexts: contexts of one device batch; the figures do not depend on it.
      tokens: use at most this many tokens' worth of whole contexts; None for all.

    Raises:
      ValueError: contexts too short to predict anything, an unknown site, non-finite losses.
    """
    subject, first = inputs.subject, inputs.first_position
    subject.check_site(inputs.site)
    programs = _Programs(subject, inputs.site, first)
    mean_D = jnp.asarray(inputs.mean, jnp.float32)
    state, limit = DownstreamState(), None
    blocks = _with_masks(inputs.contexts)
    head = next(blocks, None)
    if head is not None:
        length = head.shape[2]
        if length < first + 2:
            raise ValueError(
                f"context_length: {length}; allowed: at least {first + 2} with first_position "
                f"{first}, so that one prediction depends on the site; harvest longer contexts"
            )
        limit = None if tokens is None else max(tokens // length, 1)
        blocks = _chain(head, blocks)
    for block_C2T in _context_batches(blocks, batch_contexts, limit):
        count = len(block_C2T)
        fill = np.repeat(block_C2T[:1], batch_contexts - count, axis=0)
        tokens_BT, mask_BT = np.concatenate([block_C2T, fill]).swapaxes(0, 1)
        loss_VBP, kl_VBP = programs.losses(
            subject.params, sae, jnp.asarray(tokens_BT), jnp.asarray(mask_BT, bool), mean_D
        )
        counted_BP = (mask_BT[:, first:-1] & mask_BT[:, first + 1 :])[:count]
        part = DownstreamState.of(loss_VBP[:, :count], kl_VBP[:, :count], counted_BP)
        state = state.merge(part)
    return state


def _chain(head: np.ndarray, rest: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    yield head
    yield from rest
