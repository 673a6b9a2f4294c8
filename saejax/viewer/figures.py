"""Figures as files: curves, density, and one picture of a whole run; alone uses matplotlib."""

from __future__ import annotations

import functools
import pathlib

import matplotlib
import numpy as np
from matplotlib import font_manager, ft2font, ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from saejax.viewer import charts, panels, report
from saejax.viewer.text import Piece, pieces, visible

PAPER, INK, SOFT, RULE, LINE, HOT = "#fcfcfa", "#1c1d20", "#686b73", "#e5e5e0", "#24507a", "#f08a14"
_MONO, _SANS = "DejaVu Sans Mono", "DejaVu Sans"
_ADVANCE = 0.602  # width of every glyph of DejaVu Sans Mono over the font size
_STYLE = {
    "font.family": _SANS, "font.size": 8.5, "text.color": INK, "text.parse_math": False,
    "axes.edgecolor": RULE, "axes.labelcolor": SOFT, "axes.facecolor": PAPER,
    "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": RULE,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "axes.titlelocation": "left", "axes.titlesize": 9, "axes.titleweight": "bold",
    "xtick.color": RULE, "ytick.color": RULE, "xtick.labelcolor": SOFT, "ytick.labelcolor": SOFT,
    "ytick.left": False, "figure.facecolor": PAPER, "savefig.facecolor": PAPER,
}  # fmt: skip


