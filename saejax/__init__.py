"""Sparse autoencoders in JAX: train k-sparse autoencoders, measure them, look at them.

sae = saejax.load("runs/quickstart")
latents = sae.encode(activations)       # values and indices, any leading dimensions
reconstruction = sae.decode(latents)
sae = saejax.train(activations, sae=SAEConfig(...), train=TrainConfig(...))
"""

import types
from typing import Any

from saejax import train as _train_package

__version__ = "0.1.0"
__all__ = ["load", "train"]


class _CallablePackage(types.ModuleType):
    """`saejax.train` is both the package of the training step and the function that trains."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See `saejax.api.train`."""
        from saejax import api

        return api.train(*args, **kwargs)


_train_package.__class__ = _CallablePackage
train = _train_package


def load(path: Any) -> Any:
    """Loads a trained autoencoder from a run directory or a checkpoint; see `saejax.api.load`."""
    from saejax import api  # imports jax; a bare `import saejax` stays light

    return api.load(path)
