"""The families of subject models. Adding one is adding a file here.

Every module of this package has `FAMILIES`, a mapping from a `model_type` of config.json to a
`layout.Family`; they are found by looking into the package.
"""

from __future__ import annotations

import importlib
import pkgutil

from saejax.subjects.layout import Family


def families() -> dict[str, Family]:
    """All supported families by `model_type`."""
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(__path__):
        found |= getattr(importlib.import_module(f"{__name__}.{module.name}"), "FAMILIES", {})
    return dict(sorted(found.items()))
