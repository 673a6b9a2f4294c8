"""Sites, aliases, single heads, capture and edits of subjects of every kind."""

import dataclasses
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from saejax.subjects import base, decoder, hf, taps

FOLDER = pathlib.Path(__file__).parents[1] / "fixtures" / "subjects"
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.cache
def subject(case: str) -> base.Subject:
    return hf.load_subject(str(FOLDER / case), tokenizer=False)


def quick(function):
    """Compiled without the expensive passes, where no bit depends on them."""
    return jax.jit(function, compiler_options=QUICK)


def tokens(shape=(2, 9), seed=0):
    return np.random.default_rng(seed).integers(0, 61, shape).astype(np.int32)


@functools.cache
def clean(case: str):
    """Logits and all sites of one forward pass."""
    s = subject(case)
    run = quick(lambda p, t: s.logits_and_capture(p, t, s.sites()))
    logits, sites = run(s.params, tokens())
    return np.asarray(logits), {site: np.asarray(x) for site, x in sites.items()}


ALIASES = [
    ("1.mlp_act", "1.mlp_hidden"),
    ("1.mlp_post_act", "1.mlp_hidden"),
    ("0.resid_delta_attn", "0.attn_out"),
    ("0.resid_post_attn", "0.resid_mid"),
    ("1.resid_delta_mlp", "1.mlp_out"),
    ("1.resid_post_mlp", "1.resid_post"),
    ("blocks.1.hook_resid_post", "1.resid_post"),
    ("blocks.0.hook_mlp_out", "0.mlp_out"),
    ("blocks.0.mlp.hook_post", "0.mlp_hidden"),
    ("blocks.1.attn.hook_z", "1.attn_z"),
    ("1.attn_z.3", "1.attn_z.3"),
    ("0.resid_pre", "0.resid_pre"),
    ("embed", "embed"),
    ("final", "final"),
]


@pytest.mark.parametrize("alias, canonical", ALIASES)
def test_other_names_of_a_site_are_understood(alias, canonical):
    s = subject("llama")
    assert s.resolve_site(alias) == canonical
    assert s.width(alias) == s.width(canonical)
    s.check_site(alias)


@pytest.mark.parametrize(
    "case, site, message",
    [
        ("llama", "2.resid_post", "no layer 2; its layers are 0 .. 1"),
        ("llama", "-1.resid_post", "does not exist"),
        ("llama", "01.resid_post", "does not exist"),
        ("llama", "1.attn_z.4", "no head 4; its heads are 0 .. 3"),
        ("llama", "1.mlp_out.0", "only attn_z has heads"),
        ("llama", "blocks.0.resid_post", "does not exist"),
        ("llama", "0.hook_resid_post", "does not exist"),
        ("llama", "resid_post", "existing: embed, final, and for each layer L of 0 .. 1 L.resid_"),
        ("llama", "", "nearest"),
        ("pythia", "0.resid_mid", "blocks run in parallel, so there is no residual stream between"),
        ("pythia", "0.resid_post_attn", "sites of a layer: resid_pre, attn_z, attn_out, mlp_hid"),
    ],
)
def test_what_does_not_exist_is_named(case, site, message):
    with pytest.raises(ValueError, match=f"site = {re.escape(repr(site))}.*{re.escape(message)}"):
        subject(case).check_site(site)


def test_sites_and_widths_follow_the_model():
    assert "0.resid_mid" not in subject("pythia").sites()
    assert "0.resid_mid" in subject("neox_sequential").sites()
    s = subject("qwen3")
    widths = {site: s.width(site) for site in ("0.attn_z", "1.mlp_hidden", "0.attn_z.2", "final")}
    assert widths == {"0.attn_z": 40, "1.mlp_hidden": 36, "0.attn_z.2": 10, "final": 28}
    assert (s.d_model, s.n_layers, s.max_context, s.vocab_size) == (28, 2, 64, 83)
    for case in ("gemma2", "pythia"):
        assert {n: x.shape[-1] for n, x in clean(case)[1].items()} == {
            n: subject(case).width(n) for n in subject(case).sites()
        }


def test_many_sites_from_one_forward_pass_under_the_names_asked_for():
    s, names = subject("qwen3"), ["1.attn_z.2", "0.mlp_act", "1.attn_z", "embed", "1.attn_z.0"]
    traced = []

    def run(params, t):
        traced.append(1)
        return s.capture(params, t, names)

    got = quick(run)(s.params, tokens())
    _, sites = clean("qwen3")
    assert set(got) == set(names) and traced == [1]
    np.testing.assert_allclose(got["1.attn_z.2"], sites["1.attn_z"][..., 20:30], atol=2e-5)
    np.testing.assert_allclose(got["1.attn_z.0"], sites["1.attn_z"][..., :10], atol=2e-5)
    np.testing.assert_allclose(got["0.mlp_act"], sites["0.mlp_hidden"], atol=2e-5)


