"""The report: hostile text stays text, the page needs nothing, and it shows what was measured."""

import base64
import hashlib
import html.parser
import json
import re

import numpy as np
import pytest

from saejax.data.bpe import END_OF_TEXT, Tokenizer, byte_symbols
from saejax.evals.metrics import LatentStatistics
from saejax.latents.summaries import EMPTY, TopExamples
from saejax.viewer import charts, figures, panels, report
from saejax.viewer.panels import LatentPages
from saejax.viewer.text import markup, pieces, visible

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\"'><b onclick=x>&amp;&lt;",
    "abc\u202edcba\u2066\u200b\ufeff",
    "\x00\x01\x7f\x85\r\n\t",
    "Ünïcödé → 漢字 🙂 שלום e\u0301",
    "x" * 500,
    "        if self:\n",
    "$\\frac{a}{b}$ _x_ %s {0}",
    "</pre></details></style><!--",
]
LENGTH, LATENTS = 48, 30


def tokenizer(words=()):
    symbols = byte_symbols()
    vocab = {s: i for i, s in enumerate(symbols)}
    for word in words:
        vocab.setdefault("".join(symbols[b] for b in word.encode()), len(vocab))
    return Tokenizer(vocab, [], {END_OF_TEXT: len(vocab)})


def content(words=HOSTILE, names=("<b>&\u202e.py", "b.py"), **changes):
    generator = np.random.default_rng(0)
    tokens = tokenizer(words)
    chosen, top = np.array([3, 17, 8]), 4
    shape = (3, top)
    whole = list(range(256, tokens.vocab_size - 1))
    values = generator.random((*shape, LENGTH)).astype("f4") * (
        generator.random((*shape, LENGTH)) > 0.7
    )
    values[..., 0] = 0
    values[..., 1] = 2.0 - np.arange(top)[None] / 8
    examples = TopExamples(
        latents=np.sort(chosen),
        score=values.max(-1),
        ids=np.arange(12).reshape(shape),
        values=values,
        tokens=generator.choice(whole, (*shape, LENGTH)).astype(np.int64),
        document=generator.integers(0, 2, shape),
        offset=generator.integers(0, 5000, shape),
        contexts=77,
    )
    count = generator.integers(0, 400, LATENTS)
    count[:2] = 0
    stats = LatentStatistics(
        tokens=1000, count=count, total=0.5 * count, square=0.25 * count, peak=np.ones(LATENTS)
    )
    raised = generator.choice(whole, (3, 5))
    pages = LatentPages(
        chosen=chosen, examples=examples, tokenizer=tokens, names=names, raised=raised,
        lowered=raised[:, ::-1], seed=5,
    )  # fmt: skip
    evaluation = {
        "tokens": 1000, "nmse": 0.125, "explained_variance": 0.9, "l0": 4.0, "shrinkage": 0.97,
        "dead_fraction": 0.0625, "dense_fraction_1_percent": 0.5, "dense_fraction_10_percent": 0.1,
        "baselines": {"mean_nmse": 1.0, "pca_nmse": 0.375, "pca_components": 4},
        "density_histogram": stats.density_histogram(),
    }  # fmt: skip
    settings = {
        "title": "autoencoder of <x> & $y$",
        "facts": [("k", "4"), ("<i>", "</dd>")],
        "evaluation": evaluation,
        "curves": [{"step": i, "tokens": 10 * i, "nmse": 1 / i, "l0": 4.0} for i in range(1, 2000)],
        "statistics": stats,
        "pages": pages,
        "config": "</pre><script>",
    }
    return report.Content(**{**settings, **changes})


