"""Loads subject models from the Hugging Face layout: config.json, *.safetensors, tokenizer.json."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from saejax.data.token_arrays import IdsOnly
from saejax.data.tokenizers import load_tokenizer
from saejax.subjects import weights
from saejax.subjects.base import (
    Subject,
    check_special_ids,
    check_vocabulary,
    make_subject,
    special_ids,
)
from saejax.subjects.decoder import Config, Params
from saejax.subjects.families import families
from saejax.subjects.gpt2 import GPT2Config, to_hf
from saejax.subjects.layout import Family, check_tensors

EMBEDDED = "embedded"
TORCH = "torch:"
_EMBEDDED_FOLDER = pathlib.Path(__file__).parent / "embedded"
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
_FILES = (
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "processor_config.json",
)


def load_subject(
    path_or_name: str,
    *,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    tokenizer: bool = True,
    ids_only: bool = False,
) -> Subject:
    """Loads a subject model.

    Args:
      path_or_name: 'embedded' (the small model in the package, no network), a local folder, or
        the id of a model on the Hugging Face hub ('openai-community/gpt2', with '@revision' if
        need be), which needs the optional package huggingface_hub. 'torch:' before a folder or id
        takes the adapter for other models of transformers; see `torch_adapter`.
      dtype: 'float32' or 'bfloat16', of the weights as they are held.
      mesh: split the weights over it, each shard read straight from the file; of one of several
        processes all must load at once, and each reads what its own devices hold. Numpy arrays
        on the host by default.
      tokenizer: False loads none: enough where tokens come from arrays.
      ids_only: take `token_arrays.IdsOnly` where a folder has no tokenizer.json: no text can be
        encoded with it.

    Raises:
      FileNotFoundError: no such folder, file or repository.
      PermissionError: the repository is gated, or a file may not be read.
      ValueError: the architecture, the tensors or the tokenizer are not supported.
    """
    if path_or_name.startswith(TORCH):
        from saejax.subjects import torch_adapter

        return torch_adapter.load(path_or_name, dtype=dtype, tokenizer=tokenizer, ids_only=ids_only)
    options: dict[str, Any] = {
        "dtype": dtype, "mesh": mesh, "tokenizer": tokenizer, "ids_only": ids_only
    }  # fmt: skip
    if path_or_name == EMBEDDED:
        return load_folder(_EMBEDDED_FOLDER, EMBEDDED, **options)
    folder, revision = find_folder(path_or_name)
    return load_folder(folder, path_or_name, revision=revision, **options)


def find_folder(path_or_name: str) -> tuple[pathlib.Path, str]:
    """The local folder of a model, downloaded if it is a hub id, and its revision or ''.

    Raises:
      FileNotFoundError, PermissionError: as of `load_subject`.
    """
    folder = pathlib.Path(path_or_name).expanduser()
    if folder.is_dir():
        return folder, ""
    looks_local = path_or_name.startswith((".", "/", "~")) or folder.exists()
    match = _HUB_ID.fullmatch(path_or_name)
    if looks_local or not match:
        raise FileNotFoundError(
            f"subject = {path_or_name!r}: not a folder; give {EMBEDDED!r}, a folder with "
            "config.json, *.safetensors and tokenizer.json, or a Hugging Face id 'owner/name'"
        )
    folder = _download(match[1], match[2])
    return folder, folder.name if folder.parent.name == "snapshots" else ""


def load_folder(
    folder: pathlib.Path,
    name: str,
    *,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    tokenizer: bool = True,
    ids_only: bool = False,
    revision: str = "",
) -> Subject:
    """Loads a subject from a folder; see `load_subject` for the arguments and errors."""
    kind, family, config = _read_config(folder, name)
    tensors = weights.open_tensors(folder)
    load = functools.partial(weights.load_params, tensors, family, config.decoder, dtype=dtype)
    params = load(mesh=mesh)
    unknown = config.vocab_size if ids_only else None
    found = _tokenizer(folder, name, config, unknown) if tokenizer else None
    return make_subject(
        name, config, params, found, family=kind, revision=revision, read=lambda at: load(mesh=at)
    )


def describe_subject(
    path_or_name: str, *, dtype: str = "float32", ids_only: bool = False
) -> Subject:
    """A subject without its weights, to plan with: what config, tokenizer and headers say.

    The tensors are checked by name and shape, and none is read; `params` is empty and `fingerprint`
    is ''. Of a 'torch:' subject the model itself says what its sites are, so it is loaded, in
    `dtype`.

    Args:
      path_or_name, dtype, ids_only: see `load_subject`, for the errors too.
    """
    if path_or_name.startswith(TORCH):
        return load_subject(path_or_name, dtype=dtype, ids_only=ids_only)
    folder, revision = _EMBEDDED_FOLDER, ""
    if path_or_name != EMBEDDED:
        folder, revision = find_folder(path_or_name)
    kind, family, config = _read_config(folder, path_or_name)
    shapes = {name: tensor.shape for name, tensor in weights.open_tensors(folder).items()}
    check_tensors(family, config.decoder, shapes)
    tokenizer = _tokenizer(folder, path_or_name, config, config.vocab_size if ids_only else None)
    return Subject(
        name=path_or_name,
        family=kind,
        config=config,
        params={},
        tokenizer=tokenizer,
        fingerprint="",
        revision=revision,
    )


def _tokenizer(
    folder: pathlib.Path, name: str, config: GPT2Config | Config, unknown: int | None
) -> Any:
    """What `read_tokenizer` gives; ValueError if it is not the model's."""
    found = read_tokenizer(folder, unknown)
    check_vocabulary(name, found, config.vocab_size)
    raw = weights.read_json(folder / "config.json")
    check_special_ids(name, found, raw, config.vocab_size)
    return found