def test_captured_on_the_host():
    s, t = subject("pythia"), tokens()
    got = s.capture_host(t, ["1.resid_post"], np.array([9, 4]))
    assert isinstance(got["1.resid_post"], np.ndarray)
    np.testing.assert_allclose(got["1.resid_post"], clean("pythia")[1]["1.resid_post"], atol=2e-5)
    assert list(s.capture_host(t, ["final", "0.mlp_act"])) == ["final", "0.mlp_act"]
    assert s.capture_host(t, ["1.attn_z.1"], dtype=jnp.bfloat16)["1.attn_z.1"].shape == (2, 9, 16)
    with pytest.raises(ValueError, match="token id 83 is outside the vocabulary"):
        s.capture_host(np.array([[83]]), ["embed"])


@pytest.mark.parametrize("case", ["pythia", "gemma2"])
def test_the_identity_edit_changes_no_bit(case):
    s = subject(case)
    edits = {site: lambda x: x for site in [*s.sites(), "0.attn_z.1"]}
    logits = jax.jit(lambda p, t: s.apply(p, t, edits=edits))(s.params, tokens())
    plain = jax.jit(lambda p, t: s.apply(p, t))(s.params, tokens())
    np.testing.assert_array_equal(logits, plain)


@pytest.mark.parametrize("case", ["pythia", "gemma2"])
def test_replacing_any_site_changes_the_logits(case):
    s = subject(case)
    logits, sites = clean(case)

    @quick
    def edited(params, mirrored):
        """Each site as it is, or with its dimensions in reverse."""

        def edit(site):
            return lambda x: x + mirrored[site] * (x[..., ::-1] - x)

        return s.apply(params, tokens(), edits={site: edit(site) for site in sites})

    as_is = dict.fromkeys(sites, 0.0)
    np.testing.assert_allclose(edited(s.params, as_is), logits, atol=2e-5)
    for site in sites:
        assert np.abs(edited(s.params, as_is | {site: 1.0}) - logits).max() > 0.01, site


def test_putting_back_what_was_captured_changes_nothing():
    s, (logits, sites) = subject("gemma2"), clean("gemma2")

    @quick
    def patched(params, values):
        return s.apply(params, tokens(), edits={n: taps.replace(x) for n, x in values.items()})

    np.testing.assert_allclose(patched(s.params, sites), logits, atol=2e-5)
    shifted = sites | {"final": sites["final"] + 1.0}
    assert np.abs(patched(s.params, shifted) - logits).max() > 0.01


def test_an_edit_of_one_head_leaves_the_others():
    s = subject("qwen3")
    _, sites = clean("qwen3")
    edits = {"1.attn_z.2": taps.replace(0.0), "blocks.0.hook_mlp_out": taps.add(jnp.ones(28), 2.0)}

    def run(params, t):
        return s.capture(params, t, ["1.attn_z", "1.attn_z.2", "0.mlp_out"], edits=edits)

    got = quick(run)(s.params, tokens())
    assert not got["1.attn_z.2"].any() and not got["1.attn_z"][..., 20:30].any()
    assert got["1.attn_z"][..., :20].any() and got["1.attn_z"][..., 30:].any()
    np.testing.assert_allclose(got["0.mlp_out"], sites["0.mlp_out"] + 2, atol=1e-5)


def test_a_patch_touches_only_what_the_mask_names():
    s = subject("llama")
    _, sites = clean("llama")
    where = np.arange(9) == 5
    got = quick(
        lambda p: s.capture(
            p, tokens(), ["0.resid_post", "1.resid_post"],
            edits={"0.resid_post": taps.patch(jnp.zeros(28), where)},
        )
    )(s.params)  # fmt: skip
    assert not got["0.resid_post"][:, 5].any()
    for site in got:
        moved = np.abs(got[site] - sites[site]).max(axis=(0, 2)) > 1e-4
        later = where if site.startswith("0.") else np.arange(9) >= 5
        np.testing.assert_array_equal(moved, later)


def test_taps_see_what_edits_leave():
    s = subject("llama")

    @quick
    def run(params):
        seen = {}
        tap = lambda site, x: seen.setdefault(site, x)  # noqa: E731
        s.apply(params, tokens(), tap, edits={"0.mlp_act": lambda x: x * 0})
        return seen

    seen = run(s.params)
    assert not seen["0.mlp_hidden"].any() and seen["1.mlp_hidden"].any()


