"""A subject model: weights, tokenizer, and named sites at which its activations can be tapped."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from saejax.data.bpe import Tokenizer
from saejax.subjects import gpt2
from saejax.subjects.gpt2 import GPT2Config, Params, Tap, identity_tap

__all__ = ["Stop", "Subject", "Tap", "identity_tap", "make_subject"]


class Stop(Exception):
    """Raised by a tap to end the forward pass: later layers are then never traced."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A language model with taps.

    Attributes:
      name: how it was asked for.
      family: architecture, as `model_type` in config.json.
      config: shape of the model.
      params: float32 parameter tree; pass it as an argument of what you jit (as a closure it
        becomes a constant and compilation takes several times longer).
      tokenizer: its tokenizer.
      fingerprint: first 16 hex digits of the sha256 of config and weights.
    """

    name: str
    family: str
    config: GPT2Config
    params: Params
    tokenizer: Tokenizer
    fingerprint: str

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

    def sites(self) -> list[str]:
        """All sites in the order of the forward pass."""
        return list(gpt2.site_widths(self.config))

    def check_site(self, site: str) -> None:
        """Refuses a site that does not exist.

        Raises:
          ValueError: lists the existing sites, nearest first.
        """
        sites = self.sites()
        if site not in sites:
            near = difflib.get_close_matches(site, sites, n=3, cutoff=0.0)
            rest = [s for s in sites if s not in near]
            raise ValueError(
                f"site = {site!r} does not exist in subject {self.name!r}; nearest: "
                f"{', '.join(near)}; others: {', '.join(rest)}"
            )

    def width(self, site: str) -> int:
        """Width of the vectors at a site.

        Raises:
          ValueError: no such site.
        """
        self.check_site(site)
        return gpt2.site_widths(self.config)[site]

    def apply(
        self,
        params: Params,
        tokens_BT: jax.Array,
        tap: Tap = identity_tap,
        dtype: Any = jnp.float32,
    ) -> jax.Array:
        """Next-token logits, float32 [B, T, V]; see `gpt2.apply`."""
        return gpt2.apply(params, self.config, tokens_BT, tap, dtype)

    def capture(
        self,
        params: Params,
        tokens_BT: jax.Array,
        sites: Sequence[str],
        dtype: Any = jnp.float32,
    ) -> dict[str, jax.Array]:
        """Activations at sites: site to [B, T, width]. Stops after the last site needed.

        Raises:
          ValueError: no site given, or one that does not exist.
        """
        if not sites:
            raise ValueError("sites is empty: name at least one site to capture")
        for site in sites:
            self.check_site(site)
        captured: dict[str, jax.Array] = {}

        def tap(site: str, x: jax.Array) -> jax.Array:
            if site in sites:
                captured[site] = x
                if len(captured) == len(set(sites)):
                    raise Stop
            return x

        try:
            self.apply(params, tokens_BT, tap, dtype)
        except Stop:
            return {site: captured[site] for site in sites}
        raise AssertionError("every existing site is reached")

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


def make_subject(name: str, config: GPT2Config, params: Params, tokenizer: Tokenizer) -> Subject:
    """Builds a Subject, computing its fingerprint.

    Raises:
      ValueError: the tokenizer has ids that the embedding lacks.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"subject {name!r}: the tokenizer has {tokenizer.vocab_size} ids, the model's "
            f"vocab_size is {config.vocab_size}; take the tokenizer that belongs to the model"
        )
    return Subject(
        name=name,
        family="gpt2",
        config=config,
        params=params,
        tokenizer=tokenizer,
        fingerprint=fingerprint(config, params),
    )


def fingerprint(config: GPT2Config, params: Params) -> str:
    """First 16 hex digits of the sha256 of a configuration and its float32 weights."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        value = np.ascontiguousarray(leaf, dtype="<f4")
        digest.update(f"{jax.tree_util.keystr(path)}{value.shape}".encode())
        digest.update(value)
    return digest.hexdigest()[:16]
