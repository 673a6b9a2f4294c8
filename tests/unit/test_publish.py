"""From an autoencoder, a subject and its contexts to the page and the figures."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.data.bpe import END_OF_TEXT, Tokenizer, byte_symbols
from saejax.evals import suite
from saejax.latents.summaries import ContextBlock
from saejax.model.normalizer import Normalizer
from saejax.model.sae import SAE, SAEConfig
from saejax.subjects import gpt2
from saejax.subjects.base import make_subject
from saejax.viewer import publish
from saejax.viewer.report import ReportConfig

WIDTH, LENGTH, LATENTS, COUNT = 16, 12, 40, 30


@pytest.fixture(scope="module")
def subject():
    # Three rows more than the tokenizer has tokens, as in models with a padded vocabulary.
    config = gpt2.GPT2Config(
        vocab_size=260, n_positions=LENGTH, d_model=WIDTH, n_layers=1, n_heads=2, d_mlp=16
    )
    tokenizer = Tokenizer({s: i for i, s in enumerate(byte_symbols())}, [], {END_OF_TEXT: 256})
    return make_subject("tiny", config, gpt2.init(jax.random.key(0), config), tokenizer)


@pytest.fixture(scope="module")
def sae():
    w = jax.random.normal(jax.random.key(2), (LATENTS, WIDTH))
    params = {"w_enc": w, "w_dec": w / jnp.linalg.norm(w, axis=1, keepdims=True)}
    params |= {"latent_bias": jnp.zeros(LATENTS), "pre_bias": jnp.zeros(WIDTH)}
    return SAE(SAEConfig(d_model=WIDTH, n_latents=LATENTS, k=3), params, Normalizer())


def published(tmp_path, sae, **changes):
    generator = np.random.default_rng(0)
    block = ContextBlock(
        rows=generator.normal(size=(COUNT, LENGTH - 1, WIDTH)).astype("f4"),
        tokens=generator.integers(32, 127, (COUNT, LENGTH)).astype("u4"),
        document=np.zeros(COUNT, "u4"),
        offset=np.arange(COUNT, dtype="u4") * LENGTH,
        ids=np.arange(COUNT),
    )
    evaluation, statistics = suite.evaluate(
        sae, lambda: [block.rows], suite.EvaluationConfig(batch_size=64)
    )
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(json.dumps({"step": 1, "tokens": 10, "nmse": 0.5}) + "\n")
    settings = {
        "evaluation": evaluation, "metrics": metrics, "statistics": statistics,
        "contexts": lambda: iter([block]), "documents": ("a.py",), "subject": None,
        "site": "0.resid_post", "operative": "SAE.k = 3", "page": tmp_path / "report.html",
        "folder": tmp_path / "figures", **changes,
    }  # fmt: skip
    return publish.publish(ReportConfig(latents=5, examples=3), sae, **settings)


def test_latents_of_a_language_model(tmp_path, sae, subject):
    content = published(tmp_path, sae, subject=subject)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<article") == 5 and page.count('class="ex"') == 15
    assert "a.py, tokens" in page and ">raises<" in page
    assert content.pages.raised.max() < 257 and content.pages.raised.shape == (5, 8)
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {
        "curves.png", "density.png", "overview.png",
    }  # fmt: skip


def test_a_site_outside_the_residual_stream_has_no_logit_effects(tmp_path, sae, subject):
    content = published(tmp_path, sae, subject=subject, site="0.mlp_act")
    assert content.pages.raised is None
    assert ">raises<" not in (tmp_path / "report.html").read_text()


def test_a_site_by_another_name_has_its_logit_effects(tmp_path, sae, subject):
    content = published(tmp_path, sae, subject=subject, site="blocks.0.hook_resid_post")
    assert content.pages.raised is not None


def test_a_subject_on_the_host_has_no_logit_effects(tmp_path, sae, subject):
    host = types.SimpleNamespace(name="torch:tiny", tokenizer=subject.tokenizer)
    content = published(tmp_path, sae, subject=host)
    assert content.pages.raised is None and len(content.pages.chosen) == 5


def test_special_tokens_that_the_model_lacks_are_never_shown(tmp_path, sae, subject):
    config = dataclasses.replace(subject.config, vocab_size=256)
    params = subject.params | {"embed": subject.params["embed"][:256]}
    symbols = {s: i for i, s in enumerate(byte_symbols())}
    tokenizer = Tokenizer(symbols, [], {END_OF_TEXT: 256})
    small = dataclasses.replace(subject, config=config, params=params, tokenizer=tokenizer)
    assert published(tmp_path, sae, subject=small).pages.raised.max() < 256


def test_without_a_subject_there_are_no_latent_pages(tmp_path, sae):
    content = published(tmp_path, sae, contexts=None, documents=(), site=None)
    assert content.pages is None and (tmp_path / "report.html").is_file()
