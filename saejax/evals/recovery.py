"""How well a dictionary recovers features that are known; plain numpy in float64.

F true features (directions f_i, [F, D]) are compared with L latents (decoder rows w_j, [L, D]).
"""

import numpy as np

_BLOCK = 4096


def match(features_FD: np.ndarray, dictionary_LD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The latent nearest to each true feature.

    cos_i = max_j <f_i, w_j> / (||f_i|| ||w_j||), and the latent j that attains it (the lowest one
    in a tie). A row of zeros has cosine 0 with everything.

    Returns:
      float64 [F] cosines and int64 [F] latents.

    Raises:
      ValueError: the widths differ, or one side is empty.
    """
    if features_FD.ndim != 2 or dictionary_LD.ndim != 2 or not len(dictionary_LD):
        raise ValueError(
            f"features {features_FD.shape} and dictionary {dictionary_LD.shape}: must be [F, D] "
            "and [L, D] with at least one row."
        )
    if features_FD.shape[1] != dictionary_LD.shape[1]:
        raise ValueError(
            f"features have width {features_FD.shape[1]}, the dictionary {dictionary_LD.shape[1]}: "
            "must be equal."
        )
    cosines_FL = _unit(features_FD) @ _unit(dictionary_LD).T
    return cosines_FL.max(1), cosines_FL.argmax(1)


def commoner_half(probabilities_F: np.ndarray) -> np.ndarray:
    """bool [F]: the half of the features (rounded up) that are active most often."""
    order = np.argsort(-np.asarray(probabilities_F), kind="stable")
    mask_F = np.zeros(len(order), bool)
    mask_F[order[: (len(order) + 1) // 2]] = True
    return mask_F


def f1_of_matches(
    magnitudes_NF: np.ndarray,
    values_NK: np.ndarray,
    indices_NK: np.ndarray,
    match_F: np.ndarray,
    n_latents: int,
    threshold: float = 0.0,
) -> np.ndarray:
    """F1 of each feature's matched latent as a detector of the feature.

    F1_i = 2 TP_i / (P_i + H_i), with P_i the rows in which feature i is active (magnitude above
    0), H_i the rows in which latent match_i is (|value| above `threshold`) and TP_i those of both;
    0 where P_i + H_i = 0.

    Args:
      magnitudes_NF: true magnitudes, 0 where inactive.
      values_NK, indices_NK: the latents' values and indices, as the encoder gives them.
      match_F: from `match`.
      n_latents: L.
      threshold: a latent is active above this value.

    Returns:
      float64 [F].
    """
    true_positives = np.zeros(len(match_F), np.int64)
    positives, hits = true_positives.copy(), true_positives.copy()
    for start in range(0, len(magnitudes_NF), _BLOCK):
        block = slice(start, start + _BLOCK)
        active_BF = np.asarray(magnitudes_NF[block]) > 0
        on_BK = np.abs(values_NK[block]) > threshold
        on_BL = np.zeros((len(on_BK), n_latents), bool)
        rows_BK = np.broadcast_to(np.arange(len(on_BK))[:, None], on_BK.shape)
        on_BL[rows_BK[on_BK], np.asarray(indices_NK[block])[on_BK]] = True
        hit_BF = on_BL[:, match_F]
        true_positives += (hit_BF & active_BF).sum(0)
        positives += active_BF.sum(0)
        hits += hit_BF.sum(0)
    return 2.0 * true_positives / np.maximum(positives + hits, 1)


def chance(features_FD: np.ndarray, n_latents: int, seed: int = 0) -> np.ndarray:
    """float64 [F]: the cosines of `match` against `n_latents` random directions."""
    # A stream of its own: features made with a plain default_rng(0) must not meet themselves.
    rng = np.random.default_rng([0x5AE, seed])
    directions_LD = rng.standard_normal((n_latents, features_FD.shape[1]))
    return match(features_FD, directions_LD)[0]


def recovery(
    features_FD: np.ndarray,
    probabilities_F: np.ndarray,
    dictionary_LD: np.ndarray,
    *,
    threshold: float = 0.9,
) -> dict[str, float]:
    """Scores of a dictionary against the truth.

    Returns:
      mmcs: mean over the features of the maximum cosine (Sharkey et al. 2022, "mean max cosine
        similarity"); mmcs_common: over the commoner half.
      matched, matched_common: share of features (of the commoner half) with cosine >= threshold.
      chance_mmcs, chance_matched: the same for as many random directions.
    """
    cosines_F, _ = match(features_FD, dictionary_LD)
    common_F = commoner_half(probabilities_F)
    chance_F = chance(features_FD, len(dictionary_LD))
    return {
        "mmcs": float(cosines_F.mean()),
        "mmcs_common": float(cosines_F[common_F].mean()),
        "matched": float((cosines_F >= threshold).mean()),
        "matched_common": float((cosines_F[common_F] >= threshold).mean()),
        "chance_mmcs": float(chance_F.mean()),
        "chance_matched": float((chance_F >= threshold).mean()),
    }


def f1_scores(f1_F: np.ndarray, probabilities_F: np.ndarray) -> dict[str, float]:
    """Means of `f1_of_matches`: `f1` over all features, `f1_common` over the commoner half."""
    return {
        "f1": float(f1_F.mean()),
        "f1_common": float(f1_F[commoner_half(probabilities_F)].mean()),
    }


def _unit(rows_ND: np.ndarray) -> np.ndarray:
    rows_ND = np.asarray(rows_ND, np.float64)
    norms_N1 = np.linalg.norm(rows_ND, axis=1, keepdims=True)
    return rows_ND / np.where(norms_N1 > 0, norms_N1, 1.0)
