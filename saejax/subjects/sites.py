"""Names of the places where a decoder can be tapped, and the other names they go by.

Sites: `embed`; `<layer>.` followed by resid_pre, attn_z (what the heads read, before the output
matrix), attn_out, resid_mid, mlp_hidden, mlp_out, resid_post; `final` (after the last norm). The
part of one head is `<layer>.attn_z.<head>`. Also understood: the five locations of OpenAI's GPT-2
autoencoders and the hooks of TransformerLens that mean the same thing.
"""

from __future__ import annotations

import difflib
import re

from saejax.subjects.decoder import Config
from saejax.subjects.taps import split_head

LAYER_SITES = (
    "resid_pre",
    "attn_z",
    "attn_out",
    "resid_mid",
    "mlp_hidden",
    "mlp_out",
    "resid_post",
)
ALIASES = {
    "mlp_act": "mlp_hidden",
    "mlp_post_act": "mlp_hidden",
    "resid_delta_attn": "attn_out",
    "resid_post_attn": "resid_mid",
    "resid_delta_mlp": "mlp_out",
    "resid_post_mlp": "resid_post",
}
_HOOKS = {f"hook_{name}": name for name in ("resid_pre", "attn_out", "resid_mid", "mlp_out")}
_HOOKS |= {"hook_resid_post": "resid_post", "attn.hook_z": "attn_z", "mlp.hook_post": "mlp_hidden"}
_LAYERED = re.compile(r"(?:(blocks)\.)?(0|[1-9][0-9]*)\.([A-Za-z_.]+?)(?:\.(0|[1-9][0-9]*))?")


def layer_sites(cfg: Config) -> tuple[str, ...]:
    """The sites of a block in the order of the forward pass."""
    return tuple(name for name in LAYER_SITES if name != "resid_mid" or not cfg.parallel)


def site_widths(cfg: Config) -> dict[str, int]:
    """Every site in the order of the forward pass, with the width of its vectors."""
    special = {"attn_z": cfg.n_heads * cfg.d_head, "mlp_hidden": cfg.d_mlp}
    sites = {"embed": cfg.d_model}
    for i in range(cfg.n_layers):
        sites |= {f"{i}.{name}": special.get(name, cfg.d_model) for name in layer_sites(cfg)}
    return sites | {"final": cfg.d_model}


def width(cfg: Config, site: str) -> int:
    """Width of the vectors at a canonical site."""
    whole, head = split_head(site)
    return site_widths(cfg)[whole] if head is None else cfg.d_head


def resolve(cfg: Config, site: str, subject: str) -> str:
    """The canonical name of a site.

    Args:
      cfg: the model.
      site: a name as asked for: canonical, of one head, or an alias.
      subject: name of the model, for messages.

    Raises:
      ValueError: no such layer, head or site; lists what exists, nearest first.
    """
    if site in ("embed", "final"):
        return site
    match = _LAYERED.fullmatch(site)
    name = match and (_HOOKS.get(match[3]) if match[1] else ALIASES.get(match[3], match[3]))
    if name not in LAYER_SITES:
        raise _unknown(cfg, site, subject)
    layer, head = int(match[2]), match[4]
    if layer >= cfg.n_layers:
        raise ValueError(
            f"site = {site!r}: subject {subject!r} has no layer {layer}; its layers are "
            f"0 .. {cfg.n_layers - 1}"
        )
    if name not in layer_sites(cfg):
        raise ValueError(
            f"site = {site!r} does not exist in subject {subject!r}: attention and MLP of its "
            f"blocks run in parallel, so there is no residual stream between them; sites of a "
            f"layer: {', '.join(layer_sites(cfg))}"
        )
    if head is None:
        return f"{layer}.{name}"
    if name != "attn_z":
        raise ValueError(
            f"site = {site!r}: only attn_z has heads; write '{layer}.{name}' or "
            f"'{layer}.attn_z.{head}'"
        )
    if int(head) >= cfg.n_heads:
        raise ValueError(
            f"site = {site!r}: subject {subject!r} has no head {head}; its heads are "
            f"0 .. {cfg.n_heads - 1}"
        )
    return f"{layer}.{name}.{head}"


def _unknown(cfg: Config, site: str, subject: str) -> ValueError:
    near = difflib.get_close_matches(site, site_widths(cfg), n=3, cutoff=0.0)
    return ValueError(
        f"site = {site!r} does not exist in subject {subject!r}; nearest: {', '.join(near)}; "
        f"existing: embed, final, and for each layer L of 0 .. {cfg.n_layers - 1} "
        f"{', '.join(f'L.{name}' for name in layer_sites(cfg))}; one head H of 0 .. "
        f"{cfg.n_heads - 1} is L.attn_z.H"
    )
