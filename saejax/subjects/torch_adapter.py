"""Any other model of `transformers`, run by PyTorch with hooks that bring what they see.

For architectures without a decoder here, encoders and vision towers among them: activations only,
no edits and no gradients. A harvest feeds text or, to a vision tower, images (`data.images`); of a
model with one tower for texts and one for images, as CLIP, the latter is taken. Needs the extra
`torch`. Sites are the paths of the model's modules (`named_modules`), as 'encoder.layer.3.output'
for what a module returns and 'encoder.layer.3.output:input' for what it is given. Code of a
repository is never run, and pickled weights are never read.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from saejax.data.images import Patches
from saejax.subjects import hf, towers, weights
from saejax.subjects.base import check_vocabulary
from saejax.subjects.taps import Stop

INPUT = ":input"
_PROBE = (2, 7)  # rows and tokens of the pass that finds the sites: no model has such widths


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TorchSubject:
    """A PyTorch model with taps; looks like `base.Subject` to whoever harvests.

    Attributes:
      name: how it was asked for, with 'torch:'.
      family: `model_type` of its config.json.
      model: the module, in evaluation mode.
      takes: 'tokens', or 'pixels' for a vision tower.
      tokenizer: its tokenizer, `images.Patches` for pixels, or None.
      fingerprint: first 16 hex digits of the sha256 of config and weights, as loaded.
      max_context: longest context in tokens; number of patches and the like for pixels.
      shapes: site to (positions of the probe, width).
      pixels: channels, height and width of the images that a vision tower takes: as its processor
        makes them if the tower takes that size, else as config.json says.
      revision: commit of the hub's repository it came from, or ''.
      folder: where it was read.
    """

    name: str
    family: str
    model: Any
    takes: str
    tokenizer: Any
    fingerprint: str
    max_context: int
    shapes: dict[str, tuple[int, int]]
    pixels: tuple[int, int, int] = (0, 0, 0)
    revision: str = ""
    folder: pathlib.Path = pathlib.Path()

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.model.config.hidden_size

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return self.model.config.num_hidden_layers

    @property
    def vocab_size(self) -> int:
        """Number of token ids the model knows."""
        return self.model.config.vocab_size

    @property
    def dtype(self) -> str:
        """'float32' or 'bfloat16', of weights and computation."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def computation(self) -> dict[str, str]:
        """What computes the activations, see `subjects.computation`."""
        import torch
        import transformers

        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return {"platform": "torch", "device": self.model.device.type, **versions}

    def sites(self) -> list[str]:
        """All sites in the order in which the model passes them."""
        return list(self.shapes)

    def resolve_site(self, site: str) -> str:
        """The site itself.

        Raises:
          ValueError: no such site; the nearest are named.
        """
        if site not in self.shapes:
            near = difflib.get_close_matches(site, self.shapes, n=5, cutoff=0.0)
            raise ValueError(
                f"site = {site!r} does not exist in subject {self.name!r}; nearest: "
                f"{', '.join(near)}; it has {len(self.shapes)} sites, the modules that run once "
                f"in a pass and give [B, T, width]: `load_subject({self.name!r}).sites()`"
            )
        return site

    def check_site(self, site: str) -> None:
        """Refuses a site that does not exist."""
        self.resolve_site(site)

    def width(self, site: str) -> int:
        """Width of the vectors at a site."""
        return self.shapes[self.resolve_site(site)][1]

    def positions(self, site: str) -> int:
        """Of pixels, the vectors that a site has for each image."""
        return self.shapes[self.resolve_site(site)][0]

    @functools.cached_property
    def _processor(self) -> Any:
        return towers.read_processor(self.folder)

    def preprocess(self, image: Any) -> np.ndarray:
        """Pixels float32 [C, H, W] of an image of Pillow, as the model's folder says."""
        return self._processor(images=image, return_tensors="np")["pixel_values"][0]

    def preprocessing(self) -> str:
        """The settings of `preprocess`; see `towers.read_processor` for errors."""
        return towers.describe_processor(self._processor)

    def check_tokens(self, tokens: np.ndarray) -> None:
        """Refuses token ids outside the vocabulary; ValueError names it."""
        low, high, size = int(np.min(tokens)), int(np.max(tokens)), self.model.config.vocab_size
        if low < 0 or high >= size:
            raise ValueError(
                f"token id {low if low < 0 else high} is outside the vocabulary of subject "
                f"{self.name!r} (0 .. {size - 1}); use the subject's own tokenizer"
            )

    def capture_host(
        self, batch: np.ndarray, sites: Sequence[str], length: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Activations at sites, float32: site to [B, T, width]. The pass ends after the last.

        Args:
          batch: token ids [B, T], padded on the right; or pixels, float [B, channels, H, W].
          sites: to capture; any number.
          length: real tokens of each row, which all others attend to; all are real by default.

        Raises:
          ValueError: no such site, none given, or tokens that the model does not know.
        """
        import torch

        if not sites:
            raise ValueError("sites is empty: name at least one site to capture")
        for site in sites:
            self.check_site(site)
        inputs = self._inputs(np.asarray(batch), length)
        seen: dict[str, Any] = {}

        def keep(site: str, value: Any) -> None:
            # A copy: some models write into a tensor again, further on in the pass.
            seen[site] = value.detach().to("cpu", torch.float32, copy=True).numpy()
            if len(seen) == len(set(sites)):
                raise Stop

        _forward(self.model, inputs, set(sites), keep)
        return {site: seen[site] for site in sites}

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: these models can be harvested, not edited."""
        raise ValueError(
            f"subject {self.name!r} runs in PyTorch, outside JAX: its activations can be "
            f"harvested, but it has no logits or edits here. Evaluate downstream loss on one of "
            f"the families {', '.join(hf.families())}"
        )

    def _inputs(self, batch: np.ndarray, length: np.ndarray | None) -> dict[str, Any]:
        import torch

        device = self.model.device
        if self.takes == "pixels":
            return {"pixel_values": torch.as_tensor(batch, dtype=self.model.dtype, device=device)}
        self.check_tokens(batch)
        real = np.full(len(batch), batch.shape[1]) if length is None else np.asarray(length)
        mask = np.arange(batch.shape[1])[None] < real[:, None]
        return {
            "input_ids": torch.as_tensor(batch.astype(np.int64), device=device),
            "attention_mask": torch.as_tensor(mask.astype(np.int64), device=device),
        }


def load(
    name: str, *, dtype: str = "float32", tokenizer: bool = True, ids_only: bool = False
) -> TorchSubject:
    """Loads 'torch:<folder or hub id>', onto a GPU if PyTorch sees one.

    Args:
      name: with the prefix.
      dtype: 'float32' or 'bfloat16', of weights and computation.
      tokenizer: whether to load one, if the model takes tokens.
      ids_only: see `hf.load_subject`.

    Raises:
      FileNotFoundError, PermissionError: as of `hf.load_subject`, or no safetensors there.
      ValueError: PyTorch or transformers is not installed; the architecture is unknown to
        transformers without code of the repository; the file lacks some of the weights; the
        model takes neither tokens nor images, or cannot be run on these alone.
    """
    if missing := [n for n in ("torch", "transformers") if importlib.util.find_spec(n) is None]:
        raise ValueError(
            f"subject = {name!r} needs {' and '.join(missing)}: pip install 'saejax[torch]'"
        )
    if dtype not in weights.DTYPES:
        raise ValueError(f"dtype = {dtype!r} of a subject: {' or '.join(weights.DTYPES)}")
    folder, revision = hf.find_folder(name.removeprefix(hf.TORCH))
    kind = weights.read_json(folder / "config.json").get("model_type")
    if not isinstance(kind, str | None):
        raise ValueError(f"{folder / 'config.json'}: model_type = {kind!r}, a text is needed")
    if not (files := list(folder.glob("*.safetensors"))):
        raise FileNotFoundError(
            f"{folder} has no *.safetensors; pickled weights are never read: convert them with "
            "save_pretrained"
        )
    for file in files:  # transformers calls one missing that it may not read
        weights.open_bytes(file).close()
    model, left_out = _load_model(folder, name, dtype)
    find = functools.partial(_find_sites, model, left_out)
    takes, pixels, shapes = towers.probe(model, name, folder, find)
    size = getattr(model.config, "vocab_size", 0)
    vocabulary = Patches(1) if tokenizer else None
    if tokenizer and takes == "tokens":
        vocabulary = hf.read_tokenizer(folder, size if ids_only else None)
        check_vocabulary(name, vocabulary, size)
    return TorchSubject(
        name=name,
        family=model.config.model_type,
        model=model,
        takes=takes,
        tokenizer=vocabulary,
        fingerprint=_fingerprint(model),
        max_context=_max_context(model, takes, shapes),
        shapes=shapes,
        pixels=pixels or (0, 0, 0),
        revision=revision,
        folder=folder,
    )


def _load_model(folder: Any, name: str, dtype: str) -> tuple[Any, tuple[str, ...]]:
    """The model without its head, and the modules that the file has no weights for."""
    import torch
    import transformers

    try:
        model, info = transformers.AutoModel.from_pretrained(
            folder,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
        )
    except Exception as error:  # of the model's own code, which may raise anything
        reason = " ".join([type(error).__name__ + ":", *str(error).strip().splitlines()[:2]])
        raise ValueError(
            f"subject {name!r} cannot be loaded by transformers without running code of its "
            f"repository, which is never done, or its config.json or weights are wrong: {reason}"
        ) from error
    missing = sorted(info["missing_keys"])
    if wrong := [key for key in missing if not key.startswith("pooler.")]:
        raise ValueError(
            f"subject {name!r}: {folder} has no weights for {', '.join(wrong[:8])}"
            f"{' ...' if len(wrong) > 8 else ''}"
        )
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    if all(hasattr(model, f"get_{kind}_features") for kind in ("image", "text")):
        model = getattr(model, "vision_model", model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), ("pooler",) if missing else ()


def _find_sites(
    model: Any, left_out: tuple[str, ...], pixels: tuple[int, int, int] | None
) -> dict[str, tuple[int, int]]:
    """Site to (positions, width): modules that run once and give or are given [B, T, width].

    The model is run on images of shape `pixels`, or on tokens if that is None.
    """
    import torch

    rows, length = _PROBE
    if pixels:
        shape = (rows, *pixels)
        inputs = {"pixel_values": torch.zeros(shape, dtype=model.dtype, device=model.device)}
    else:
        ids = torch.ones(_PROBE, dtype=torch.int64, device=model.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    calls: collections.Counter[str] = collections.Counter()
    shapes: dict[str, tuple[int, int]] = {}

    def note(site: str, value: Any) -> None:
        calls[site] += 1
        good = value.ndim == 3 and value.shape[0] == rows and value.is_floating_point()
        if good and (pixels or value.shape[1] == length):
            shapes[site] = tuple(value.shape[1:])

    _forward(model, inputs, None, note)
    once = {site: shape for site, shape in shapes.items() if calls[site] == 1}
    return {site: s for site, s in once.items() if re.split("[.:]", site)[0] not in left_out}


def _forward(model: Any, inputs: dict[str, Any], sites: set[str] | None, see: Any) -> None:
    """One pass; `see(site, tensor)` at the sites, or at all. It may raise Stop."""
    import torch

    with contextlib.ExitStack() as hooks, torch.inference_mode():
        for path, module in model.named_modules():
            if path and (sites is None or path in sites):
                hook = module.register_forward_hook(_output_hook(path, see))
                hooks.callback(hook.remove)
            if path and (sites is None or path + INPUT in sites):
                hook = module.register_forward_pre_hook(
                    _input_hook(path + INPUT, see), with_kwargs=True
                )
                hooks.callback(hook.remove)
        with contextlib.suppress(Stop):
            model(**inputs)


def _output_hook(site: str, see: Any) -> Any:
    def hook(module: Any, args: Any, output: Any) -> None:
        if (tensor := next(_tensors(output), None)) is not None:
            see(site, tensor)

    return hook


def _input_hook(site: str, see: Any) -> Any:
    def hook(module: Any, args: Any, kwargs: Any) -> None:
        given = [*args, kwargs.get("hidden_states"), kwargs.get("inputs_embeds")]
        if (tensor := next(_tensors(given), None)) is not None:
            see(site, tensor)

    return hook


def _tensors(value: Any) -> Iterator[Any]:
    """The tensors in what a module gives or is given, in order."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)


def _max_context(model: Any, takes: str, shapes: dict[str, tuple[int, int]]) -> int:
    if takes == "pixels":
        return max(length for length, _ in shapes.values())
    config = model.config
    longest = getattr(config, "max_position_embeddings", None) or 1 << 20  # relative positions
    for path, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        named = path.rpartition(".")[2] == "position_embeddings"
        if named and padding is not None and len(module.weight) == longest:
            # Positions begin behind that of padding; an id of -1 is held as that of the last row.
            return longest - (padding + 1) % longest
    return longest


def _fingerprint(model: Any) -> str:
    import torch

    config = {k: v for k, v in model.config.to_dict().items() if k != "transformers_version"}
    config.pop("_name_or_path", None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
