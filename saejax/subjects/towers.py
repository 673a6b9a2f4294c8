"""Vision towers, which take pixels: asked by the numbers of images, as others are by tokens."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from saejax.data.images import Images


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ImageSubject:
    """A vision tower with the images that it is shown; all else is as of the tower.

    Attributes:
      tower: the subject that takes pixels.
      tokenizer: the images, which stand where a tokenizer does for text.
    """

    tower: Any
    tokenizer: Images
    takes = "numbers of images"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tower, name)

    @property
    def vocab_size(self) -> int:
        """Number of images."""
        return self.tokenizer.vocab_size

    @property
    def computation(self) -> dict[str, str]:
        """What computes the activations, from the image files on; see `subjects.computation`."""
        return {**getattr(self.tower, "computation", {"platform": "host"})} | (
            self.tokenizer.versions
        )

    def capture_host(
        self, batch: np.ndarray, sites: Sequence[str], length: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Activations at sites: site to [B, T, width].

        Args:
          batch: numbers of images [B, T], the same at all positions of a row.
          sites: to capture.
          length: of no matter: images have no padding.

        Raises:
          ValueError: as of `Images.pixels` and the tower's own `capture_host`.
        """
        del length
        return self.tower.capture_host(self.tokenizer.pixels(batch[:, 0]), sites)


def check_positions(subject: ImageSubject, sites: Sequence[str], context_length: int) -> None:
    """ValueError unless all sites have as many positions an image as a context has."""
    found = {site: subject.tower.positions(site) for site in sites}
    site, count = next(iter(found.items()))
    if len(set(found.values())) > 1:
        each = ", ".join(f"{n} at {site!r}" for site, n in found.items())
        raise ValueError(
            f"Harvest.sites: subject {subject.name!r} has {each} positions an image; harvest sites "
            "of another number apart."
        )
    if count < 2:
        raise ValueError(
            f"Harvest.site = {site!r} has {count} position an image in subject {subject.name!r}, "
            "and a context at least 2; take a site with one for each patch."
        )
    if count != context_length:
        raise ValueError(
            f"Harvest.context_length = {context_length}: an image has {count} positions at site "
            f"{site!r} of subject {subject.name!r}; set Harvest.context_length = {count}."
        )


def read_processor(folder: pathlib.Path) -> Any:
    """The image processor of transformers that a model's folder asks for.

    Pillow's, whatever else is installed, because torchvision resizes to other values; only for a
    model that has none, torchvision's.

    Raises:
      FileNotFoundError: no preprocessor_config.json.
      ValueError: transformers does not know it, lacks a package for it, or is too old.
    """
    import transformers

    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {path.name}, which says how images become pixels: add the model's, "
            "or give .npy arrays of pixels that are preprocessed already"
        )
    try:
        found = transformers.AutoImageProcessor.from_pretrained(
            folder, backend="pil", trust_remote_code=False, local_files_only=True
        )
    except (ValueError, OSError, ImportError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{path} cannot be used by transformers without running code of its repository, which "
            f"is never done: {reason}"
        ) from error
    if not hasattr(found, "backend"):
        raise ValueError(
            f"{path}: transformers {transformers.__version__} does not say what resizes images; "
            "pip install -U transformers"
        )
    return found


def describe_processor(processor: Any) -> str:
    """Its settings, as JSON."""
    settings = {"backend": processor.backend, **processor.to_dict()}
    return json.dumps(settings, sort_keys=True, default=str)
