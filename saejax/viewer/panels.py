"""Parts of the report as HTML: figures, comparisons and the card of one latent."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from saejax.evals.metrics import LatentStatistics
from saejax.latents.summaries import TopExamples
from saejax.viewer.text import Piece, markup, pieces, visible

LEVELS = 10
BEFORE, AFTER = 64, 100  # characters kept on each side of the strongest token

# Key of the evaluation, label, format, what the figure means.
HEADLINE = (
    ("nmse", "NMSE", "{:.3f}", "squared error over that of predicting the mean"),
    ("delta_ce", "ΔCE, nats", "{:+.3f}", "loss the subject gains when it reads the reconstruction"),
    ("explained_variance", "explained variance", "{:.3f}", "in the subject's own space"),
    ("l0", "L0", "{:.1f}", "active latents per token"),
    ("dead_fraction", "dead latents", "{:.1%}", "fired on none of the held-out tokens"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentPages:
    """The latents on show, and what is needed to show them.

    Attributes:
      chosen: latent indices, densest first.
      examples: their top contexts.
      tokenizer: has ``token_bytes(id)``.
      names: document names, indexed by ``examples.document``.
      raised, lowered: token ids ``[S, n]`` per row of ``examples.latents``, or None.
      seed: seed of the draw, to be told on the page.
    """

    chosen: np.ndarray
    examples: TopExamples
    tokenizer: Any
    names: Sequence[str]
    raised: np.ndarray | None = None
    lowered: np.ndarray | None = None
    seed: int = 0


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Pairs of label and value as a quiet list."""
    rows = (f"<div><dt>{html.escape(a)}</dt><dd>{html.escape(b)}</dd></div>" for a, b in pairs)
    return f'<dl class="facts">{"".join(rows)}</dl>'


def headline(evaluation: Mapping[str, Any]) -> str:
    """The few figures a reader looks for first."""
    cells = [
        f'<div title="{html.escape(meaning)}"><strong>{form.format(evaluation[key])}</strong>'
        f"<span>{html.escape(label)}</span><small>{html.escape(meaning)}</small></div>"
        for key, label, form, meaning in HEADLINE
        if key in evaluation
    ]
    return f'<section class="headline">{"".join(cells)}</section>'


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        first, rest = (
            html.escape(row[0]),
            "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row[1:]),
        )
        return f"<tr><th>{first}</th>{rest}</tr>"

    body = "".join(cells(row, "td") for row in rows)
    top = f"<thead>{cells(head, 'th')}</thead>"
    table = f"<table>{top}<tbody>{body}</tbody></table>"
    return f"<figure><figcaption>{html.escape(caption)}</figcaption>{table}</figure>"


def comparisons(evaluation: Mapping[str, Any]) -> str:
    """Tables of the figures beside their baselines."""
    e, base = evaluation, evaluation.get("baselines", {})
    rows = [("this autoencoder", f"{e['nmse']:.4f}")]
    if "pca_nmse" in base:
        rows.append((f"PCA, {base['pca_components']} components", f"{base['pca_nmse']:.4f}"))
    rows.append(("predicting the mean", f"{base.get('mean_nmse', 1.0):.4f}"))
    if "untrained_nmse" in base:
        rows.append(("untrained dictionary", f"{base['untrained_nmse']:.4f}"))
    caption = f"Reconstruction of {e['tokens']:,} held-out activations"
    tables = [_table(caption, ("", "NMSE"), rows)]
    if "delta_ce" in e:
        tables.append(_downstream(e))
    if "recovery" in e:
        flat = [(k.replace("_", " "), _cell(v)) for k, v in e["recovery"].items() if _scalar(v)]
        tables.append(_table("Recovery of the true features", ("", ""), flat))
    tables.append(_table("Sparsity", ("", ""), _sparsity(e)))
    inner = f'<div class="tables">{"".join(tables)}</div>'
    return f"<section><h2>Held-out evaluation</h2>{inner}</section>"


def _scalar(value: Any) -> bool:
    return isinstance(value, int | float | str)


def _cell(value: Any) -> str:
    return (
        f"{value:.4f}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else value
    )


def _sparsity(e: Mapping[str, Any]) -> list[tuple[str, str]]:
    training = e.get("dead_fraction_train")
    trained = [] if training is None else [("dead by the training's count", f"{training:.2%}")]
    return [
        ("active latents per token", f"{e['l0']:.2f}"),
        ("dead on the held-out tokens", f"{e['dead_fraction']:.2%}"),
        *trained,
        ("active on over 1 % of tokens", f"{e['dense_fraction_1_percent']:.2%}"),
        ("active on over 10 % of tokens", f"{e['dense_fraction_10_percent']:.2%}"),
        ("shrinkage ‖x̂‖ / ‖x‖", f"{e['shrinkage']:.3f}"),
    ]


def _downstream(e: Mapping[str, Any]) -> str:
    count, clean = e["downstream_tokens"], e["ce_clean"]
    caption = f"Subject's loss, {clean:.3f} nats clean, {count:,} predictions"
    rows = [("reconstruction", f"{e['delta_ce']:+.4f}", f"{e['kl']:.4f}", "")]
    for kind in ("mean", "zero"):
        delta, kl = e[f"delta_ce_{kind}_ablation"], e[f"kl_{kind}_ablation"]
        share = f"{e[f'recovered_{kind}_ablation']:.1%}"
        rows.append((f"{kind} ablation", f"{delta:+.4f}", f"{kl:.4f}", share))
    return _table(caption, ("site replaced by", "ΔCE", "KL", "SAE recovers"), rows)


