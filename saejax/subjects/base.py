"""A subject model: weights, tokenizer, and named sites at which its activations can be tapped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saejax.subjects import decoder, sites, taps, weights
from saejax.subjects.decoder import Config, Params
from saejax.subjects.families.gpt2 import GPT2Config
from saejax.subjects.taps import Edit, Stop, Tap, identity_tap

__all__ = ["Edit", "Stop", "Subject", "Tap", "fingerprint", "identity_tap", "make_subject"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A language model with taps.

    Attributes:
      name: how it was asked for.
      family: architecture, as `model_type` in config.json.
      config: the model's shape, a family's own or `decoder.Config`; has a field `decoder`.
      params: parameter tree; pass it as an argument of what you jit (as a closure it becomes a
        constant and compilation takes several times longer).
      tokenizer: its tokenizer, or None if it was loaded without one.
      fingerprint: first 16 hex digits of the sha256 of config and weights, as loaded.
      revision: commit of the hub's repository it came from, or ''.
      read: reads the parameters once more, onto a mesh; None for a model of no folder.
    """

    name: str
    family: str
    config: GPT2Config | Config
    params: Params
    tokenizer: Any
    fingerprint: str
    revision: str = ""
    read: Callable[[Mesh], Params] | None = dataclasses.field(default=None, repr=False)
    _programs: dict = dataclasses.field(default_factory=dict, init=False, repr=False)

    @property
    def weights_dtype(self) -> str:
        """Type in which the weights are held."""
        return str(jax.tree.leaves(self.params)[0].dtype)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.config.d_model

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return self.config.n_layers

    @property
    def max_context(self) -> int:
        """Longest context in tokens."""
        return self.config.n_positions

    @property
    def vocab_size(self) -> int:
        """Number of token ids the model knows, often more than its tokenizer has."""
        return self.config.vocab_size

    def sites(self) -> list[str]:
        """All sites in the order of the forward pass, without those of single heads."""
        return list(sites.site_widths(self.config.decoder))

    def resolve_site(self, site: str) -> str:
        """The canonical name of a site, of one head's part of it, or of an alias; see `sites`.

        Raises:
          ValueError: no such layer, head or site; lists what exists, nearest first.
        """
        return sites.resolve(self.config.decoder, site, self.name)

    def check_site(self, site: str) -> None:
        """Refuses a site that does not exist; see `resolve_site`."""
        self.resolve_site(site)

    def width(self, site: str) -> int:
        """Width of the vectors at a site.

        Raises:
          ValueError: no such site.
        """
        return sites.width(self.config.decoder, self.resolve_site(site))

    def apply(
        self,
        params: Params,
        tokens_BT: jax.Array,
        tap: Tap = identity_tap,
        dtype: Any = jnp.float32,
        *,
        edits: Mapping[str, Edit] | None = None,
    ) -> jax.Array:
        """Next-token logits [B, T, V]; see `decoder.apply`.

        Args:
          params: the parameters, `self.params` or like them.
          tokens_BT: integer ids; padding, if any, on the right.
          tap: sees and may replace what flows at every canonical site, after the edits.
          dtype: type of the matrix products; float32 is that on accelerators, too.
          edits: site, in any of its names, to a pure function of the activations there.

        Raises:
          ValueError: no such site; an edit that returns another shape; a context too long.
        """
        if edits:
            tap = taps.compose(self._editing(edits), tap)
        if jnp.dtype(dtype) != jnp.float32:
            return decoder.apply(params, self.config.decoder, tokens_BT, tap, dtype)
        # Accelerators would multiply float32 in TF32 or bfloat16; what taps do is the caller's.
        tap = _at_precision(jax.config.jax_default_matmul_precision, tap)
        with jax.default_matmul_precision("highest"):
            return decoder.apply(params, self.config.decoder, tokens_BT, tap, dtype)

    def capture(
        self,
        params: Params,
        tokens_BT: jax.Array,
        sites: Sequence[str],
        dtype: Any = jnp.float32,
        *,
        edits: Mapping[str, Edit] | None = None,
    ) -> dict[str, jax.Array]:
        """Activations at sites: site, as asked for, to [B, T, width].

        Any number of sites in one forward pass, which stops after the last one needed. What is
        captured at an edited site is what flows on, after the edit.

        Raises:
          ValueError: no site given, or one that does not exist.
        """
        if not sites:
            raise ValueError("sites is empty: name at least one site to capture")
        names = {site: self.resolve_site(site) for site in sites}
        captured: dict[str, jax.Array] = {}
        tap = taps.capturing(names.values(), self.config.decoder.d_head, captured)
        try:
            self.apply(params, tokens_BT, tap, dtype, edits=edits)
        except Stop:
            return {site: captured[name] for site, name in names.items()}
        raise AssertionError("every existing site is reached")

    def logits_and_capture(
        self,
        params: Params,
        tokens_BT: jax.Array,
        sites: Sequence[str],
        dtype: Any = jnp.float32,
        *,
        edits: Mapping[str, Edit] | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Logits of the whole pass, and what `capture` returns, from one forward pass."""
        names = {site: self.resolve_site(site) for site in sites}
        captured: dict[str, jax.Array] = {}
        head = self.config.decoder.d_head
        tap = taps.capturing(names.values(), head, captured, stop=False)
        logits = self.apply(params, tokens_BT, tap, dtype, edits=edits)
        return logits, {site: captured[name] for site, name in names.items()}

    def capture_host(
        self,
        batch: np.ndarray,
        sites: Sequence[str],
        length: np.ndarray | None = None,
        *,
        dtype: Any = jnp.float32,
    ) -> dict[str, np.ndarray]:
        """Activations as numpy arrays, site to [B, T, width]; compiled once for each shape.

        Args:
          batch: token ids [B, T], padded on the right.
          sites: to capture.
          length: real tokens of each row. No token sees a later one here, so it is not needed.
          dtype: type of the pass and of what is returned.
        """
        del length
        self.check_tokens(batch)
        key = (tuple(sites), jnp.dtype(dtype).name)
        if key not in self._programs:
            self._programs[key] = jax.jit(
                lambda params, tokens: self.capture(params, tokens, sites, dtype)
            )
        if "params" not in self._programs:
            self._programs["params"] = jax.device_put(self.params)
        found = self._programs[key](self._programs["params"], jnp.asarray(batch))
        return {site: np.asarray(found[site]) for site in sites}

    def place(self, mesh: Mesh) -> Subject:
        """The same subject with its parameters split over a mesh.

        What is there already is not copied; what this process does not hold is read again.

        Raises:
          FileNotFoundError: it would be read, and its file is gone.
          ValueError: it would be read, and its file is another one by now; or there is none.
        """
        return dataclasses.replace(self, params=weights.place(self.params, mesh, self.read))

    def without_weights(self) -> Subject:
        """The same subject with `params` empty until it is placed; itself if it cannot be read."""
        return self if self.read is None else dataclasses.replace(self, params={})

    def check_tokens(self, tokens: np.ndarray) -> None:
        """Refuses token ids outside the vocabulary, which indexing would clamp silently.

        Raises:
          ValueError: names the largest or smallest id and the vocabulary size.
        """
        low, high = int(np.min(tokens)), int(np.max(tokens))
        if low < 0 or high >= self.config.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(
                f"token id {wrong} is outside the vocabulary of subject {self.name!r} "
                f"(0 .. {self.config.vocab_size - 1}); use the subject's own tokenizer"
            )

    def _editing(self, edits: Mapping[str, Edit]) -> Tap:
        names: dict[str, str] = {}
        for site in edits:
            name = self.resolve_site(site)
            if name in names:
                raise ValueError(
                    f"edits: {names[name]!r} and {site!r} are the same site, {name}; give one"
                )
            names[name] = site
        by_name = {name: edits[site] for name, site in names.items()}
        return taps.editing(by_name, self.config.decoder.d_head)


def make_subject(
    name: str,
    config: GPT2Config | Config,
    params: Params,
    tokenizer: Any,
    *,
    family: str = "gpt2",
    revision: str = "",
    read: Callable[[Mesh], Params] | None = None,
) -> Subject:
    """Builds a Subject, computing its fingerprint.

    Raises:
      ValueError: the tokenizer has ids that the embedding lacks; see `check_vocabulary`.
    """
    check_vocabulary(name, tokenizer, config.vocab_size)
    return Subject(
        name=name,
        family=family,
        config=config,
        params=params,
        tokenizer=tokenizer,
        fingerprint=fingerprint(config, params),
        revision=revision,
        read=read,
    )


def _at_precision(precision: str | None, tap: Tap) -> Tap:
    def at(site: str, x: jax.Array) -> jax.Array:
        with jax.default_matmul_precision(precision):
            return tap(site, x)

    return at


def check_vocabulary(name: str, tokenizer: Any, vocab_size: int) -> None:
    """Refuses a tokenizer with ids that the model lacks.

    Special ones are let pass unless they begin or end texts: encoding never gives them, and text
    tokenizers of models that also see pictures (Gemma 3) have some for the pictures.

    Raises:
      ValueError: names the number of ids and the vocabulary size.
    """
    if tokenizer is None or tokenizer.vocab_size <= vocab_size:
        return
    used = {tokenizer.bos_id, tokenizer.eot_id}
    beyond = {i for i in tokenizer.ids() if i >= vocab_size}
    if beyond & used or beyond - tokenizer.special_ids:
        raise ValueError(
            f"subject {name!r}: the tokenizer has {tokenizer.vocab_size} ids, the model's "
            f"vocab_size is {vocab_size}; take the tokenizer that belongs to the model"
        )


def special_ids(raw: Mapping[str, Any], kind: str) -> tuple[int, ...]:
    """The ids that a config.json names as its 'bos', 'eos' or 'pad': none, one or several."""
    nested = raw.get("text_config")
    for part in (raw, nested if isinstance(nested, Mapping) else {}):
        found = part.get(f"{kind}_token_id")
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            return tuple(i for i in ids if type(i) is int and i >= 0)
    return ()


def check_special_ids(name: str, tokenizer: Any, raw: Mapping[str, Any], vocab_size: int) -> None:
    """Refuses a tokenizer that begins and ends texts with other ids than a config.json says.

    One that agrees in either is let pass: chat models end their turns in another way than texts,
    and some models read a beginning of their own. So is one that cannot be compared in both, and an
    id that the model does not have, which is another model's default.

    Raises:
      ValueError: names the ids of both.
    """
    if tokenizer is None:
        return
    said = {kind: special_ids(raw, kind) for kind in ("bos", "eos")}
    ours = {"bos": tokenizer.bos_id, "eos": tokenizer.eot_id}
    comparable = {
        kind: ids
        for kind, ids in said.items()
        if ours[kind] is not None and any(i < vocab_size for i in ids)
    }
    if len(comparable) < 2 or any(ours[kind] in ids for kind, ids in comparable.items()):
        return
    told = " and ".join(
        f"{kind}_token_id = {ids[0] if len(ids) == 1 else list(ids)}" for kind, ids in said.items()
    )
    raise ValueError(
        f"subject {name!r}: config.json has {told}, but the tokenizer begins texts with "
        f"{ours['bos']} and ends them with {ours['eos']}; take the tokenizer that belongs to the "
        "model, or, if this one does, correct these fields of config.json, or remove them"
    )


def fingerprint(config: GPT2Config | Config, params: Params) -> str:
    """First 16 hex digits of the sha256 of a configuration and its weights.

    One parameter at a time is brought to the host; how they are sharded makes no difference, their
    type does.
    """
    digest = hashlib.sha256(json.dumps(_described(config), sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = np.dtype(leaf.dtype)
        kind = "" if dtype == np.float32 else dtype.name
        digest.update(f"{jax.tree_util.keystr(path)}{tuple(leaf.shape)}{kind}".encode())
        digest.update(np.ascontiguousarray(weights.to_host(leaf)).view(np.uint8))
    return digest.hexdigest()[:16]


def _described(config: GPT2Config | Config) -> dict[str, Any]:
    """A configuration as JSON; an option added to the decoder later changes no old fingerprint."""
    values = dataclasses.asdict(config)
    if isinstance(config, GPT2Config):
        return values
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    return {name: value for name, value in values.items() if value != defaults[name]}