class Page(html.parser.HTMLParser):
    """Collects tags, attributes and the text of chosen elements; checks that tags are balanced."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.open, self.windows = set(), [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag == "pre":
            self.windows.append("")
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "pre" in self.open:
            self.windows[-1] += data


@pytest.fixture(scope="module")
def page():
    return report.render(content())


def test_the_page_runs_nothing_and_loads_nothing(page):
    seen = Page(page)
    assert seen.tags <= {
        "html", "head", "meta", "link", "title", "style", "body", "header", "main", "section", "h1",
        "h2", "h3", "p", "dl", "dt", "dd", "div", "strong", "span", "small", "figure", "figcaption",
        "table", "thead", "tbody", "tr", "th", "td", "svg", "path", "text", "circle", "rect", "nav",
        "a", "code", "b", "i", "em", "article", "details", "summary", "pre",
    }  # fmt: skip
    for tag, name, value in seen.attributes:
        assert not name.startswith("on") and name not in ("style", "src", "action"), (tag, name)
        if name == "href":
            assert value == "data:," or re.fullmatch(r"#latent-\d+", value)


def test_the_policy_forbids_everything_but_the_page_s_own_style(page):
    policy = next(v for t, n, v in Page(page).attributes if n == "content" and "default-src" in v)
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:"
    assert "url(" not in style and "@import" not in style and "</" not in style


def test_no_invisible_character_reaches_the_page(page):
    assert not re.search(
        r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]", page
    )


def test_every_window_is_shown_whole(page):
    shown = content()
    examples = shown.pages.examples
    windows = iter(Page(page).windows)
    for latent in shown.pages.chosen:
        for slot in range(4):
            ids = examples.tokens[examples.row(latent), slot]
            text = shown.pages.tokenizer.decode(ids)
            expected = "".join("↵\n" if c == "\n" else c if c == " " else visible(c) for c in text)
            assert next(windows) == expected
    assert next(windows) == shown.config


def test_a_bos_that_belongs_to_no_document_is_not_counted():
    pages = content().pages
    pages.examples.offset[:] = -1  # position 1, the strongest, is the document's first token
    said = panels._example(pages, 0, 0, 2.0)
    assert f"tokens 0 to {LENGTH - 2:,}, strongest at 0<" in said


def test_shading_is_relative_to_the_latent_s_strongest_token(page):
    card = page[page.index('<article id="latent-3"') :].split("</article>")[0]
    levels = re.findall(r'<b class="a(\d+)" title="([^"]+)"', card)
    assert len(levels) > 40
    for level, value in levels:  # the value is rounded to three digits, so allow that much
        assert int(level) - 1 - 1e-2 <= 10 * float(value) / 2 <= int(level) + 1e-2
    strongest = re.search(r'<em><b class="a(\d+)" title="2">', card)
    assert strongest and strongest[1] == "10"


def test_the_figures_on_the_page_are_those_of_the_evaluation(page):
    for text in ("0.125", "0.3750", "PCA, 4 components", "6.2%", "seed 5", "(of 77)", "28 of 30"):
        assert text in page, text
    assert page == report.render(content())


def test_a_page_without_text_or_curves_is_still_a_page():
    bare = content(pages=None, curves=[], config="")
    bare.evaluation["recovery"] = {"mmcs": 0.98765, "matched": 1.0}
    page = report.render(bare)
    Page(page)
    assert "0.9877" in page and "<article" not in page and "Training" not in page


def test_an_empty_slot_is_not_shown():
    shown = content()
    shown.pages.examples.ids[0, 2:] = EMPTY
    assert len(Page(report.render(shown)).windows) == 2 + 4 + 4 + 1


def test_tokens_that_share_a_character_are_one_piece():
    tokens = tokenizer()
    ids = list("é🙂a".encode())
    values = np.array([0, 1, 0, 0, 3, 0, 2.0])
    found = pieces(tokens, ids, values)
    assert [(p.text, p.start, p.stop, p.value) for p in found] == [
        ("é", 0, 2, 1), ("🙂", 2, 6, 3), ("a", 6, 7, 2),
    ]  # fmt: skip
    cut = pieces(tokens, list("é".encode())[1:] + list(b"b") + list("é".encode())[:1], np.zeros(3))
    assert [p.text for p in cut] == ["\ufffd", "b", "\ufffd"]


def test_whitespace_and_controls_are_visible():
    assert visible("a\n\tb  c") == "a↵⇥b··c" and visible(" ") == "·" and visible(" a") == " a"
    assert visible("x" + " " * 8) == "x⋯"
    assert visible("\u202e\x00\x85\ue000") == "⟨U+202E⟩␀⟨U+0085⟩⟨U+E000⟩"
    assert markup("<\n  x") == "&lt;<i>↵</i><i>··</i>x"
    assert markup("<\n  x", lines=True) == "&lt;<i>↵</i>\n  x"
    assert markup("é\u0301") == "é<i>◌\u0301</i>"


def test_figures_are_written_whatever_the_text(tmp_path):
    paths = figures.write(tmp_path / "figures", content())
    assert sorted(p.name for p in paths) == ["curves.png", "density.png", "overview.png"]
    for path in paths:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000
    bare = figures.write(tmp_path / "bare", content(pages=None, curves=[]))
    assert sorted(p.name for p in bare) == ["density.png", "overview.png"]


def test_curves_are_read_back_and_broken_lines_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "nmse": 0.5}\n{"step": 2, "nmse": NaN}\n{"step": 3}\n')
    assert report.points(report.read_curves(path), "nmse") == [(1, 0.5)]
    path.write_text(json.dumps({"step": 1}) + '\n{"st')
    with pytest.raises(ValueError, match="line 2"):
        report.read_curves(path)
    with pytest.raises(FileNotFoundError):
        report.read_curves(tmp_path / "nothing")


@pytest.mark.parametrize("low, high", [(0, 1), (0, 0.0007), (0, 3.2e6), (-0.4, 0.1), (0, 0)])
def test_ticks_are_round_and_span_the_data(low, high):
    found = charts.ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 7
    assert np.allclose(np.diff(found), found[1] - found[0])


def test_a_curve_that_stays_at_zero_has_a_sensible_axis():
    flat = charts.line([(1.0, 0.0), (9.0, 0.0)], title="", x_label="", y_format=charts.percent)
    assert ">10 %<" in flat and ">100 %<" not in flat and "e-" not in flat


def test_long_curves_are_thinned_and_keep_their_ends():
    points = [(float(i), 1.0) for i in range(10_000)]
    thin = charts.thin(points)
    assert len(thin) <= 402 and thin[0] == points[0] and thin[-1] == points[-1]


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"ReportConfig\.examples: 0"):
        report.ReportConfig(examples=0)
