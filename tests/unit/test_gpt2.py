"""GPT-2: numbers of the `transformers` library, taps, and the tensors' names."""

import dataclasses
import functools
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.data import bpe_train
from saejax.subjects import base, gpt2

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "gpt2_parity.npz")
CONFIG = gpt2.GPT2Config.from_hf(
    {name.split()[1]: GOLDEN[name].item() for name in GOLDEN.files if name.startswith("config ")}
)
TENSORS = {name.split()[1]: GOLDEN[name] for name in GOLDEN.files if name.startswith("tensor ")}
PARAMS = gpt2.from_hf(TENSORS, CONFIG)
TOKENS = GOLDEN["tokens"]
APPLY = jax.jit(gpt2.apply, static_argnums=1)
TOLERANCE = 3e-5  # a wrong epsilon moves the logits by more, see the last test of parity


def random_params(cfg):
    rng = np.random.default_rng(0)
    shapes = gpt2.tensor_shapes(cfg).items()
    return gpt2.from_hf({k: 0.3 * rng.normal(size=s).astype(np.float32) for k, s in shapes}, cfg)


@functools.cache
def subject() -> base.Subject:
    cfg = gpt2.GPT2Config(
        vocab_size=300, n_positions=16, d_model=12, n_layers=3, n_heads=3, d_mlp=20
    )
    params = random_params(cfg)
    tokenizer = bpe_train.train(["the cat sat on the mat"] * 2, 270)
    return base.make_subject("tiny", cfg, params, tokenizer)


@functools.partial(jax.jit, static_argnums=1)
def everything(params, cfg, tokens):
    """All sites of one forward pass."""
    seen = {}
    gpt2.apply(params, cfg, tokens, lambda site, x: seen.setdefault(site, x))
    return seen


def random_tokens(shape=(2, 10), seed=0):
    return np.random.default_rng(seed).integers(0, 300, shape).astype(np.int32)


def test_logits_are_those_of_transformers():
    logits = APPLY(PARAMS, CONFIG, TOKENS)
    assert logits.dtype == jnp.float32 and logits.shape == GOLDEN["logits"].shape
    assert np.abs(logits - GOLDEN["logits"]).max() < TOLERANCE


def test_hidden_states_are_those_of_transformers():
    sites = ["0.resid_pre", "0.resid_post", "final"]  # the last hidden state is after ln_f
    seen = everything(PARAMS, CONFIG, TOKENS)
    for i, site in enumerate(sites):
        assert np.abs(seen[site] - GOLDEN[f"hidden {i}"]).max() < TOLERANCE, site


@pytest.mark.parametrize(
    "change", [{"epsilon": 1e-3}, {"activation": "gelu"}, {"n_heads": 4}], ids=str
)
def test_the_parity_test_would_notice(change):
    wrong = APPLY(PARAMS, dataclasses.replace(CONFIG, **change), TOKENS)
    assert np.abs(wrong - GOLDEN["logits"]).max() > TOLERANCE


def test_tensors_survive_the_way_there_and_back():
    out = gpt2.to_hf(PARAMS, CONFIG)
    assert set(out) == {f"transformer.{name}" for name in gpt2.tensor_shapes(CONFIG)}
    for name, value in out.items():
        np.testing.assert_array_equal(value, TENSORS[name.removeprefix("transformer.")])
    again = gpt2.GPT2Config.from_hf(CONFIG.to_hf())
    assert again == CONFIG


def test_an_untied_head_is_kept():
    cfg = dataclasses.replace(CONFIG, tied=False)
    params = random_params(cfg)
    out = gpt2.to_hf(params, cfg)
    assert out["lm_head.weight"].shape == (cfg.vocab_size, cfg.d_model)
    back = gpt2.from_hf(out, cfg)
    jax.tree.map(np.testing.assert_array_equal, back, jax.tree.map(np.asarray, params))
    logits = APPLY(params, cfg, TOKENS)
    tied = {k: v for k, v in params.items() if k != "head"}
    assert np.abs(logits - APPLY(tied, CONFIG, TOKENS)).max() > 0.01


def test_tensors_that_do_not_fit_are_named():
    broken = {name: value for name, value in TENSORS.items() if name != "h.1.ln_2.bias"}
    broken["h.0.mlp.c_fc.weight"] = broken["h.0.mlp.c_fc.weight"].T
    broken["h.7.odd"] = np.zeros(3)
    with pytest.raises(ValueError) as error:
        gpt2.from_hf(broken, CONFIG)
    for part in ("missing h.1.ln_2.bias", "unknown h.7.odd", "h.0.mlp.c_fc.weight has shape"):
        assert part in str(error.value)


def test_buffers_of_old_files_are_ignored():
    old = TENSORS | {"h.0.attn.bias": np.zeros((1, 1, 24, 24))}
    old["lm_head.weight"] = old["wte.weight"].copy()
    jax.tree.map(np.testing.assert_array_equal, gpt2.from_hf(old, CONFIG), PARAMS)
    old["lm_head.weight"][3, 2] += 1
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from the token embedding"):
        gpt2.from_hf(old, CONFIG)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"activation_function": "mish"}, "activation_function = 'mish'"),
        ({"activation_function": ["gelu"]}, r"config\.json: activation_function = \['gelu'\] is"),
        ({"activation_function": None}, "activation_function = None"),
        ({"n_head": 5}, "n_heads = 5 must divide"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"n_layer": None}, "n_layer"),
        ({"n_layer": 0}, "n_layers = 0"),
    ],
    ids=str,
)
def test_a_config_that_is_not_implemented_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        gpt2.GPT2Config.from_hf(CONFIG.to_hf() | change)


