"""The report: one self-contained HTML page, without scripts, network or anything to install."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import importlib.resources
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from saejax.evals.metrics import LatentStatistics
from saejax.viewer import charts, panels
from saejax.viewer.panels import LatentPages

# Curves shown, in order: key of metrics.jsonl, title, format of its values.
CURVES = (
    ("nmse", "Normalised MSE, training batches", charts.number),
    ("dead_fraction", "Dead latents", charts.percent),
    ("l0", "Active latents per token (L0)", charts.number),
    ("learning_rate", "Learning rate", charts.number),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What the report shows.

    Attributes:
      latents: latents shown with examples, one drawn from each quantile of density.
      examples: top activating contexts shown for each.
      logit_tokens: tokens listed as raised and as lowered by each latent's decoder direction.
      seed: seed of the draw.
    """

    latents: int = 36
    examples: int = 8
    logit_tokens: int = 8
    seed: int = 0

    def __post_init__(self):
        for name, least in (("latents", 0), ("examples", 1), ("logit_tokens", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"ReportConfig.{name}: {getattr(self, name)}; allowed: {least} or more; "
                    f"set {name} >= {least}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Content:
    """Everything a report shows.

    Attributes:
      title: what was trained on what, in a line.
      facts: pairs of label and value about the run.
      evaluation: the dictionary of ``evals.suite.evaluate``.
      curves: records of metrics.jsonl.
      statistics: per-latent statistics of the evaluated tokens.
      pages: the latents on show; None where there is no text (synthetic data).
      config: the operative configuration as text, folded away at the end.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    evaluation: Mapping[str, Any]
    curves: Sequence[Mapping[str, Any]]
    statistics: LatentStatistics
    pages: LatentPages | None = None
    config: str = ""


def read_curves(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """Reads the records of a metrics.jsonl.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a line that is no JSON object, by number.
    """
    records = []
    for number, text in enumerate(pathlib.Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: {error}; allowed: one JSON object") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: {text[:40]!r}; allowed: one JSON object")
        records.append(record)
    return records


def points(records: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """The finite ``(tokens or step, value)`` pairs of one metric; none where it is not recorded."""
    x_key = "tokens" if any("tokens" in record for record in records) else "step"
    found = [
        (record[x_key], record[key]) for record in records if key in record and x_key in record
    ]
    return [(float(x), float(y)) for x, y in found if math.isfinite(y)]


def write(path: str | pathlib.Path, content: Content) -> pathlib.Path:
    """Writes the page to ``path`` and returns it."""
    path = pathlib.Path(path)
    path.write_text(render(content), encoding="utf-8")
    return path


def render(content: Content) -> str:
    """The page as text; identical for identical content."""
    style = importlib.resources.files("saejax.viewer").joinpath("static/report.css").read_text()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:"
    title = html.escape(content.title)
    body = [
        f"<header><h1>{title}</h1>{panels.facts(content.facts)}</header>",
        f"<main>{panels.headline(content.evaluation)}",
        panels.comparisons(content.evaluation),
        _charts(content),
        _latents(content),
        _config(content.config),
        "</main>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer"><link rel="icon" href="data:,">\n'
        f"<title>{title}</title>\n<style>{style}</style></head>\n"
        f"<body>{chr(10).join(part for part in body if part)}</body></html>\n"
    )


def _figure(svg: str, title: str, note: str = "") -> str:
    note = f"<small>{html.escape(note)}</small>" if note else ""
    return f"<figure><figcaption>{html.escape(title)}{note}</figcaption>{svg}</figure>"


def _charts(content: Content) -> str:
    base, out = content.evaluation.get("baselines", {}), []
    x_label = "tokens" if any("tokens" in record for record in content.curves) else "step"
    for key, title, y_format in CURVES:
        found = points(content.curves, key)
        reference = None
        if key == "nmse" and "pca_nmse" in base:
            reference = (base["pca_nmse"], f"PCA, {base['pca_components']} components")
        if found:
            svg = charts.line(
                found, title=title, x_label=x_label, y_format=y_format, reference=reference
            )
            out.append(_figure(svg, title))
    if not out:
        return ""
    return f'<section><h2>Training</h2><div class="charts">{"".join(out)}</div></section>'


def _density(content: Content) -> str:
    histogram, stats = content.evaluation["density_histogram"], content.statistics
    svg = charts.histogram(
        histogram["log10_edges"],
        histogram["latents"],
        title="Latents by density",
        x_label="share of tokens on which a latent is active",
    )
    dead, total = int((stats.count == 0).sum()), stats.count.size
    note = f"{total - dead:,} of {total:,} latents fired; {dead:,} did not and are in no bar"
    return _figure(svg, "Latents by density", note)


def _latents(content: Content) -> str:
    density = f'<div class="charts">{_density(content)}</div>'
    pages = content.pages
    if pages is None or not len(pages.chosen):
        return f"<section><h2>Latents</h2>{density}</section>"
    stats = content.statistics
    intro = (
        f"<p>{len(pages.chosen)} of the {int((stats.count > 0).sum()):,} latents that fired on "
        f"held-out text, not picked by hand: ranked by density, cut into as many equal groups, "
        f"one drawn from each with seed {pages.seed}. Under each, the held-out contexts in which "
        f"it is strongest (of {pages.examples.contexts:,}), one line a context around the "
        "strongest token; shading runs from zero to the latent's largest value among them. "
        "Open a line for the whole window; point at a shaded token for its value."
    )
    if pages.raised is not None:
        intro += (
            " Raises and lowers: the tokens whose logits the decoder direction moves most "
            "directly, through the final norm and the unembedding; later layers are left out."
        )
    intro += "</p>"
    cards = [panels.card(pages, stats, int(latent)) for latent in pages.chosen]
    legend = "".join(f'<b class="a{level}"></b>' for level in range(1, panels.LEVELS + 1))
    legend = f'<p class="legend">0 {legend} strongest</p>'
    listing = panels.index(pages, stats)
    top = f'<div class="lead"><div>{intro}{legend}</div>{density}</div>'
    return f"<section><h2>Latents</h2>{top}{listing}</section>{''.join(cards)}"


def _config(text: str) -> str:
    if not text:
        return ""
    return f"<details><summary>Configuration</summary><pre>{html.escape(text)}</pre></details>"
