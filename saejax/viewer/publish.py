"""From a trained model and its evaluation to the report page and the figures."""

import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from saejax.evals.metrics import LatentStatistics
from saejax.latents import effects, summaries
from saejax.latents.summaries import ContextBlock
from saejax.model.sae import SAE
from saejax.subjects.base import Subject
from saejax.viewer import figures, report
from saejax.viewer.panels import LatentPages
from saejax.viewer.report import Content, ReportConfig

# Contexts at which the final norm is linearised for the direct effect on logits.
_EFFECT_CONTEXTS = 16


def publish(
    config: ReportConfig,
    sae: SAE,
    *,
    evaluation: Mapping[str, Any],
    metrics: pathlib.Path,
    statistics: LatentStatistics,
    contexts: Callable[[], Iterable[ContextBlock]] | None,
    documents: Sequence[str],
    subject: Subject | None,
    site: str | None,
    operative: str,
    page: pathlib.Path,
    folder: pathlib.Path,
) -> Content:
    """Writes the page and the figures of a run, and returns what they show.

    Args:
      config: what to show.
      sae: the trained model.
      evaluation: the figures of `evals.suite.evaluate`.
      metrics: metrics.jsonl of the run.
      statistics: per-latent statistics of the evaluated tokens.
      contexts: starts a pass over held-out contexts; None where there is no text.
      documents: names of the held-out documents.
      subject: the subject model, for tokens and logits; None leaves the latents out.
      site: where it was tapped.
      operative: the configuration as text.
      page: the HTML file to write.
      folder: where figures go.
    """
    pages = None
    if contexts is not None and subject is not None and config.latents:
        pages = _pages(config, sae, statistics, contexts, documents, subject, site)
    name = f"{sae.config.n_latents:,} latents, k = {sae.config.k}"
    where = "synthetic features" if site is None else site
    where = where if subject is None else f"{subject.name} {site}"
    content = Content(
        title=f"{name}: {where}",
        facts=_facts(sae, evaluation, where),
        evaluation=evaluation,
        curves=report.read_curves(metrics),
        statistics=statistics,
        pages=pages,
        config=operative,
    )
    report.write(page, content)
    figures.write(folder, content)
    return content


def _pages(config, sae, statistics, contexts, documents, subject, site) -> LatentPages | None:
    chosen = summaries.spread_over_density(statistics, config.latents, config.seed)
    if not len(chosen):
        return None  # nothing fired
    examples = summaries.top_examples(sae, contexts(), chosen, config.examples)
    raised = lowered = None
    if config.logit_tokens and _has_effects(subject, site):
        directions = np.asarray(sae.w_dec[...])[examples.latents]
        tokens = next(iter(contexts())).tokens[:_EFFECT_CONTEXTS]
        effect = effects.direct_logits(subject, directions, tokens)
        # A padded embedding has rows that are no token of the tokenizer and have no text; a
        # tokenizer may have special ids that the model lacks.
        known = np.array(subject.tokenizer.ids())
        known = known[known < effect.shape[1]]
        ends = effects.extremes(effect[:, known], config.logit_tokens)
        raised, lowered = (known[end] for end in ends)
    return LatentPages(
        chosen=chosen,
        examples=examples,
        tokenizer=subject.tokenizer,
        names=documents,
        raised=raised,
        lowered=lowered,
        seed=config.seed,
    )


def _has_effects(subject: Subject, site: str | None) -> bool:
    """Whether latents act on logits directly; a subject outside JAX has no logits here."""
    here = site is not None and isinstance(subject, Subject)
    return here and effects.writes_to_residual(subject, site)


def _facts(sae: SAE, evaluation: Mapping[str, Any], where: str) -> list[tuple[str, str]]:
    return [
        ("activations", f"{where}, {sae.config.d_model} wide"),
        ("input normalisation", sae.normalizer.kind),
        ("evaluated on", f"{evaluation['tokens']:,} held-out tokens"),
    ]