def write(folder: str | pathlib.Path, content: report.Content) -> list[pathlib.Path]:
    """Writes ``curves.png``, ``density.png`` and ``overview.png`` and returns their paths.

    Curves are left out when nothing was recorded; the overview leaves out what it lacks.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made = {"density": density(content), "overview": overview(content)}
    if any(report.points(content.curves, key) for key, _, _ in report.CURVES):
        made["curves"] = curves(content)
    written = []
    for name, figure in made.items():
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], dpi=160, metadata={"Software": None})
    return written


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def _styled(draw):
    @functools.wraps(draw)
    def inner(*args):
        with matplotlib.rc_context(_STYLE):
            return draw(*args)

    return inner


@_styled
def curves(content: report.Content) -> Figure:
    """The training curves side by side."""
    shown = [curve for curve in report.CURVES if report.points(content.curves, curve[0])]
    figure = _figure(3.1 * len(shown), 2.6)
    for axes, curve in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        _curve(axes, content, *curve)
    figure.tight_layout()
    return figure


@_styled
def density(content: report.Content) -> Figure:
    """The histogram of log density."""
    figure = _figure(4.6, 2.9)
    _histogram(figure.subplots(), content)
    figure.tight_layout()
    return figure


@_styled
def overview(content: report.Content) -> Figure:
    """Curves, density and a few latents on one page, as for the head of a README."""
    figure = _figure(12, 6.9)
    figure.text(0.025, 0.945, content.title, fontsize=15, weight="bold")
    figure.text(0.025, 0.908, _headline(content), fontsize=9.5, color=SOFT)
    grid = figure.add_gridspec(
        3, 2, left=0.055, right=0.985, top=0.85, bottom=0.065, hspace=0.75, wspace=0.1,
        width_ratios=(1, 2.9),
    )  # fmt: skip
    at = 0
    for curve in report.CURVES[:2]:
        if report.points(content.curves, curve[0]):
            _curve(figure.add_subplot(grid[at, 0]), content, *curve)
            at += 1
    _histogram(figure.add_subplot(grid[at, 0]), content)
    if content.pages is not None and len(content.pages.chosen):
        _concordance(figure.add_subplot(grid[:, 1]), content)
    return figure


def _headline(content: report.Content) -> str:
    found = [
        f"{label} {form.format(content.evaluation[key])}"
        for key, label, form, _ in panels.HEADLINE
        if key in content.evaluation
    ]
    return "held out:   " + "    ".join(found)


def _curve(axes: Axes, content: report.Content, key: str, title: str, y_format) -> None:
    x, y = zip(*charts.thin(report.points(content.curves, key)), strict=True)
    axes.plot(x, y, color=LINE, linewidth=1.4)
    axes.set_title(title)
    base = content.evaluation.get("baselines", {})
    if key == "nmse" and "pca_nmse" in base:
        axes.axhline(base["pca_nmse"], color=SOFT, linewidth=0.9, linestyle=(0, (4, 3)))
        label = f"PCA, {base['pca_components']} components {base['pca_nmse']:.3g}"
        spot = (1.0, base["pca_nmse"])
        axes.annotate(
            label, spot, xycoords=("axes fraction", "data"), xytext=(0, 3),
            textcoords="offset points", ha="right", fontsize=7.5,
        )  # fmt: skip
    axes.set_ylim(0, 1.08 * charts.headroom(max(y), y_format))
    axes.set_xlim(0, max(x[-1], 1))
    for axis, form in ((axes.xaxis, charts.number), (axes.yaxis, y_format)):
        axis.set_major_locator(ticker.MaxNLocator(4))
        axis.set_major_formatter(lambda value, _, form=form: form(value))
    axes.set_xlabel("tokens" if "tokens" in content.curves[0] else "step", loc="right")


def _histogram(axes: Axes, content: report.Content) -> None:
    histogram = content.evaluation["density_histogram"]
    edges, counts = charts.trim(histogram["log10_edges"], histogram["latents"])
    axes.bar(edges[:-1], counts, np.diff(edges) * 0.94, align="edge", color=LINE)
    axes.set_title("Latents by density")
    axes.set_xlim(edges[0], edges[-1])
    axes.xaxis.set_major_locator(ticker.MultipleLocator(1))
    axes.xaxis.set_major_formatter(lambda value, _: charts.power_of_ten(value))
    axes.yaxis.set_major_locator(ticker.MaxNLocator(4, integer=True))
    axes.yaxis.set_major_formatter(lambda value, _: charts.number(value))
    axes.set_xlabel("share of tokens a latent is active on", loc="right")


@functools.cache
def _drawable() -> frozenset[int]:
    return frozenset(ft2font.FT2Font(font_manager.findfont(_MONO)).get_charmap())


def _glyphs(text: str) -> str:
    """One drawable glyph per column: what the font lacks becomes a box."""
    return "".join(char if ord(char) in _drawable() else "□" for char in visible(text))


def _concordance(axes: Axes, content: report.Content, latents: int = 6, lines: int = 4) -> None:
    """A few latents' top contexts, aligned at the strongest token.

    Taken evenly, from dense to rare, out of those of the report that fill all the lines.
    """
    pages, size = content.pages, 7.6
    axes.set_axis_off()
    box = axes.get_window_extent()
    columns = box.width / axes.figure.dpi * 72 / (_ADVANCE * size)
    rows = latents * (lines + 1.6) - 0.6
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    full = [i for i in map(int, pages.chosen) if len(pages.examples.of_latent(i)) >= lines]
    picks = np.unique(np.linspace(0, len(full) - 1, min(latents, len(full))).round().astype(int))
    for number, pick in enumerate(picks):
        latent, top = full[pick], number * (lines + 1.6)
        share = panels.density(float(content.statistics.density[latent]))
        axes.text(0, top + 0.35, f"latent {latent}", weight="bold", va="center", fontsize=8.5)
        axes.text(14, top + 0.35, f"active on {share}", va="center", fontsize=8, color=SOFT)
        for slot in pages.examples.of_latent(latent)[:lines]:
            _kwic(axes, content, latent, slot, top + 1.45 + slot, columns, size)


def _kwic(
    axes: Axes, content: report.Content, latent: int, slot: int, y: float, columns: float,
    size: float,
) -> None:  # fmt: skip
    shown, row = content.pages.examples, content.pages.examples.row(latent)
    parts = pieces(content.pages.tokenizer, shown.tokens[row, slot], shown.values[row, slot])
    best = max(range(len(parts)), key=lambda i: parts[i].value)
    peak, middle = float(shown.score[row].max()), 0.38 * columns
    x = middle
    for piece in reversed(parts[:best]):
        x -= len(_glyphs(piece.text))
        if x < 0:
            break
        _draw(axes, piece, x, y, peak, size, False)
    x = middle
    for at, piece in enumerate(parts[best:]):
        width = len(_glyphs(piece.text))
        if x + width > columns:
            break
        _draw(axes, piece, x, y, peak, size, at == 0)
        x += width


def _draw(
    axes: Axes, piece: Piece, x: float, y: float, peak: float, size: float, strong: bool
) -> None:
    text = _glyphs(piece.text)
    if piece.value > 0:
        shade = 0.08 + 0.82 * piece.value / peak
        axes.add_patch(Rectangle((x, y - 0.48), len(text), 0.96, color=HOT, alpha=shade, lw=0))
    weight = "bold" if strong else "normal"
    faint = not piece.text.strip()
    axes.text(
        x, y, text, family=_MONO, fontsize=size, va="center_baseline", weight=weight,
        color=SOFT if faint and not strong else INK, parse_math=False,
    )  # fmt: skip