def density(value: float) -> str:
    """A density as a percentage and as one in so many tokens."""
    return f"{100 * value:.2g} % of tokens (1 in {1 / value:,.0f})"


def _level(value: float, peak: float) -> int:
    return max(1, math.ceil(LEVELS * value / peak)) if value > 0 else 0


def _spans(parts: Sequence[Piece], peak: float, *, lines: bool = False) -> str:
    """Pieces as HTML: shaded ones in ``<b>`` with their value, runs of others as plain text."""
    out, plain = [], ""
    for piece in parts:
        level = _level(piece.value, peak)
        if not level:
            plain += piece.text
            continue
        out.append(markup(plain, lines=lines))
        shown = markup(piece.text, lines=lines)
        out.append(f'<b class="a{level}" title="{piece.value:.3g}">{shown}</b>')
        plain = ""
    return "".join(out) + markup(plain, lines=lines)


def _clip(parts: Sequence[Piece], most: int) -> list[Piece]:
    """Pieces from the front until ``most`` characters, so a line of the page stays small."""
    kept, length = [], 0
    for piece in parts:
        if length >= most:
            break
        kept.append(piece)
        length += len(visible(piece.text))
    return kept


def _example(pages: LatentPages, row: int, slot: int, peak: float) -> str:
    shown = pages.examples
    parts = pieces(pages.tokenizer, shown.tokens[row, slot], shown.values[row, slot])
    best = max(range(len(parts)), key=lambda i: parts[i].value)
    left = list(reversed(_clip(list(reversed(parts[:best])), BEFORE)))
    right = _clip(parts[best + 1 :], AFTER)
    at, document = parts[best].start, int(shown.document[row, slot])
    offset = int(shown.offset[row, slot])
    name = pages.names[document] if 0 <= document < len(pages.names) else f"document {document}"
    stop = offset + shown.tokens.shape[2] - 1
    # A BOS that belongs to no document stands at -1, and may be the strongest.
    source = f"{name}, tokens {max(offset, 0):,} to {stop:,}, strongest at {max(offset + at, 0):,}"
    return (
        '<details class="ex"><summary>'
        f'<span class="l"><span>{_spans(left, peak)}</span></span>'
        f'<span class="r"><em>{_spans([parts[best]], peak)}</em>{_spans(right, peak)}</span>'
        f'<span class="v">{parts[best].value:.3g}</span></summary>'
        f"<pre>{_spans(parts, peak, lines=True)}</pre>"
        f'<p class="src">{markup(source)}</p></details>'
    )


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:  # a part of a character: show its bytes, not a row of question marks
        return "".join(f"⟨{byte:02X}⟩" for byte in raw)


def _tokens(label: str, tokenizer, ids: np.ndarray) -> str:
    items = "".join(f"<code>{markup(_text(tokenizer.token_bytes(int(i))))}</code>" for i in ids)
    return f"<div><dt>{label}</dt><dd>{items}</dd></div>"


def card(pages: LatentPages, stats: LatentStatistics, latent: int) -> str:
    """Statistics and top contexts of one latent."""
    row = pages.examples.row(latent)
    slots = pages.examples.of_latent(latent)
    peak = float(pages.examples.score[row].max())
    words = (
        f"active on {density(float(stats.density[latent]))}, "
        f"mean {float(stats.mean_when_active[latent]):.3g} when active, "
        f"at most {float(stats.peak[latent]):.3g}"
    )
    effects = ""
    if pages.raised is not None and pages.lowered is not None and pages.raised.shape[1]:
        raised = _tokens("raises", pages.tokenizer, pages.raised[row])
        lowered = _tokens("lowers", pages.tokenizer, pages.lowered[row])
        effects = f'<dl class="effects">{raised}{lowered}</dl>'
    lines = "".join(_example(pages, row, slot, peak) for slot in slots)
    return (
        f'<article id="latent-{latent}"><h3><a href="#latent-{latent}">{latent}</a>'
        f"<small>{words}</small></h3>{effects}{lines}</article>"
    )


def index(pages: LatentPages, stats: LatentStatistics, samples: int = 3) -> str:
    """A table of contents: each latent with its density and its strongest tokens."""
    out = []
    for latent in map(int, pages.chosen):
        row = pages.examples.row(latent)
        peak = float(pages.examples.score[row].max())
        hits = []
        for slot in pages.examples.of_latent(latent)[:samples]:
            values = pages.examples.values[row, slot]
            parts = pieces(pages.tokenizer, pages.examples.tokens[row, slot], values)
            hits.append(_spans([max(parts, key=lambda piece: piece.value)], peak))
        share = f"{100 * float(stats.density[latent]):.2g} %"
        out.append(
            f'<a href="#latent-{latent}"><span>{latent}</span><small>{share}</small>'
            f"<code>{' '.join(hits)}</code></a>"
        )
    return f'<nav aria-label="latents shown">{"".join(out)}</nav>'
