"""Where each parameter of a decoder lies in the tensors of a Hugging Face model, both ways.

A `Piece` says which tensor, whether it is stored [out, in], and which of its output columns: fused
projections (GPT-2's c_attn, GPT-NeoX's query_key_value) give several pieces of one tensor. Reading
is lazy: a slice of a parameter reads that slice of the file.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from saejax.subjects.decoder import Config, Params, leaf_shapes

Path = tuple[str | int, ...]
Take = slice | np.ndarray
_SHOWN = 8
HEADS = ("lm_head.weight", "embed_out.weight")  # copies of the embedding, where it is tied
_ROWS = 1024  # of an embedding, compared at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """One parameter in the file.

    Attributes:
      tensor: its name there, without a prefix.
      shape: shape of the whole tensor there.
      transposed: the file has [out, in].
      take: which output columns of the tensor belong to the parameter; None for all.
    """

    tensor: str
    shape: tuple[int, ...]
    transposed: bool = False
    take: Take | None = None

    def read(self, stored: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of the parameter from the stored tensor, which may be a memory map."""
        view = stored.T if self.transposed else stored
        if isinstance(self.take, np.ndarray):
            return view[..., self.take[index[-1]]][*index[:-1], slice(None)]
        return (view if self.take is None else view[..., self.take])[index]

    def write(self, stored: np.ndarray, value: np.ndarray) -> None:
        """Puts the parameter into its place in the tensor."""
        view = stored.T if self.transposed else stored
        view[..., slice(None) if self.take is None else self.take] = value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fused:
    """A tensor that holds several projections.

    Attributes:
      tensor: its name, without `.weight`.
      columns: number of its output columns.
      take: projection to its output columns.
    """

    tensor: str
    columns: int
    take: Mapping[str, Take]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """Names of a family's tensors.

    Attributes:
      embed, pos, final, head: tensors outside the blocks (`final` without `.weight`).
      layer: start of a block's names, with `{}` for its number.
      parts: part of a block to the rest of its name, without `.weight` or `.bias`.
      fused: of the block's fused projections.
      transposed: kernels are stored [out, in]; the embedding never is.
    """

    embed: str
    final: str
    layer: str
    parts: Mapping[str, str]
    head: str = "lm_head.weight"
    pos: str = ""
    fused: Fused | None = None
    transposed: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Architectures of config.json's `model_type`, and how their files are read.

    Attributes:
      read_config: config.json to a configuration, which has a field `decoder`.
      names: configuration to tensor names.
      prefixes: what may stand before all names (but the head's), longest first.
      ignored: regular expression of names, without prefix, that hold no parameter.
    """

    read_config: Callable[[Mapping[str, Any]], Any]
    names: Callable[[Config], Names]
    prefixes: tuple[str, ...]
    ignored: str = r"(?!)"

    def strip(self, name: str) -> str:
        """A tensor's name without the family's prefix."""
        return next((name[len(p) :] for p in self.prefixes if name.startswith(p)), name)

    def pieces(self, cfg: Config) -> dict[Path, Piece]:
        """Path of every parameter to its place in the file."""
        names = self.names(cfg)
        return {path: _piece(names, path, shape) for path, shape in leaf_shapes(cfg).items()}


def check_tensors(
    family: Family, cfg: Config, found: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """Refuses tensors that are not exactly those of the model.

    A tied model may have a copy of its embedding, as a head, or have it under that name alone.

    Args:
      family: which knows the names.
      cfg: the model.
      found: names in the file to shapes.

    Returns:
      Name without prefix to name in the file, of every tensor that is needed, and of copies.

    Raises:
      ValueError: tensors are missing, unknown, there twice, or of the wrong shape; all are named.
    """
    wanted = {piece.tensor: piece.shape for piece in family.pieces(cfg).values()}
    embed = family.names(cfg).embed
    shapes = wanted | (dict.fromkeys(HEADS, wanted[embed]) if cfg.tied else {})
    places: dict[str, str] = {}
    faults = []
    for name, shape in found.items():
        short = family.strip(name)
        if short in places:
            faults.append(f"{short} is there twice, as {places[short]} and {name}")
        elif short in shapes:
            places[short] = name
            if tuple(shape) != shapes[short]:
                faults.append(f"{short} has shape {tuple(shape)}, must be {shapes[short]}")
        elif not re.fullmatch(family.ignored, short):
            faults.append(f"unknown {name}")
    if cfg.tied and (copies := [places[head] for head in HEADS if head in places]):
        places.setdefault(embed, copies[0])
    missing = [f"missing {name} {shape}" for name, shape in wanted.items() if name not in places]
    if faults := missing + faults:
        more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise ValueError(
            f"the tensors do not fit the model of config.json: {'; '.join(faults[:_SHOWN])}{more}"
        )
    return places


def heads_beside(cfg: Config, path: Path, places: Mapping[str, str], tensor: str) -> list[str]:
    """Names in the file of the copies that a tied model has of a parameter: the embedding."""
    if not cfg.tied or path != ("embed",):
        return []
    return [places[head] for head in HEADS if places.get(head, places[tensor]) != places[tensor]]


def check_copy(name: str, head: np.ndarray, embedding: np.ndarray) -> None:
    """Refuses a head, or a slice of it, that is not the embedding to which it is tied.

    Which of both is meant cannot be told: transformers takes the head, or used to drop it.
    """
    for start in range(0, len(head), _ROWS):
        both = (np.asarray(x[start : start + _ROWS], np.float32) for x in (head, embedding))
        if not np.array_equal(*both, equal_nan=True):
            raise ValueError(
                f"{name} differs from the token embedding, but config.json ties both "
                "(tie_word_embeddings is true there, or by default): set tie_word_embeddings to "
                "false in config.json, or remove that tensor from the file"
            )


def build_tree(leaves: Mapping[Path, Any]) -> Params:
    """The nested tree of leaves by path; whole numbers in a path index a list."""
    tree: Params = {}
    for path, value in leaves.items():
        node: Any = tree
        for key, following in zip(path, path[1:], strict=False):
            empty: Any = [] if isinstance(following, int) else {}
            if isinstance(node, list):
                node.extend({} for _ in range(key + 1 - len(node)))
                node = node[key]
            else:
                node = node.setdefault(key, empty)
        node[path[-1]] = value
    return tree


def leaf_at(params: Params, path: Path) -> Any:
    """The leaf of a tree at a path."""
    node: Any = params
    for key in path:
        node = node[key]
    return node


def from_tensors(family: Family, cfg: Config, tensors: Mapping[str, np.ndarray]) -> Params:
    """Parameters (float32 numpy) from all tensors of a model; see `check_tensors` for errors."""
    places = check_tensors(family, cfg, {name: value.shape for name, value in tensors.items()})
    shapes = leaf_shapes(cfg)

    def read(path: Path, piece: Piece) -> np.ndarray:
        whole = tuple(slice(0, size) for size in shapes[path])
        for name in heads_beside(cfg, path, places, piece.tensor):
            check_copy(name, tensors[name], tensors[places[piece.tensor]])
        value = piece.read(np.asarray(tensors[places[piece.tensor]]), whole)
        return np.ascontiguousarray(value, np.float32)

    return build_tree({path: read(path, piece) for path, piece in family.pieces(cfg).items()})


def to_tensors(family: Family, cfg: Config, params: Params) -> dict[str, np.ndarray]:
    """The inverse of `from_tensors`: tensors by their names without prefix, in the leaves' type."""
    out: dict[str, np.ndarray] = {}
    for path, piece in family.pieces(cfg).items():
        value = np.asarray(leaf_at(params, path))
        if piece.tensor not in out:
            out[piece.tensor] = np.zeros(piece.shape, value.dtype)
        piece.write(out[piece.tensor], value)
    return out


def _piece(names: Names, path: Path, shape: tuple[int, ...]) -> Piece:
    outside = {"embed": names.embed, "pos": names.pos, "head": names.head}
    if path[0] in outside:
        transposed = path[0] == "head"
        return Piece(outside[path[0]], shape[::-1] if transposed else shape, transposed)
    end = "bias" if path[-1] == "bias" else "weight"
    if path[0] == "final":
        return Piece(f"{names.final}.{end}", shape)
    _, i, name, kind = path
    start, take = names.layer.format(i), None
    if names.fused is not None and name in names.fused.take:
        tensor, take = names.fused.tensor, names.fused.take[name]
        shape = (*shape[:-1], names.fused.columns)
    else:
        tensor = names.parts[name]
    transposed = names.transposed and kind == "kernel"
    return Piece(f"{start}{tensor}.{end}", shape[::-1] if transposed else shape, transposed, take)