def test_no_token_sees_a_later_one():
    s, tokens = subject(), random_tokens((1, 8))

    def logits(probe):
        return s.apply(s.params, tokens, lambda site, x: x + probe if site == "embed" else x)[0]

    gradient = jax.jit(jax.grad(lambda probe, at: logits(probe)[at, 7]))
    probe = jnp.zeros((1, 8, s.d_model))
    influence = np.stack([np.abs(gradient(probe, at)[0]).sum(-1) for at in range(8)])
    assert (influence[np.triu_indices(8, 1)] == 0).all()
    assert (influence[np.tril_indices(8)] > 0).all()


def test_the_identity_tap_changes_no_bit():
    s, tokens = subject(), random_tokens()
    seen = []

    def tap(site, x):
        seen.append((site, x.shape[-1]))
        return x

    tapped = jax.jit(lambda p: s.apply(p, tokens, tap))(s.params)
    np.testing.assert_array_equal(tapped, APPLY(s.params, s.config, tokens), strict=True)
    assert [site for site, _ in seen] == s.sites()
    assert dict(seen) == {site: s.width(site) for site in s.sites()}
    assert s.width("1.mlp_hidden") == 20 and s.width("1.mlp_out") == s.d_model == 12
    assert (s.n_layers, s.max_context) == (3, 16)


def test_capture_equals_the_full_pass():
    s, tokens = subject(), random_tokens()
    full = everything(s.params, s.config, tokens)
    for site in ["embed", "0.attn_z", "1.resid_post", "2.mlp_hidden", "final"]:
        got = jax.jit(lambda p, site=site: s.capture(p, tokens, [site]))(s.params)
        np.testing.assert_allclose(got[site], full[site], rtol=1e-6, atol=1e-6)
    both = jax.eval_shape(lambda p: s.capture(p, tokens, ["2.attn_out", "0.resid_mid"]), s.params)
    assert sorted(both, reverse=True) == ["2.attn_out", "0.resid_mid"]


def test_capture_traces_nothing_after_the_site():
    s, tokens = subject(), random_tokens()

    def operations(site):
        return len(jax.make_jaxpr(lambda p: s.capture(p, tokens, [site]))(s.params).eqns)

    assert operations("embed") < operations("0.resid_post") < operations("1.resid_post")
    assert operations("1.resid_post") < operations("final")


def test_replacing_any_site_changes_the_logits():
    s, tokens = subject(), random_tokens()

    @jax.jit
    def logits(params, factors):
        return s.apply(params, tokens, lambda name, x: x * factors[name])

    ones = dict.fromkeys(s.sites(), 1.0)
    clean = logits(s.params, ones)
    for site in s.sites():
        assert np.abs(clean - logits(s.params, ones | {site: 0.5})).max() > 1e-6, site


def test_bfloat16_is_close_to_float32():
    s, tokens = subject(), random_tokens()
    low = jax.jit(lambda p: s.apply(p, tokens, dtype=jnp.bfloat16))(s.params)
    assert low.dtype == jnp.float32
    error = np.abs(low - APPLY(s.params, s.config, tokens)).max()
    assert 0 < error < 0.1
    captured = jax.eval_shape(
        lambda p: s.capture(p, tokens, ["1.resid_post"], jnp.bfloat16), s.params
    )
    assert captured["1.resid_post"].dtype == jnp.bfloat16


def test_wrong_sites_and_tokens_are_named():
    s = subject()
    with pytest.raises(ValueError, match=r"site = '1.residpost' .* nearest: 1.resid_post, "):
        s.check_site("1.residpost")
    with pytest.raises(ValueError, match=r"3\.resid_post"):
        s.capture(s.params, random_tokens(), ["3.resid_post"])
    with pytest.raises(ValueError, match="sites is empty"):
        s.capture(s.params, random_tokens(), [])
    with pytest.raises(ValueError, match=re.escape("token id 300 is outside the vocabulary")):
        s.check_tokens(np.array([[0, 300]]))
    s.check_tokens(np.array([[0, 299]]))
    with pytest.raises(ValueError, match="17 tokens is longer than the model's 16"):
        s.apply(s.params, random_tokens((1, 17)))


def test_a_tokenizer_larger_than_the_model_is_refused():
    s = subject()
    ids = s.tokenizer.vocab_size
    small = dataclasses.replace(s.config, vocab_size=ids - 1)
    message = f"tokenizer has {ids} ids, the model's vocab_size is {ids - 1}"
    with pytest.raises(ValueError, match=message):
        base.make_subject("x", small, s.params, s.tokenizer)


def test_special_ids_beyond_the_model_are_let_pass_if_they_begin_and_end_no_text():
    s = subject()
    plain = {"vocab_size": 301, "bos_id": 2, "eot_id": 1, "ids": lambda: list(range(301))}
    ours = types.SimpleNamespace(**plain, special_ids={1, 2, 300})
    assert base.make_subject("x", s.config, s.params, ours).tokenizer is ours
    message = "tokenizer has 301 ids, the model's vocab_size is 300"
    for change in ({"special_ids": {1, 2}}, {"bos_id": 300}, {"eot_id": 300}):
        wrong = types.SimpleNamespace(**plain | {"special_ids": {1, 2, 300}} | change)
        with pytest.raises(ValueError, match=message):
            base.make_subject("x", s.config, s.params, wrong)


def test_the_fingerprint_follows_weights_and_config():
    s = subject()
    nudged = jax.tree.map(jnp.asarray, s.params)
    nudged["layers"][1]["o"]["bias"] = nudged["layers"][1]["o"]["bias"].at[0].set(1e-9)
    prints = {
        base.fingerprint(s.config, s.params),
        base.fingerprint(s.config, nudged),
        base.fingerprint(dataclasses.replace(s.config, epsilon=1e-6), s.params),
    }
    assert len(prints) == 3 and s.fingerprint in prints
