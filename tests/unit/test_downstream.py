"""The subject's loss with the reconstruction put back, against a plain reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.data.bpe import END_OF_TEXT, Tokenizer, byte_symbols
from saejax.evals.downstream import DownstreamInputs, DownstreamState, downstream
from saejax.latents import effects
from saejax.mesh import MeshShape, make_mesh, tree_shardings
from saejax.model.normalizer import Normalizer
from saejax.model.sae import SAE, SAEConfig
from saejax.subjects import gpt2
from saejax.subjects.base import make_subject

WIDTH, LENGTH, SITE = 16, 12, "0.resid_post"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Perfect:
    """An autoencoder without error."""

    def encode(self, x):
        return x

    def decode(self, code):
        return code


@pytest.fixture(scope="module")
def subject():
    config = gpt2.GPT2Config(
        vocab_size=300, n_positions=LENGTH, d_model=WIDTH, n_layers=2, n_heads=2, d_mlp=32
    )
    tokenizer = Tokenizer({s: i for i, s in enumerate(byte_symbols())}, [], {END_OF_TEXT: 256})
    params = gpt2.init(jax.random.key(0), config)
    # Unit-scale embeddings: at the initial 0.02 every ablation looks alike.
    params["embed"] = jax.random.normal(jax.random.key(1), params["embed"].shape)
    return make_subject("tiny", config, params, tokenizer)


@pytest.fixture(scope="module")
def sae():
    w_dec = jax.random.normal(jax.random.key(2), (24, WIDTH))
    w_dec = w_dec / jnp.linalg.norm(w_dec, axis=1, keepdims=True)
    params = {"w_enc": w_dec, "w_dec": w_dec}
    params |= {"latent_bias": jnp.zeros(24), "pre_bias": jnp.zeros(WIDTH)}
    return SAE(SAEConfig(d_model=WIDTH, n_latents=24, k=3), params, Normalizer())


def contexts(count=23, seed=0):
    return np.random.default_rng(seed).integers(0, 257, (count, LENGTH)).astype(np.uint16)


def inputs(subject, tokens, **changes):
    mean = np.linspace(-1, 1, WIDTH)
    settings = {"contexts": [tokens], "site": SITE, "mean": mean, **changes}
    return DownstreamInputs(subject=subject, **settings)


def reference(subject, sae, tokens, mean, first):
    """Loss and KL per variant, without batches or jit, the logits in float64."""
    variants = {
        "clean": lambda x: x,
        "sae": lambda x: np.asarray(sae(x)),
        "zero": np.zeros_like,
        "mean": lambda x: np.broadcast_to(mean, x.shape),
    }
    logp = {}
    for name, change in variants.items():

        def tap(site, x, change=change):
            if site != SITE:
                return x
            return jnp.concatenate([x[:, :first], jnp.asarray(change(x[:, first:]), "f4")], axis=1)

        logits = subject.apply(subject.params, tokens.astype("i4"), tap)
        logits = np.asarray(logits, np.float64)[:, first:-1]
        logits -= logits.max(-1, keepdims=True)
        logp[name] = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    target = tokens[:, first + 1 :, None].astype(int)
    loss = {n: -np.take_along_axis(p, target, -1).mean() for n, p in logp.items()}
    clean = logp["clean"]
    kl = {n: (np.exp(clean) * (clean - p)).sum(-1).mean() for n, p in logp.items()}
    return loss, kl


@pytest.mark.parametrize("first", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_equals_the_reference(subject, sae, first):
    tokens = contexts()
    given = inputs(subject, tokens, first_position=first)
    found = downstream(sae, given, batch_contexts=8).compute()
    loss, kl = reference(subject, sae, tokens, given.mean, first)
    expected = {
        "ce_clean": loss["clean"],
        "delta_ce": loss["sae"] - loss["clean"],
        "delta_ce_zero_ablation": loss["zero"] - loss["clean"],
        "delta_ce_mean_ablation": loss["mean"] - loss["clean"],
        "kl": kl["sae"],
        "kl_zero_ablation": kl["zero"],
        "kl_mean_ablation": kl["mean"],
        "recovered_zero_ablation": (loss["zero"] - loss["sae"]) / (loss["zero"] - loss["clean"]),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert found["downstream_tokens"] == 23 * (LENGTH - 1 - first)
    differences = {round(found[f"delta_ce{kind}"], 4) for kind in ("", "_zero_ablation")}
    assert len(differences | {round(found["delta_ce_mean_ablation"], 4)}) == 3


def test_masked_positions_stay_clean_and_are_not_counted(subject, sae):
    tokens, first = contexts(9), 1
    mask = np.random.default_rng(4).random(tokens.shape) < 0.7
    mask[:, 6:] = np.arange(len(tokens))[:, None] % 3 > 0  # padding at the end of some
    mask[4] = False  # a context of which nothing is left
    blocks = [(tokens[:4], mask[:4]), (tokens[4:], mask[4:])]
    given = inputs(subject, tokens, contexts=blocks)
    found = downstream(sae, given, batch_contexts=4)

    def tap(site, x):
        if site != SITE:
            return x
        replaced = jnp.asarray(mask & (np.arange(LENGTH) >= first))[..., None]
        return jnp.where(replaced, jnp.asarray(sae(x), "f4"), x)

    def losses(tap):
        logits = np.asarray(subject.apply(subject.params, tokens.astype("i4"), tap), np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        target = tokens[:, 1:, None].astype(int)
        return -np.take_along_axis(logp[:, :-1], target, -1)[:, :, 0]

    counted = (mask[:, :-1] & mask[:, 1:])[:, first:]
    clean, ours = (losses(t)[:, first:][counted] for t in (lambda site, x: x, tap))
    assert found.predictions == counted.sum() and found.contexts == counted.any(1).sum() == 8
    assert found.compute()["ce_clean"] == pytest.approx(clean.mean(), rel=1e-4)
    assert found.compute()["delta_ce"] == pytest.approx((ours - clean).mean(), rel=1e-3, abs=1e-5)


def test_what_stands_in_the_padding_does_not_matter(subject, sae):
    tokens, length = contexts(9), np.arange(9) + 3
    mask = np.arange(LENGTH) < length[:, None]
    before = downstream(sae, inputs(subject, tokens, contexts=[(tokens, mask)])).compute()
    tokens[~mask] = 7
    after = downstream(sae, inputs(subject, tokens, contexts=[(tokens, mask)])).compute()
    assert after == pytest.approx(before, rel=1e-5)
    assert after["downstream_tokens"] == (length - 2).sum()


def test_a_perfect_reconstruction_costs_nothing(subject):
    found = downstream(Perfect(), inputs(subject, contexts())).compute()
    assert abs(found["delta_ce"]) < 1e-6 and abs(found["kl"]) < 1e-6
    assert found["recovered_zero_ablation"] == pytest.approx(1, abs=1e-5)
    assert found["kl_zero_ablation"] > 0.01


def test_does_not_depend_on_batches_or_blocks(subject, sae):
    tokens = contexts()
    whole = downstream(sae, inputs(subject, tokens), batch_contexts=23).compute()
    for batch, blocks in ((8, 4), (8, 23)):
        split = inputs(subject, tokens, contexts=np.array_split(tokens, blocks))
        found = downstream(sae, split, batch_contexts=batch).compute()
        assert found == pytest.approx(whole, rel=1e-4, abs=1e-6)
    some = downstream(sae, inputs(subject, tokens), batch_contexts=8, tokens=5 * LENGTH + 3)
    assert some.contexts == 5


def test_the_error_bar_is_that_of_the_mean_over_contexts():
    generator = np.random.default_rng(0)
    loss = generator.normal(size=(4, 40, 9))
    loss[2:] += 3
    delta = (loss[1] - loss[0]).mean(-1)
    parts = [DownstreamState.of(loss[:, a:b], 0 * loss[:, a:b]) for a, b in ((0, 7), (7, 40))]
    found = parts[0].merge(parts[1]).compute()
    assert found["delta_ce"] == pytest.approx(delta.mean())
    assert found["delta_ce_stderr"] == pytest.approx(delta.std(ddof=1) / 40**0.5)
    counted = np.zeros((40, 9), bool)
    counted[:, :6] = True
    counted[:20, 3:] = False  # contexts of unequal length: the ratio estimator
    found = DownstreamState.of(loss, 0 * loss, counted).compute()
    sums, counts = ((loss[1] - loss[0]) * counted).sum(1), counted.sum(1)
    mean = sums.sum() / counts.sum()
    residual = (sums - mean * counts) / counts.mean()
    assert found["delta_ce"] == pytest.approx(mean)
    assert found["delta_ce_stderr"] == pytest.approx(residual.std(ddof=1) / 40**0.5, rel=1e-6)


def test_refusals(subject, sae):
    with pytest.raises(ValueError, match="resid_post"):
        downstream(sae, inputs(subject, contexts(), site="0.resid_pots"))
    with pytest.raises(ValueError, match="context_length: 12; allowed: at least 13"):
        downstream(sae, inputs(subject, contexts(), first_position=11))
    with pytest.raises(ValueError, match="no context was evaluated"):
        downstream(sae, inputs(subject, contexts(), contexts=[])).compute()
    broken = {**subject.params, "embed": subject.params["embed"].at[0, 0].set(jnp.nan)}
    with pytest.raises(ValueError, match="NaN"):
        downstream(sae, inputs(dataclasses.replace(subject, params=broken), contexts()))


def test_direct_logits_are_the_derivative_through_norm_and_unembedding(subject):
    tokens = contexts(3).astype("i4")
    directions = np.random.default_rng(0).normal(size=(2, WIDTH))
    found = effects.direct_logits(subject, directions, tokens)

    def logits(step):
        def tap(site, x):
            return x + jnp.asarray(step, "f4") if site == "1.resid_post" else x

        return np.asarray(subject.apply(subject.params, tokens, tap), np.float64)

    for direction, row in zip(directions, found):
        slope = (logits(1e-2 * direction) - logits(-1e-2 * direction)).mean((0, 1)) / 2e-2
        np.testing.assert_allclose(row, slope - slope.mean(), atol=3e-3)
    raised, lowered = effects.extremes(found, 4)
    assert raised[0, 0] == found[0].argmax() and lowered[1, 0] == found[1].argmin()
    with pytest.raises(ValueError, match="width 15"):
        effects.direct_logits(subject, np.ones((1, 15)), tokens)


def test_subject_and_autoencoder_may_be_on_different_devices(subject, sae):
    """The same figures; neither has to know where the other is."""
    tokens = contexts()
    alone = downstream(sae, inputs(subject, tokens), batch_contexts=8).compute()
    params = {"w_enc": sae.w_enc[...], "w_dec": sae.w_dec[...]}
    params |= {"latent_bias": sae.latent_bias[...], "pre_bias": sae.pre_bias[...]}
    devices = jax.devices()
    for ours, theirs in ((slice(0, 4), slice(0, 1)), (slice(2, 4), slice(3, 5))):
        mesh = make_mesh(MeshShape(1, len(devices[ours])), devices[ours])
        placed = jax.tree.map(jax.device_put, params, tree_shardings(mesh, params))
        split = SAE(sae.config, placed, Normalizer(), mesh)
        other = subject.place(make_mesh(MeshShape(1, len(devices[theirs])), devices[theirs]))
        found = downstream(split, inputs(other, tokens), batch_contexts=8).compute()
        assert found == pytest.approx(alone, rel=1e-4)
