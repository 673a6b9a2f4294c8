"""Products with a sparse code kept as one list of (token, latent) pairs."""

from pallas_kernels.pair_list.api import Pairs, add_outer, compact, decode, dot

__all__ = ["Pairs", "add_outer", "compact", "decode", "dot"]
