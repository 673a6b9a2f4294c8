"""`.pt` files of tensors, as `torch.save` writes them, without PyTorch and without unpickling.

The pickle in such a file is not run: its few opcodes for containers, numbers, text and tensors are
interpreted here and anything else is refused, so that a file can do nothing but hold data. The
tensors are mapped into memory.
"""

import pathlib
import pickletools
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from saejax.data.foreign.interface import Foreign, Wanted, files_in, part_of_tensors

_STORAGES = {
    "torch DoubleStorage": np.dtype("<f8"),
    "torch FloatStorage": np.dtype("<f4"),
    "torch HalfStorage": np.dtype("<f2"),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch LongStorage": np.dtype("<i8"),
    "torch IntStorage": np.dtype("<i4"),
    "torch ShortStorage": np.dtype("<i2"),
    "torch CharStorage": np.dtype("i1"),
    "torch ByteStorage": np.dtype("u1"),
    "torch BoolStorage": np.dtype("?"),
}
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_DICT = "collections OrderedDict"
_SIZE = "torch Size"
_KNOWN = {*_STORAGES, _TENSOR, _PARAMETER, _DICT, _SIZE}
_IGNORED = {"PROTO", "FRAME", "STOP"}
_VALUES = {
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BININT", "BININT1", "BININT2",
    "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "FLOAT", "SHORT_BINSTRING", "BINSTRING",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_MARK = object()


class UnsafeError(ValueError):
    """A file wants more than tensors in plain containers."""


class _LazyError(ValueError):
    """A tensor's values are not what is stored, but its negative or conjugate."""


def matches(path: pathlib.Path) -> bool:
    """A .pt file, or a folder with some."""
    return path.suffix == ".pt" if path.is_file() else bool(files_in(path, "*.pt"))


def read(path: pathlib.Path, wanted: Wanted) -> Foreign:
    """The file, or all of the folder: a tensor, or a dictionary of tensors, each."""
    files = [path] if path.is_file() else files_in(path, "*.pt")
    return Foreign(parts=tuple(part_of_tensors(file, open_tensors, wanted) for file in files))


def open_tensors(path: pathlib.Path) -> Mapping[str, np.ndarray]:
    """The tensors of a file by name, mapped; the name of one that stands alone is ''.

    Raises:
      ValueError: truncated, of another kind, or no tensors in it.
      UnsafeError: it would need code to be run.
    """
    content = load(path)
    if isinstance(content, np.ndarray):
        return {"": content}
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, neither a tensor nor a dict")
    return {str(n): value for n, value in content.items() if isinstance(value, np.ndarray)}


def load(path: pathlib.Path) -> Any:
    """What `torch.save` was given: tensors as mapped arrays, in dicts, lists, tuples, with text
    and numbers.

    Raises:
      ValueError, UnsafeError: see `open_tensors`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in entries if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ValueError(f"{path} was not written by torch.save: it has no data.pkl")
            root = pickles[0].removesuffix("data.pkl")
            code = archive.read(pickles[0])
            order = root + "byteorder"
            if order in entries and archive.read(order) != b"little":
                raise ValueError(f"{path} was written on a big-endian machine; save it again")
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{path} is truncated, or no file of torch.save in its zip format (since 1.6): {error}"
        ) from error

    def storage(key: str, dtype: np.dtype, count: int) -> np.ndarray:
        name = f"{root}data/{key}"
        if name not in entries:
            raise ValueError(f"{path} is damaged: it lacks {name}")
        return _mapped(path, entries[name], dtype, count)

    try:
        return _Reader(storage).run(code)
    except _LazyError as error:
        raise ValueError(f"{path}: {error}") from error
    except UnsafeError as error:
        raise UnsafeError(
            f"{path}: {error}; only tensors in plain dicts and lists are read, because pickled "
            "objects can run code. Save the tensors alone, or as safetensors"
        ) from error
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error


def _mapped(path: pathlib.Path, info: zipfile.ZipInfo, dtype: np.dtype, count: int) -> np.ndarray:
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{path} is compressed; save it with torch.save as it is")
    if info.file_size < count * dtype.itemsize or count < 0:
        raise ValueError(f"{path} is damaged: {info.filename} has {info.file_size} bytes")
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        local = file.read(30)
    start = (
        info.header_offset + 30 + sum(int.from_bytes(local[i : i + 2], "little") for i in (26, 28))
    )
    if not count:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, "r", start, (count,))


class _Reader:
    """Interprets the opcodes of a pickle that holds tensors."""

    def __init__(self, storage: Any) -> None:
        self._storage = storage
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, code: bytes) -> Any:
        try:
            for opcode, argument, _ in pickletools.genops(code):
                self._step(opcode.name, argument)
        except (UnsafeError, _LazyError):
            raise
        except ValueError as error:
            raise UnsafeError(str(error)) from error
        return self._stack[-1]

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _IGNORED:
            return
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            stack.append(_MARK)
        elif name.startswith("EMPTY_"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self._memo[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self._memo[int(argument)])
        elif name == "GLOBAL":
            if argument not in _KNOWN:
                raise UnsafeError(f"it names {argument.replace(' ', '.')}")
            stack.append(_Name(argument))
        else:
            self._build(name)

    def _build(self, name: str) -> None:
        stack = self._stack
        if name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "TUPLE":
            items = self._marked()
            stack.append(tuple(items))
        elif name == "APPEND":
            item = stack.pop()
            stack[-1].append(item)
        elif name == "APPENDS":
            items = self._marked()
            stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._marked() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name == "BINPERSID":
            stack.append(self._persistent(stack.pop()))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(self._call(stack.pop(), arguments))
        elif name == "BUILD" and isinstance(stack[-2], dict):
            stack.pop()  # attributes of an OrderedDict: a state dict's versions
        else:
            raise UnsafeError(f"its pickle has the opcode {name}")

    def _marked(self) -> list[Any]:
        at = (
            len(self._stack)
            - 1
            - next(i for i, item in enumerate(reversed(self._stack)) if item is _MARK)
        )
        items = self._stack[at + 1 :]
        del self._stack[at:]
        return items

    def _persistent(self, identity: tuple) -> np.ndarray:
        kind, storage, key, _, count = identity
        if kind != "storage" or not isinstance(storage, _Name) or storage not in _STORAGES:
            raise UnsafeError(f"it refers to {kind} of {storage}")
        return self._storage(str(key), _STORAGES[storage], int(count))

    def _call(self, what: Any, arguments: tuple) -> Any:
        if not isinstance(what, _Name):
            raise UnsafeError("it calls what is no name")
        if what == _DICT:
            return dict(*arguments)
        if what == _SIZE:
            return tuple(*arguments)
        if what == _PARAMETER:
            return arguments[0]
        if what == _TENSOR:
            flat, offset, shape, strides = arguments[:4]
            if len(arguments) > 6 and arguments[6]:  # a view's negative or conjugate bit
                raise _LazyError(
                    f"{self._next_name()} is stored with {arguments[6]}, so its values are not "
                    "those in the file; save tensor.resolve_neg().resolve_conj()"
                )
            return _strided(flat, offset, shape, strides)
        raise UnsafeError(f"it calls {what}")

    def _next_name(self) -> str:
        """The tensor that is being built, as messages call it: by its key, which lies below."""
        below = [x for x in self._stack if x is not _MARK and not isinstance(x, _Name)]
        return f"tensor {below[-1]!r}" if below and isinstance(below[-1], str) else "a tensor"


class _Name(str):
    """A name that a pickle refers to; never looked up."""


def _strided(flat: np.ndarray, offset: int, shape: tuple, strides: tuple) -> np.ndarray:
    if min((offset, *shape, *strides)) < 0 or len(shape) != len(strides):
        raise UnsafeError("a tensor has a negative size or stride")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if 0 in shape:
        return np.empty(shape, flat.dtype)
    if last >= len(flat):
        raise UnsafeError(f"a tensor reaches beyond its {len(flat)} stored values")
    size = flat.dtype.itemsize
    return np.lib.stride_tricks.as_strided(
        flat[offset:], shape, [step * size for step in strides], writeable=False
    )
