"""Sparse autoencoders in JAX: train k-sparse autoencoders, measure them, look at them.

sae = saejax.load("runs/quickstart")
latents = sae.encode(activations)       # values and indices, any leading dimensions
reconstruction = sae.decode(latents)
sae = saejax.train(activations, sae=SAEConfig(...), train=TrainConfig(...))
"""

import types
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["load", "train"]

if TYPE_CHECKING:  # for editors and type checkers; a bare `import saejax` stays light
    from saejax.api import load, train
else:
    from saejax import train

    class _CallablePackage(types.ModuleType):
        """`saejax.train` is both the package of the training step and the function that trains."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """Trains an autoencoder; see `saejax.api.train`."""
            from saejax import api

            return api.train(*args, **kwargs)

        @property
        def __signature__(self) -> Any:
            import inspect

            from saejax import api

            return inspect.signature(api.train)

    train.__class__ = _CallablePackage

    def load(path: Any) -> Any:
        """Loads a trained autoencoder from a run directory or a checkpoint; see `api.load`."""
        from saejax import api

        return api.load(path)
