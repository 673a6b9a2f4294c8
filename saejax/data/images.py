"""Images as a source: files, or arrays of pixels, each of them one context of a vision tower."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import io
import itertools
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from saejax.data import splits
from saejax.data.corpus import named_files
from saejax.data.progress import Log, Progress
from saejax.data.readers import extra, open_npy
from saejax.data.splits import OVER_LIMIT, Split
from saejax.data.token_arrays import IdsOnly
from saejax.data.tokens import Contexts

FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
ARRAY = ".npy"
SUFFIXES = (*FILES, ARRAY)
PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # of transformers, and of 5
_PER_CHANNELS = {1: "L", 3: "RGB"}
# Of 8 bits a channel; Pillow would clip what has more.
_MODES = frozenset("1 L LA La P PA RGB RGBA RGBX RGBa CMYK YCbCr LAB HSV".split())
_AT_ONCE = 256  # images whose digests are awaited together
_THREADS = min(8, os.cpu_count() or 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """Images for a subject that takes pixels: where they are, and how they are split.

    Each image is one context. Its positions are those of the tower: the patches, row by row, and
    before them, in most towers, [CLS].

    Attributes:
      source: a folder, with all in it, or a file. A .png, .jpg, .jpeg, .webp or .bmp file is an
        image, read with the package pillow: turned upright as its EXIF data say, made RGB (grey for
        a tower of one channel; transparency is dropped), and preprocessed as the
        preprocessor_config.json or processor_config.json in the subject's folder says. A .npy file
        holds pixels that are preprocessed already, as the tower takes them: floats [N, C, H, W],
        or [C, H, W] of one.
      held_out_percent: share of the images held out, chosen by the sha256 of their name: the path
        in the folder, with '#number' in an array [N, C, H, W].
      max_images: at most so many images in each split, in the order of their hash. None takes all.
    """

    source: str
    held_out_percent: float = 5.0
    max_images: int | None = None

    def __post_init__(self):
        if not self.source:
            raise ValueError("Images.source is empty: give the path of a folder or file")
        splits.check_split(self, "Images", "max_images")


class Tower(Protocol):
    """What images need of a subject that takes pixels.

    Attributes:
      name: how it was asked for.
      pixels: channels, height and width of what it takes.
    """

    name: str
    pixels: tuple[int, int, int]

    def preprocess(self, image: Any) -> np.ndarray:
        """Pixels float32 [C, H, W] of an image of Pillow."""

    def preprocessing(self) -> str:
        """Describes what `preprocess` does; another description makes another store."""


class Patches(IdsOnly):
    """Stands in for a tokenizer where contexts are images: each position shows as a square."""

    def token_bytes(self, token: int) -> bytes:
        """A square, for a patch or [CLS]."""
        return "■".encode()

    def token_text(self, token: int) -> str:
        """A square."""
        return "■"


class Images(Patches):
    """The images of a source by number, 0 to `vocab_size` - 1, in the order of their paths.

    Attributes:
      cfg: the source.
      versions: of the packages that decode them.
    """

    def __init__(self, cfg: ImagesConfig, tower: Tower):
        """Lists the images; of arrays the headers are read, of image files nothing.

        Raises:
          FileNotFoundError: no such path, or no file that says how to preprocess.
          ValueError: no images; an array of another shape or type; a package is missing.
        """
        self.cfg, self._tower = cfg, tower
        self._files: list[tuple[pathlib.Path, str, bool]] = []  # whether it is an array of many
        counts: list[int] = []
        for path, name in named_files("Images.source", cfg.source, SUFFIXES):
            shape = _open_array(path, tower).shape if _is_array(path) else ()
            many = len(shape) == 4
            if not many or shape[0]:
                self._files.append((path, name, many))
                counts.append(shape[0] if many else 1)
        if not counts:
            raise ValueError(
                f"Images.source = {cfg.source!r} holds no images: give a file, or a folder, with "
                f"{', '.join(SUFFIXES)} files"
            )
        self._bounds = np.concatenate([[0], np.cumsum(counts)])
        super().__init__(int(self._bounds[-1]))
        self._digests = np.zeros((self.vocab_size, 32), np.uint8)  # zeros: not known yet
        self.fingerprint, self.versions = f"pixels {tower.pixels}", {}
        if not all(_is_array(path) for path, _, _ in self._files):
            self._know_pillow()

    def _know_pillow(self) -> None:
        told = f"Images.source = {self.cfg.source!r}: reading {', '.join(FILES)} files"
        self._pillow = extra("PIL.Image", told, package="pillow", group="images")
        self._upright = extra("PIL.ImageOps", told, package="pillow", group="images").exif_transpose
        channels = self._tower.pixels[0]
        if channels not in _PER_CHANNELS:
            raise ValueError(
                f"Images.source = {self.cfg.source!r}: subject {self._tower.name!r} takes "
                f"{channels} channels, and image files have 3 or 1; give {ARRAY} arrays of pixels"
            )
        self.fingerprint += f", {self._tower.preprocessing()}"
        self.versions = {"pillow": extra("PIL", told, package="pillow", group="images").__version__}

    def name(self, number: int) -> str:
        """Path in the source, with '#row' in an array of many."""
        _, name, row = self._place(number)
        return name if row is None else f"{name}#{row}"

    def pixels(self, numbers: Sequence[int]) -> np.ndarray:
        """Pixels float32 [B, C, H, W] of images, as the tower takes them.

        Raises:
          ValueError: as of `contexts`; or one has changed since.
        """
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            read = list(pool.map(self._read, map(int, numbers)))
        for number, (_, digest) in zip(numbers, read, strict=True):
            known = self._digests[number]
            if known.any() and known.tobytes() != digest:
                raise ValueError(
                    f"Images.source = {self.cfg.source!r}: {self.name(number)} changed while it "
                    "was being harvested; start again, with another place for the activations"
                )
        return np.stack([pixels for pixels, _ in read])

    def contexts(self, split: Split, length: int, log: Log | None = None) -> Contexts:
        """The images of a split as contexts: its number at every position of an image.

        All of them are read and preprocessed once, so that whatever is wrong with one is told
        before anything is stored. Memory for pixels is that of a few hundred images.

        Args:
          split: 'train' or 'held_out'.
          length: positions of the tower, T.
          log: takes a line every few seconds.

        Raises:
          ValueError: the split is empty; a file is no sound image, or one of more than 8 bits a
            channel; preprocessing gives another shape than the tower takes; NaN or infinite pixels.
        """
        numbers, left_out = self._chosen(split)
        progress = Progress(log, f"Images.source = {self.cfg.source!r}, {split}")
        reading = progress.reading(numbers.tolist())
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            while part := list(itertools.islice(reading, _AT_ONCE)):
                for number, digest in zip(part, pool.map(self._digest, part), strict=True):
                    self._digests[number] = np.frombuffer(digest, np.uint8)
        names = tuple(map(self.name, numbers.tolist()))
        digests, shape = self._digests[numbers], (len(numbers), length)
        described = "\0".join(["images", split, str(shape), self.fingerprint, *names])
        whole = hashlib.sha256(described.encode() + numbers.astype("<u4").tobytes())
        whole.update(digests.tobytes())
        return Contexts(
            tokens=np.broadcast_to(numbers.astype(np.uint32)[:, None], shape),
            document=np.arange(len(numbers), dtype=np.int32),
            offset=np.zeros(len(numbers), np.int32),
            names=names,
            dropped_tokens=0,
            fingerprint=whole.hexdigest()[:16],
            bytes_total=0,
            keep=np.broadcast_to(np.True_, shape),
            length=np.full(len(numbers), length, np.int32),
            lead=0,
            byte_start=np.full(len(numbers), -1, np.int64),
            document_bytes=np.full(len(numbers), -1, np.int64),
            document_sha256=digests,
            left_out=left_out,
        )

    def _chosen(self, split: Split) -> tuple[np.ndarray, dict[str, int]]:
        """Numbers of the images of a split, ascending, and how many are over the limit."""
        cfg = self.cfg
        fractions = np.array([splits.hash_fraction(self.name(i)) for i in range(self.vocab_size)])
        ours = splits.held_out(fractions, cfg.held_out_percent) == (split == "held_out")
        where = np.flatnonzero(ours)
        if not len(where):
            raise ValueError(
                f"Images.source = {cfg.source!r} has {self.vocab_size} image(s) and "
                f"Images.held_out_percent = {cfg.held_out_percent}, which leaves the {split} split "
                "empty; give at least two images, or a percentage above 0"
            )
        taken = splits.fill(fractions[where], np.ones(len(where), int), None, cfg.max_images)
        over = int((~taken).sum())
        return where[taken], {OVER_LIMIT: over} if over else {}

    def _place(self, number: int) -> tuple[pathlib.Path, str, int | None]:
        """File of an image, its name, and the row of an array of many."""
        at = int(np.searchsorted(self._bounds, number, side="right")) - 1
        path, name, many = self._files[at]
        return path, name, int(number - self._bounds[at]) if many else None

    def _digest(self, number: int) -> bytes:
        return self._read(number)[1]

    def _read(self, number: int) -> tuple[np.ndarray, bytes]:
        """Pixels of an image, and the sha256 of its file or of its pixels in an array."""
        path, _, row = self._place(number)
        if _is_array(path):
            array = _open_array(path, self._tower)
            with np.errstate(over="ignore"):  # what float32 does not hold is told as infinite
                pixels = np.array(array if row is None else array[row], "<f4", order="C")
            digest = hashlib.sha256(pixels.tobytes()).digest()
        else:
            raw = path.read_bytes()
            digest = hashlib.sha256(raw).digest()
            pixels = np.asarray(self._tower.preprocess(self._decoded(path, raw)), np.float32)
            if pixels.shape != self._tower.pixels:
                raise ValueError(
                    f"{path}: preprocessed to shape {pixels.shape}, but subject "
                    f"{self._tower.name!r} takes {self._tower.pixels}; set size "
                    f"(and crop_size) in the model's {' or '.join(PROCESSORS)} so that every image "
                    "comes out in that size, or take the file that belongs to the model"
                )
        if not np.isfinite(pixels).all():
            place = path if row is None else f"{path}, image {row}"
            raise ValueError(f"{place}: NaN or infinite pixels; make it again, or move it away")
        return pixels, digest

    def _decoded(self, path: pathlib.Path, raw: bytes) -> Any:
        """The image of Pillow, upright, in the channels that the tower takes."""
        try:
            with self._pillow.open(io.BytesIO(raw)) as opened:
                opened.load()
                image = self._upright(opened)
        except Exception as error:  # of the many decoders below Pillow; told, never passed over
            unknown = type(error).__name__ == "UnidentifiedImageError"
            why = "Pillow does not know the format" if unknown else str(error).partition("\n")[0]
            raise ValueError(
                f"{path} is no sound image: {why}; fetch it again, or move it away"
            ) from error
        if image.mode not in _MODES:
            raise ValueError(
                f"{path}: Pillow's mode {image.mode!r} has more than 8 bits a channel; convert the "
                f"image to 8 bits, or give {ARRAY} arrays of pixels"
            )
        if _png_bits(raw) > 8:
            raise ValueError(
                f"{path}: {_png_bits(raw)} bits a channel, more than 8; convert the image to 8 "
                f"bits, or give {ARRAY} arrays of pixels"
            )
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # straight to RGB, Pillow warns of what is lost
        return image.convert(_PER_CHANNELS[self._tower.pixels[0]])


def _png_bits(raw: bytes) -> int:
    """Bits a channel of a PNG file, from its header; Pillow does not tell. 8 of other formats."""
    return raw[24] if raw.startswith(b"\x89PNG\r\n\x1a\n") and len(raw) > 24 else 8


def _is_array(path: pathlib.Path) -> bool:
    return path.suffix.lower() == ARRAY


def _open_array(path: pathlib.Path, tower: Tower) -> np.ndarray:
    """A memory-mapped array of pixels [N, C, H, W] or [C, H, W] as the tower takes them."""
    array = open_npy(path)
    if array.ndim not in (3, 4) or array.shape[-3:] != tower.pixels:
        raise ValueError(
            f"{path}: shape {array.shape}, but subject {tower.name!r} takes {tower.pixels}, or "
            "[N] of these: channels, height, width; preprocess the images as the model asks"
        )
    if array.dtype.kind != "f":
        raise ValueError(
            f"{path}: dtype {array.dtype}, not floats; give pixels that are preprocessed "
            "(rescaled and normalised) as the model asks, or the image files themselves"
        )
    return array
