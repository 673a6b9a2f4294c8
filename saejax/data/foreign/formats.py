"""Which formats there are, and which one a path holds."""

import hashlib
import pathlib
from types import ModuleType

from saejax.data.foreign import (
    activault,
    dictionary_learning,
    exported,
    llamascopium,
    npy,
    parquet,
    saelens,
    tensors,
    torch_files,
)
from saejax.data.foreign.interface import Foreign, Wanted

# Layouts of a whole folder first: they hold files of the plain kinds.
FORMATS: dict[str, ModuleType] = {
    "saejax": exported,
    "saelens": saelens,
    "activault": activault,
    "llamascopium": llamascopium,
    "dictionary_learning": dictionary_learning,
    "npy": npy,
    "safetensors": tensors,
    "parquet": parquet,
    "torch": torch_files,
}
_PLAIN = ("npy", "safetensors", "parquet", "torch")
_EDGE = 1 << 16


def open_foreign(
    source: str | pathlib.Path, wanted: Wanted, name: str | None = None
) -> tuple[str, Foreign]:
    """Opens a source; reads no more of it than headers.

    Args:
      source: a file or a folder.
      wanted: what is asked for of it.
      name: its format, one of `FORMATS`; None finds out.

    Returns:
      The name of the format, and the source.

    Raises:
      FileNotFoundError: no such path.
      ValueError: no known format, more than one, or unsound files.
    """
    path = pathlib.Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; give one that exists")
    if name is None:
        name = detect(path)
    elif name not in FORMATS:
        raise ValueError(f"format {name!r}: allowed are {', '.join(FORMATS)}")
    elif not FORMATS[name].matches(path):
        raise ValueError(f"{path} is not of format {name!r}; leave out --format to see what it is")
    return name, FORMATS[name].read(path, wanted)


def detect(path: pathlib.Path) -> str:
    """The format of a path, by its content.

    Raises:
      ValueError: none, or several kinds of files.
    """
    found = [name for name, format in FORMATS.items() if format.matches(path)]
    layouts = [name for name in found if name not in _PLAIN]
    if layouts:
        return layouts[0]
    if len(found) > 1:
        raise ValueError(f"{path} holds files of {', '.join(found)}: say which with --format")
    if found:
        return found[0]
    below = []
    if path.is_dir():
        folders = sorted(folder for folder in path.iterdir() if folder.is_dir())
        below = [f.name for f in folders if any(x.matches(f) for x in FORMATS.values())]
    hint = f"its folders {', '.join(below[:8])} do: give one of them" if below else ""
    raise ValueError(
        f"{path} holds no activations: "
        + (hint or "known are .npy, .safetensors, .parquet and .pt files, and caches of other "
           f"programs ({', '.join(n for n in FORMATS if n not in _PLAIN)})")
    )  # fmt: skip


def state_of(foreign: Foreign) -> str:
    """Digest of what a source is, without reading it whole: 16 hex digits.

    Of each file its name, size, shape, type, and the first and last 64 KiB, so that a source that
    was copied is the same, and one that was made again is not.
    """
    digest = hashlib.sha256()
    for part in foreign.parts:
        digest.update(f"{part.name}\0{part.shape}{part.dtype}{part.field}\0".encode())
        for path in part.files or (part.path,):
            size = path.stat().st_size
            digest.update(f"{path.name}\0{size}\0".encode())
            with open(path, "rb") as file:
                digest.update(file.read(_EDGE))
                file.seek(max(0, size - _EDGE))
                digest.update(file.read(_EDGE))
    return digest.hexdigest()[:16]
