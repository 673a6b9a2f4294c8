"""Taps and edits: how a forward pass is watched and changed at named sites.

A tap is a function `tap(site, x) -> x` that the decoder calls at every site; what it returns flows
on. Capture, replacement, ablation, steering and attribution are all taps. An edit is the simpler
thing for one site: a pure function of the activations there. Edits differentiate like the rest of
the forward pass, and an identity edit changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import jax
import jax.numpy as jnp

Tap = Callable[[str, jax.Array], jax.Array]
Edit = Callable[[jax.Array], jax.Array]


class Stop(Exception):
    """Raised by a tap to end the forward pass: later layers are then never traced."""


def identity_tap(site: str, x: jax.Array) -> jax.Array:
    """The tap that changes nothing."""
    del site
    return x


def replace(value: jax.Array) -> Edit:
    """The edit that puts `value` in place of what is there; it is broadcast to that shape."""
    return lambda x: _like(value, x)


def add(direction: jax.Array, scale: float | jax.Array = 1.0) -> Edit:
    """The edit that adds `scale * direction`: steering, or a probe for attribution."""
    return lambda x: x + _like(jnp.asarray(direction) * scale, x)


def patch(value: jax.Array, where: jax.Array) -> Edit:
    """The edit that puts `value` where the mask holds, and leaves the rest.

    Args:
      value: broadcast to [B, T, width].
      where: bool [B, T], or [T] for all rows alike.
    """

    def edit(x: jax.Array) -> jax.Array:
        mask = jnp.broadcast_to(jnp.asarray(where), x.shape[:2])[..., None]
        return jnp.where(mask, _like(value, x), x)

    return edit


def compose(first: Tap, *others: Tap) -> Tap:
    """One tap that applies several in order."""

    def tap(site: str, x: jax.Array) -> jax.Array:
        for each in (first, *others):
            x = each(site, x)
        return x

    return tap


def split_head(site: str) -> tuple[str, int | None]:
    """('3.attn_z', 5) of '3.attn_z.5', the site of one head; (site, None) of any other site."""
    whole, _, last = site.rpartition(".")
    if whole.endswith(".attn_z") and last.isdecimal():
        return whole, int(last)
    return site, None


def part(x: jax.Array, head: int | None, d_head: int) -> jax.Array:
    """The columns of one head, or all columns."""
    return x if head is None else x[..., head * d_head : (head + 1) * d_head]


def editing(edits: Mapping[str, Edit], d_head: int) -> Tap:
    """The tap that applies each edit at its site, in the order of the mapping.

    Args:
      edits: canonical site to edit; see `Subject.resolve_site`. The edit of a single head sees and
        replaces that head's columns only. What an edit returns is cast to the type that flows
        there, so that a float32 direction does not widen a bfloat16 pass.
      d_head: width of a head.

    Raises:
      ValueError: an edit returns another shape (when the forward pass is traced).
    """
    at: dict[str, list[tuple[int | None, str, Edit]]] = {}
    for site, edit in edits.items():
        whole, head = split_head(site)
        at.setdefault(whole, []).append((head, site, edit))

    def tap(site: str, x: jax.Array) -> jax.Array:
        for head, name, edit in at.get(site, ()):
            old = part(x, head, d_head)
            new = jnp.asarray(edit(old))
            if new.shape != old.shape:
                raise ValueError(
                    f"the edit at site {name!r} returns shape {new.shape}, must be {old.shape}"
                )
            new = new.astype(x.dtype)
            x = new if head is None else _put(x, new, head * d_head)
        return x

    return tap


def capturing(
    sites: Collection[str], d_head: int, into: dict[str, jax.Array], *, stop: bool = True
) -> Tap:
    """The tap that keeps what flows on at canonical `sites` and, with `stop`, ends after the last.

    Raises:
      Stop: from the tap, once every site has been seen.
    """
    wanted: dict[str, list[str]] = {}
    for site in sites:
        wanted.setdefault(split_head(site)[0], []).append(site)
    left = set(wanted)

    def tap(site: str, x: jax.Array) -> jax.Array:
        for name in wanted.get(site, ()):
            into[name] = part(x, split_head(name)[1], d_head)
        left.discard(site)
        if stop and not left:
            raise Stop
        return x

    return tap


def _like(value: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(value), x.shape).astype(x.dtype)


def _put(x: jax.Array, new: jax.Array, start: int) -> jax.Array:
    return jnp.concatenate([x[..., :start], new, x[..., start + new.shape[-1] :]], axis=-1)
