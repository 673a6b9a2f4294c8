"""Products with a sparse code kept as one list of (token, latent) pairs."""

from pallas_kernels.pair_list.api import add_outer, compact, decode, dot
from pallas_kernels.pair_list.pairs import Pairs

__all__ = ["Pairs", "add_outer", "compact", "decode", "dot"]