def read_tokenizer(folder: pathlib.Path, vocab_size: int | None = None) -> Any:
    """The tokenizer of a folder; with `vocab_size`, ids below it where there is none.

    Of such ids those are special that config.json names.
    """
    if vocab_size is None or (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder)
    raw = weights.read_json(folder / "config.json")
    bos, eos, pad = (special_ids(raw, kind) for kind in ("bos", "eos", "pad"))
    return IdsOnly(vocab_size, bos=bos[0] if bos else None, eos=eos, special=(*bos, *pad))


def _read_config(folder: pathlib.Path, name: str) -> tuple[str, Family, GPT2Config | Config]:
    """`model_type`, family and configuration of a folder; ValueError if it is not supported."""
    raw = weights.read_json(folder / "config.json")
    kind = raw.get("model_type")
    known = families()
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(
            f"subject {name!r}: model_type = {kind!r} in {folder / 'config.json'} is not "
            f"supported; supported families: {', '.join(known)}. Any other model of transformers "
            f"can be harvested through PyTorch: subject = '{TORCH}{name}'"
        )
    _refuse_code(raw, folder)
    return kind, known[kind], known[kind].read_config(raw)


def write_folder(
    path: str | os.PathLike[str],
    config: GPT2Config,
    params: Params,
    tokenizer: Any = None,
    *,
    dtype: str = "bfloat16",
) -> None:
    """Writes a GPT-2 in the Hugging Face layout; each file is replaced in one move.

    Args:
      path: the folder; made if need be.
      config: shape of the model.
      params: its parameters.
      tokenizer: something with `save(path)`; None writes no tokenizer.json.
      dtype: 'float32' or 'bfloat16', of the tensors in the file.

    Raises:
      ValueError: another dtype.
    """
    kinds: Mapping[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
    if dtype not in kinds:
        raise ValueError(f"dtype = {dtype!r}: {' or '.join(kinds)}")
    folder = pathlib.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.astype(kinds[dtype]) for name, value in to_hf(params, config).items()}
    weights.write_file(folder / "model.safetensors", tensors)
    (folder / "config.tmp").write_text(json.dumps(config.to_hf(), indent=2) + "\n")
    os.replace(folder / "config.tmp", folder / "config.json")
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer.json")


def _refuse_code(raw: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Refuses models that come with code of their own, or with quantised weights."""
    if raw.get("auto_map"):
        raise ValueError(
            f"{folder / 'config.json'}: auto_map asks to run code of the repository, which is "
            f"never done. If the weights are those of a plain {raw['model_type']}, remove auto_map"
        )
    if raw.get("quantization_config"):
        raise ValueError(
            f"{folder / 'config.json'}: quantization_config is not supported; take the original "
            f"weights, in float32, float16 or bfloat16"
        )


def _download(repository: str, revision: str | None = None) -> pathlib.Path:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise FileNotFoundError(
            f"subject = {repository!r} is no local folder, and loading from the Hugging Face hub "
            "needs the package huggingface_hub: pip install huggingface_hub"
        )
    import huggingface_hub
    from huggingface_hub import errors

    options = {} if revision is None else {"revision": revision}
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(repository, allow_patterns=list(_FILES), **options)
        )
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"subject = {repository!r} is gated: accept its licence on huggingface.co and log in "
            "with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"subject = {repository!r}: no such model on the Hugging Face hub, or it is private "
            "and you are not logged in (`hf auth login`)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"subject = {repository!r} has no revision {revision!r}: give a branch, tag or commit"
        ) from error
    except (errors.LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"subject = {repository!r} could not be downloaded and is not in the local cache "
            f"({type(error).__name__}); check the network, or give a local folder"
        ) from error
