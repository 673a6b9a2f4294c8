"""What a latent's decoder direction does to the logits directly, past all later layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from saejax.subjects.base import Subject

_RESIDUAL = ("embed", "resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")


def writes_to_residual(subject: Subject, site: str) -> bool:
    """Whether vectors at a site, by any of its names, are in or are added to the residual stream.

    Raises:
      ValueError: no such site.
    """
    return subject.resolve_site(site).rsplit(".", 1)[-1] in _RESIDUAL


def direct_logits(subject: Subject, directions_SD: np.ndarray, tokens_CT: np.ndarray) -> np.ndarray:
    """Change of every token's logit per unit of each direction, through final norm and unembedding.

    The final norm is linearised at the residuals of a few real contexts and the effect averaged
    over their positions; a shift common to all tokens, which no probability feels, is removed.

    Args:
      subject: the subject model.
      directions_SD: directions in the residual stream, such as decoder rows ``[S, D]``.
      tokens_CT: token ids of a few contexts.

    Returns:
      float32 ``[S, V]``.

    Raises:
      ValueError: the directions are not as wide as the residual stream.
    """
    directions_SD = np.asarray(directions_SD, np.float32)
    if directions_SD.shape[1] != subject.d_model:
        raise ValueError(
            f"directions: width {directions_SD.shape[1]}; allowed: {subject.d_model}, the "
            "subject's residual stream; use a site that writes to it"
        )
    last = f"{subject.n_layers - 1}.resid_post"
    tokens = jnp.asarray(tokens_CT, jnp.int32)
    effects = _effects(subject, last)(subject.params, tokens, jnp.asarray(directions_SD))
    return np.asarray(effects)


def _effects(subject, last: str):
    @jax.jit
    def effects(params, tokens_CT, directions_SD):
        at_CTD = subject.capture(params, tokens_CT, [last])[last]

        def logits(residual_CTD):
            put = lambda site, x: residual_CTD if site == last else x  # noqa: E731
            return subject.apply(params, tokens_CT, put)

        def effect(direction_D):
            tangent = jnp.broadcast_to(direction_D[None, None].astype(at_CTD.dtype), at_CTD.shape)
            return jax.jvp(logits, (at_CTD,), (tangent,))[1].mean(axis=(0, 1))

        effect_SV = jax.lax.map(effect, directions_SD)
        return effect_SV - effect_SV.mean(axis=1, keepdims=True)

    return effects


def extremes(effect_SV: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens each direction raises most and lowers most, int64 ``[S, count]`` both, best first."""
    order_SV = np.argsort(effect_SV, axis=1, kind="stable")
    return order_SV[:, ::-1][:, :count].astype(np.int64), order_SV[:, :count].astype(np.int64)
