"""Plain definition of the weight gradients, over dense codes."""

import jax
import jax.numpy as jnp


def weight_grads(values_BK, d_values_BK, indices_BK, e_BD, x_BD, n: int, *, totals=None):
    """Forms the dense codes `[B, n]` and multiplies."""
    tokens_B1 = jnp.arange(len(indices_BK))[:, None]
    return _of_positions(values_BK, d_values_BK, tokens_B1, indices_BK, e_BD, x_BD, n, totals)


def weight_grads_of_pairs(pairs, d_values_P, e_BD, x_BD, n: int, *, totals=None):
    """Forms the dense codes `[B, n]` and multiplies; unused pairs name tokens that do not exist."""
    positions = (pairs.tokens_P, pairs.latents_P)
    return _of_positions(pairs.values_P, d_values_P, *positions, e_BD, x_BD, n, totals)


def _of_positions(values, d_values, tokens, latents, e_BD, x_BD, n: int, totals):
    dtype = jnp.result_type(values, d_values, e_BD, x_BD, jnp.float32)

    def code_BL(coefficients):
        zero = jnp.zeros((len(e_BD), n), dtype)
        return zero.at[tokens, latents].add(coefficients.astype(dtype), mode="drop")

    with jax.default_matmul_precision("highest"):
        d_code_BL = code_BL(d_values)
        sums = (
            code_BL(values).T @ e_BD.astype(dtype),
            d_code_BL.T @ x_BD.astype(dtype),
            d_code_BL.sum(0),
        )
    if totals is None:
        return sums
    return tuple((a + b).astype(a.dtype) for a, b in zip(totals, sums, strict=True))