def test_edits_that_do_not_fit_are_refused():
    s = subject("llama")

    def run(edits, dtype=jnp.float32):
        return jax.eval_shape(lambda p: s.apply(p, tokens(), dtype=dtype, edits=edits), s.params)

    with pytest.raises(ValueError, match=r"'1.attn_z.0' returns shape \(2, 9\), must be \(2, 9, 1"):
        run({"1.attn_z.0": lambda x: x[..., 0]})
    with pytest.raises(ValueError, match=r"'0.mlp_act' and '0.mlp_hidden' are the same site"):
        run({"0.mlp_act": lambda x: x, "0.mlp_hidden": lambda x: x})
    with pytest.raises(ValueError, match="no layer 7"):
        run({"7.mlp_act": lambda x: x})
    kinds = []
    watch = {"0.resid_pre": lambda x: x + jnp.ones(28, jnp.float32)[None, None]}
    watch["1.resid_post"] = lambda x: kinds.append(x.dtype) or x
    run(watch, jnp.bfloat16)
    assert kinds == [jnp.bfloat16], "an edit in float32 does not widen the pass"


@pytest.mark.parametrize("case", ["gpt2", "gemma2"])
def test_gradients_through_an_edit_are_finite_differences(case):
    """In float64 from end to end: a part in float32 would show as an error of 1e-7 / step."""
    s, step = subject(case), 1e-5
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), s.params)
        weight = np.random.default_rng(1).normal(size=(1, 9, s.vocab_size))

        def loss(probes):
            edits = {site: taps.add(probe) for site, probe in probes.items()}
            logits = s.apply(params, tokens((1, 9)), dtype=jnp.float64, edits=edits)
            assert logits.dtype == jnp.float64
            return (jax.nn.log_softmax(logits) * weight).sum()

        sites = ["embed", "0.attn_z.1", "0.mlp_hidden", "1.attn_out", "1.resid_post", "final"]
        zeros = {site: jnp.zeros((1, 9, s.width(site))) for site in sites}
        gradient, loss = quick(jax.grad(loss))(zeros), quick(loss)
        rng = np.random.default_rng(2)
        for site in sites:
            towards = rng.normal(size=zeros[site].shape)
            ends = [loss(zeros | {site: sign * step * towards}) for sign in (1, -1)]
            difference = (ends[0] - ends[1]) / (2 * step)
            exact = (gradient[site] * towards).sum()
            assert abs(difference - exact) < 1e-7 * max(1.0, abs(exact)), site


def test_right_padding_changes_nothing_before_it():
    for case in ("gpt2", "gemma2"):
        s, rows = subject(case), tokens((2, 14))
        rows[1, :9] = rows[0, :9]
        run = quick(lambda p, t, s=s: s.apply(p, t))
        logits = np.asarray(run(s.params, rows))
        np.testing.assert_allclose(logits[0, :9], logits[1, :9], atol=2e-5)


def test_decoders_that_cannot_be_are_refused():
    cfg = subject("gemma2").config
    for change, message in [
        ({"n_kv_heads": 3}, "n_kv_heads = 3 must divide"),
        ({"activation": "mish"}, "activation = 'mish'"),
        ({"norm": "batch"}, "norm = 'batch'"),
        ({"windows": (3,)}, "windows must have an entry for each layer"),
        ({"windows": (0, None)}, "must be at least 1"),
        ({"d_mlp": 0}, "d_mlp = 0"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            dataclasses.replace(cfg, **change)
    with pytest.raises(ValueError, match="65 tokens is longer than the model's 64"):
        decoder.apply(subject("gemma2").params, cfg, tokens((1, 65)))


def products(jaxpr):
    """The precision of every matrix product, inner functions' and loops' too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation.params["precision"]
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner)


@pytest.mark.parametrize("case", ["gpt2", "gemma2", "pythia"])
def test_float32_is_that_on_accelerators_too(case):
    """By default a GPU would multiply in TF32, a TPU in bfloat16."""
    s, highest = subject(case), (jax.lax.Precision.HIGHEST,) * 2
    direction = np.ones((s.d_model, s.d_model), np.float32)
    last = s.sites()[-1]

    def found(dtype, edits=None):
        traced = jax.make_jaxpr(lambda p, t: s.capture(p, t, (last,), dtype, edits=edits))
        return list(products(traced(s.params, tokens()).jaxpr))

    plain = found(jnp.float32)
    assert len(plain) >= 6 * s.n_layers and set(plain) == {highest}
    logits = jax.make_jaxpr(lambda p, t: jax.grad(lambda p: s.apply(p, t).sum())(p))
    assert set(products(logits(s.params, tokens()).jaxpr)) == {highest}
    assert set(found(jnp.bfloat16)) == {None}
    # what an edit computes is the caller's choice
    edits = {"0.resid_post": lambda x: x @ direction}
    assert set(found(jnp.float32, edits)) == {highest, None}
    with jax.default_matmul_precision("high"):
        high = (jax.lax.Precision.HIGH,) * 2
        assert set(found(jnp.float32, edits)) == {highest, high}


def test_full_precision_changes_no_bit_on_a_cpu():
    s = subject("gpt2")
    plain = jax.jit(lambda p, t: decoder.apply(p, s.config.decoder, t))
    ours = jax.jit(lambda p, t: s.apply(p, t))
    np.testing.assert_array_equal(*(np.asarray(f(s.params, tokens())) for f in (plain, ours)))
