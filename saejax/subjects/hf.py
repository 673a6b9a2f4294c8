"""Loads subject models from the Hugging Face layout: config.json, *.safetensors, tokenizer.json."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import re
from typing import Any

import numpy as np

from saejax.data.bpe import Tokenizer
from saejax.subjects import gpt2
from saejax.subjects.base import Subject, make_subject

EMBEDDED = "embedded"
SUPPORTED_FAMILIES = ("gpt2",)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load_subject(path_or_name: str) -> Subject:
    """Loads a subject model.

    Args:
      path_or_name: 'embedded' (the small model in the package, no network), a local folder, or
        the id of a model on the Hugging Face hub ('openai-community/gpt2'), which needs the
        optional package huggingface_hub.

    Raises:
      FileNotFoundError: no such folder, file or repository.
      PermissionError: the repository is gated.
      ValueError: the architecture, the tensors or the tokenizer are not supported.
    """
    if path_or_name == EMBEDDED:
        return load_folder(pathlib.Path(__file__).parent / "embedded", EMBEDDED)
    folder = pathlib.Path(path_or_name).expanduser()
    if folder.is_dir():
        return load_folder(folder, path_or_name)
    looks_local = path_or_name.startswith((".", "/", "~")) or folder.exists()
    if looks_local or not _HUB_ID.fullmatch(path_or_name):
        raise FileNotFoundError(
            f"subject = {path_or_name!r}: not a folder; give {EMBEDDED!r}, a folder with "
            "config.json, *.safetensors and tokenizer.json, or a Hugging Face id 'owner/name'"
        )
    return load_folder(_download(path_or_name), path_or_name)


def load_folder(folder: pathlib.Path, name: str) -> Subject:
    """Loads a subject from a folder; see `load_subject` for the errors."""
    raw = _read_json(folder / "config.json")
    family = raw.get("model_type")
    if family not in SUPPORTED_FAMILIES:
        raise ValueError(
            f"subject {name!r}: model_type = {family!r} in {folder / 'config.json'} is not "
            f"supported; supported families: {', '.join(SUPPORTED_FAMILIES)}"
        )
    config = gpt2.GPT2Config.from_hf(raw)
    params = gpt2.from_hf(_read_tensors(folder), config)
    return make_subject(name, config, params, Tokenizer.load(folder))


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: a subject folder has config.json, *.safetensors, tokenizer.json"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON text: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold one JSON object")
    return content


def _read_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of model.safetensors, or of the shards that its index names, as float32."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        files = ["model.safetensors"]
    elif index.is_file():
        files = sorted(set(_read_json(index).get("weight_map", {}).values()))
    else:
        raise FileNotFoundError(
            f"{folder} has no model.safetensors and no model.safetensors.index.json; convert "
            "other formats with save_pretrained(..., safe_serialization=True)"
        )
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        if "/" in file or "\\" in file or not (folder / file).is_file():
            raise FileNotFoundError(f"{index} names the shard {file!r}, which is not in {folder}")
        tensors |= _read_safetensors(folder / file)
    return tensors


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    import safetensors
    from safetensors.numpy import load_file

    try:
        raw = load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a sound safetensors file: {error}") from error
    return {name: value.astype(np.float32) for name, value in raw.items()}


def _download(repository: str) -> pathlib.Path:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise FileNotFoundError(
            f"subject = {repository!r} is no local folder, and loading from the Hugging Face hub "
            "needs the package huggingface_hub: pip install huggingface_hub"
        )
    import huggingface_hub
    from huggingface_hub import errors

    patterns = ["config.json", "tokenizer.json", "*.safetensors", "model.safetensors.index.json"]
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns))
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
    except (errors.LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"subject = {repository!r} could not be downloaded and is not in the local cache "
            f"({type(error).__name__}); check the network, or give a local folder"
        ) from error
