"""Arguments that the operations of a training step refuse, by name."""

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels as pk


def spec(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def weight_grads_to(totals):
    code = (spec(2, 3), spec(2, 3), spec(2, 3, dtype="int32"))
    return pk.weight_grads(*code, spec(2, 4), spec(2, 4), 8, totals=totals)


def row_update(w=None, mu=None, ema=None, copy_dtype=None, **scalars):
    """Of float32 matrices but for those named."""
    decay = {} if ema is None else {"ema_decay": 0.9}
    given = {"learning_rate": spec(), "step": spec(dtype="int32"), "scale": spec()} | scalars
    plain = spec(8, 4)
    return pk.row_update(
        *(w or plain, plain, mu or w or plain, w or plain, ema, pk.RowScalars(**given)),
        settings=pk.RowSettings(beta1=0.9, beta2=0.99, epsilon=1e-8, **decay),
        copy_dtype=copy_dtype,
    )


def row_update_with(mu=spec(8, 4), **changed):
    settings = pk.RowSettings(beta1=0.9, beta2=0.99, epsilon=1e-8)
    given = {"scalars": pk.RowScalars(0.1, 1, 1.0), "settings": settings} | changed
    return pk.row_update(spec(8, 4), spec(8, 4), mu, spec(8, 4), None, **given)


def rows(dtype="float32", **changed):
    return pk.Rows(*[spec(8, 4, dtype=dtype)] * 3, None)._replace(**changed)


def weight_grads_update(**changed):
    code = (spec(2, 3), spec(2, 3), spec(2, 3, dtype="int32"), spec(2, 4), spec(2, 4))
    settings = pk.RowSettings(beta1=0.9, beta2=0.99, epsilon=1e-8)
    given = {"dec": rows(), "enc": rows(), "scalars": pk.RowScalars(0.1, 1, 1.0)}
    given |= {"dec_settings": settings, "enc_settings": settings}
    return pk.weight_grads_update(*code, **given | changed)


def pairs(length, **changed):
    lists = (spec(length), *[spec(length, dtype="int32")] * 2, spec(dtype="int32"))
    return pk.pair_list.Pairs(*lists)._replace(**changed)


BAD = {
    "totals are a tuple": (
        lambda: weight_grads_to((spec(8, 4), spec(8, 4), spec(8))),
        r"weight_grads: totals is a tuple, but must be a WeightGrads of pallas_kernels",
    ),
    "pairs are a tuple": (
        lambda: pk.pair_list.decode(tuple(pairs(3)), spec(8, 4), 2),
        r"pair_list.decode: pairs is a tuple, but must be a Pairs of",
    ),
    "scalars are a float": (
        lambda: row_update_with(scalars=0.1),
        r"row_update: scalars is a float, but must be a RowScalars",
    ),
    "settings are a dict": (
        lambda: row_update_with(settings={"beta1": 0.9}),
        r"row_update: settings is a dict, but must be a RowSettings",
    ),
    "a moment is None": (
        lambda: row_update_with(mu=None),
        r"row_update: mu_LD is a NoneType, but must be an array",
    ),
    "weights of the encoder are None": (
        lambda: weight_grads_update(enc=rows(w_LD=None)),
        r"weight_grads_update: enc.w_LD is a NoneType, but must be an array",
    ),
    "no step": (
        lambda: row_update_with(scalars=pk.RowScalars(0.1, None, 1.0)),
        r"row_update: scalars.step = None must be a number",
    ),
    "a rate of text": (
        lambda: row_update_with(scalars=pk.RowScalars("a", 1, 1.0)),
        r"row_update: scalars.learning_rate = 'a' must be a number",
    ),
    "platform of block_tokens": (
        lambda: pk.block_tokens(8, platform="abc"),
        r"block_tokens: platform = 'abc' must be one of \['cpu'",
    ),
    "latents of block_tokens": (
        lambda: pk.block_tokens(0),
        r"block_tokens: n_latents = 0 must be a whole number of at least 1",
    ),
    "platform of dense_below": (
        lambda: pk.dense_below("abc"),
        r"dense_below: platform = 'abc' must be one of",
    ),
    "platform of in_two_stages": (
        lambda: pk.in_two_stages(8, 1, "abc"),
        r"in_two_stages: platform = 'abc' must be one of",
    ),
    "rows are a tuple": (
        lambda: weight_grads_update(dec=(spec(8, 4),) * 3),
        r"weight_grads_update: dec is a tuple, but must be a Rows",
    ),
    "settings of rows are a dict": (
        lambda: weight_grads_update(enc_settings={}),
        r"weight_grads_update: enc_settings is a dict, but must be a RowSettings",
    ),
    "k > n": (
        lambda: pk.topk_encode(spec(2, 4), spec(8, 4), spec(8), 9),
        r"topk_encode: k = 9 must be a whole number in \[1, 8\]",
    ),
    "negative k": (
        lambda: pk.topk_encode(spec(2, 4), spec(8, 4), spec(8), -1),
        r"topk_encode: k = -1 must",
    ),
    "width": (
        lambda: pk.topk_encode(spec(2, 4), spec(8, 5), spec(8), 1),
        r"topk_encode: w_LD has shape \[8, 5\], but must have \[\*, 4\]",
    ),
    "rank": (
        lambda: pk.decode_loss(spec(2, 3), spec(2, 3, dtype="int32"), spec(8), spec(2, 4)),
        r"decode_loss: w_LD has shape \[8\]",
    ),
    "code rank": (
        lambda: pk.decode_loss(spec(2), spec(2, dtype="int32"), spec(8, 4), spec(2, 4)),
        r"decode_loss: values_BK has shape \[2\], but must have \[\*, \*\]",
    ),
    "nothing kept": (
        lambda: pk.decode_loss(spec(2, 0), spec(2, 0, dtype="int32"), spec(8, 4), spec(2, 4)),
        r"decode_loss: values_BK has shape \[2, 0\], but must keep at least one per row",
    ),
    "no array": (lambda: pk.top_k([[1.0, 2.0]], 1), r"top_k: x_BL is a list, but must be an array"),
    "negative n": (
        lambda: pk.weight_grads(
            spec(2, 3), spec(2, 3), spec(2, 3, dtype="int32"), spec(2, 4), spec(2, 4), -4
        ),
        r"weight_grads: n = -4 must be a whole number of at least 1",
    ),
    "kept pairs": (
        lambda: pk.topk_encode(spec(2**22, 4), spec(512, 4), spec(512), 512),
        r"topk_encode: the result of 4194304 tokens and k = 512 has 2147483648 entries",
    ),
    "index dtype": (
        lambda: pk.decode_loss(spec(2, 3), spec(2, 3), spec(8, 4), spec(2, 4)),
        r"decode_loss: indices_BK has dtype float32, but must be one of int32",
    ),
    "dtype": (
        lambda: pk.topk_encode(spec(2, 4, dtype="float16"), spec(8, 4), spec(8), 1),
        r"topk_encode: x_BD has dtype float16, but must be one of bfloat16, float32, float64",
    ),
    "n * d": (
        lambda: pk.dense_sparse_matmul(
            spec(2, 3), spec(2, 3, dtype="int32"), spec(2**20, 2**11, dtype="bfloat16")
        ),
        r"w_LD of shape \[1048576, 2048\] has 2147483648 entries .* fewer than 2\*\*31",
    ),
    "n * d of a result": (
        lambda: pk.weight_grads(
            spec(2, 3), spec(2, 3), spec(2, 3, dtype="int32"), spec(2, 1024), spec(2, 1024), 2**21
        ),
        r"weight_grads: the result of shape \[2097152, 1024\] has 2147483648 .* than 2\*\*31",
    ),
    "n * d of pairs' result": (
        lambda: pk.weight_grads_of_pairs(
            pairs(6), spec(6), spec(2, 1024), spec(2, 1024), 2**21
        ),
        r"weight_grads_of_pairs: the result of shape \[2097152, 1024\] has 2147483648 entries",
    ),
    "n * d of one gradient": (
        lambda: pk.sparse_transpose_matmul(
            spec(2, 3), spec(2, 3, dtype="int32"), spec(2, 1024), 2**21
        ),
        r"sparse_transpose_matmul: the result of shape \[2097152, 1024\] has 2147483648 entries",
    ),
    "B * k": (
        lambda: pk.weight_grads(
            spec(2**26, 32), spec(2**26, 32), spec(2**26, 32, dtype="int32"), spec(2**26, 4),
            spec(2**26, 4), 8,
        ),
        r"weight_grads: values_BK of shape \[67108864, 32\] has 2147483648 entries",
    ),
    "totals": (
        lambda: pk.weight_grads(
            spec(2, 3), spec(2, 3), spec(2, 3, dtype="int32"), spec(2, 4), spec(2, 4), 8,
            totals=pk.WeightGrads(spec(8, 4), spec(7, 4), spec(8)),
        ),
        r"weight_grads: totals.w_enc_LD has shape \[7, 4\], but must have \[8, 4\]",
    ),
    "dtype of totals": (
        lambda: weight_grads_to(pk.WeightGrads(spec(8, 4), spec(8, 4, dtype="bfloat16"), spec(8))),
        r"weight_grads: totals.w_enc_LD has dtype bfloat16, but must be one of float32, float64",
    ),
    "dtype of a bias's totals": (
        lambda: pk.weight_grads_of_pairs(
            pairs(6), spec(6), spec(2, 4), spec(2, 4), 8,
            totals=pk.WeightGrads(spec(8, 4), spec(8, 4), spec(8, dtype="bfloat16")),
        ),
        r"weight_grads_of_pairs: totals.latent_bias_L has dtype bfloat16, but must be one of fl",
    ),
    "dtype of weights": (
        lambda: row_update(w=spec(8, 4, dtype="bfloat16")),
        r"row_update: w_LD has dtype bfloat16, but must be one of float32, float64",
    ),
    "dtypes of the state": (
        lambda: row_update(mu=spec(8, 4, dtype="float64")),
        r"row_update: mu_LD has dtype float64, but .* of one dtype, and the first is float32",
    ),
    "dtype of the average": (
        lambda: row_update(ema=spec(8, 4, dtype="bfloat16")),
        r"row_update: ema_LD has dtype bfloat16, but must be one of float32, float64",
    ),
    "dtype of one moment": (
        lambda: weight_grads_update(dec=rows(nu_LD=spec(8, 4, dtype="bfloat16"))),
        r"weight_grads_update: dec.nu_LD has dtype bfloat16, but must be one of float32, float64",
    ),
    "dtypes of both matrices": (
        lambda: weight_grads_update(enc=rows("float64")),
        r"weight_grads_update: enc.w_LD has dtype float64, but .* and the first is float32",
    ),
    "dtype of the copy": (
        lambda: row_update(copy_dtype="float16"),
        r"row_update: copy_dtype is float16, but must be one of bfloat16, float32, float64",
    ),
    "dtype of both copies": (
        lambda: weight_grads_update(copy_dtype=jnp.int8),
        r"weight_grads_update: copy_dtype is int8, but must be one of bfloat16, float32, float64",
    ),
    "dtype of the residual": (
        lambda: pk.decode_loss(
            spec(2, 3), spec(2, 3, dtype="int32"), spec(8, 4), spec(2, 4), residual_dtype="half a"
        ),
        r"decode_loss: residual_dtype is 'half a', but must be one of bfloat16, float32, float64",
    ),
    "a scalar's shape": (
        lambda: row_update(learning_rate=spec(8)),
        r"row_update: scalars.learning_rate has shape \[8\], but must have \[\]",
    ),
    "B * d of a result": (
        lambda: pk.dense_sparse_matmul(
            spec(2**20, 1), spec(2**20, 1, dtype="int32"), spec(10, 2**11)
        ),
        r"dense_sparse_matmul: the result of shape \[1048576, 2048\] has 2147483648 entries",
    ),
    "average": (
        lambda: pk.row_update(
            *[spec(8, 4)] * 4,
            None,
            pk.RowScalars(spec(), spec(dtype="int32"), spec()),
            settings=pk.RowSettings(beta1=0.9, beta2=0.99, epsilon=1e-8, ema_decay=0.9),
        ),
        r"row_update: ema_LD is None, but settings.ema_decay = 0.9",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    call, message = BAD[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


@pytest.mark.parametrize(
    "chosen, message",
    [
        (lambda: pk.preferring("mosaic"), r"implementation = 'mosaic' must .* 'mosaic_tpu', 'xla'"),
        (lambda: pk.target("xpu"), r"platform = 'xpu' must be one of \['cpu', 'gpu', 'cuda'"),
    ],
)
def test_wishes_that_nothing_can_meet(chosen, message):
    with pytest.raises(ValueError, match=message), chosen():
        pass
