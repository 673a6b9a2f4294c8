"""Vision towers, which take pixels: asked by the numbers of images, as others are by tokens.

`probe` finds which of both a model of PyTorch takes.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from saejax.data.images import PROCESSORS, Images

_LOG = logging.getLogger(__name__)

# Width and height of the images that show what a processor makes of any: wide, and high.
_SHOWN = ((301, 211), (197, 307))
_TAKES = {"input_ids": "tokens", "pixel_values": "pixels"}  # by `main_input_name`
_SUPPORTED = (
    "the adapter runs models that take input_ids [B, T] or pixel_values [B, channels, height, "
    "width] and have modules that give [B, T, width]"
)

Pixels = tuple[int, int, int]  # channels, height, width
Shapes = dict[str, tuple[int, int]]  # site to (positions, width)


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
      FileNotFoundError: neither preprocessor_config.json nor processor_config.json.
      ValueError: transformers does not know it, lacks a package for it, or is too old.
    """
    import transformers

    path = next((folder / name for name in PROCESSORS if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"{folder} has no {' or '.join(PROCESSORS)}, which says how images become pixels: add "
            "the model's, or give .npy arrays of pixels that are preprocessed already"
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


def probe(
    model: Any, name: str, folder: pathlib.Path, find_sites: Callable[[Pixels | None], Shapes]
) -> tuple[str, Pixels | None, Shapes]:
    """What a model takes, the shape of its images or None, and its sites.

    Args:
      model: of transformers.
      name: how it was asked for.
      folder: where it was read.
      find_sites: runs it on images of a shape, or on tokens if that is None.

    Raises:
      ValueError: it takes neither, images of unknown size, or more than these; or it has no sites.
    """
    given = model.main_input_name
    told = f"subject {name!r} ({type(model).__name__}) takes {given}"
    if given not in _TAKES:
        raise ValueError(f"{told}; {_SUPPORTED}")
    tried = _pixel_shapes(folder, model.config) if given == "pixel_values" else [None]
    if not tried:
        raise ValueError(
            f"{told} of unknown size: its config.json has no usable image_size, and its folder no "
            f"usable {' or '.join(PROCESSORS)}; {_SUPPORTED}"
        )
    reason = ""
    for shape in tried:
        try:
            sites = find_sites(shape)
        except Exception as error:  # of the model's own code, which may raise anything
            first = str(error).strip().partition("\n")[0]
            of = f" of {given} {shape}" if shape else ""
            reason += f"; a pass{of} ends in {type(error).__name__}: {first}"
            continue
        if not sites:
            raise ValueError(f"{told}, and no module of it gives [B, T, width]; {_SUPPORTED}")
        return _TAKES[given], shape, sites
    raise ValueError(f"{told}, and cannot be run on them alone{reason}; {_SUPPORTED}")


def _pixel_shapes(folder: pathlib.Path, config: Any) -> list[Pixels]:
    """Channels, height and width that a tower may take, the likeliest first.

    That is what its processor makes of images (of DINOv2, whose position embeddings are
    interpolated, config.json names another size), and then what config.json names.

    Args:
      folder: the model's; without a processor that can be used, config.json alone counts.
      config: of transformers.
    """
    channels = getattr(config, "num_channels", 3)
    found = [_processed_shape(folder, channels), _configured_shape(config, channels)]
    return list(dict.fromkeys(shape for shape in found if shape is not None))


def _processed_shape(folder: pathlib.Path, channels: int) -> Pixels | None:
    """None where there is no processor, or the size that it gives depends on the image."""
    try:
        from PIL import Image

        processor = read_processor(folder)
        images = [Image.new("L" if channels == 1 else "RGB", size) for size in _SHOWN]
        made = [processor(images=i, return_tensors="np")["pixel_values"][0] for i in images]
        shapes = {tuple(np.shape(pixels)) for pixels in made}
    except (ImportError, FileNotFoundError):  # told where image files are read; arrays need neither
        return None
    except Exception as error:  # of the processor's own code, which may raise anything
        first = str(error).strip().partition("\n")[0]
        _LOG.warning(
            "%s: its image processor fails (%s: %s), so the size in config.json counts",
            *(folder, type(error).__name__, first),
        )
        return None
    shape = shapes.pop()
    return None if shapes or len(shape) != 3 else shape


def _configured_shape(config: Any, channels: int) -> Pixels | None:
    size = getattr(config, "image_size", None)
    sides = (size, size) if isinstance(size, int) else size
    if not isinstance(sides, (list, tuple)) or len(sides) != 2:
        return None
    return (channels, *sides)
