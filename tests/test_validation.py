"""Bad input: one clear error with the values in its text, the same for every implementation."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_cosine_attn
from jax_cosine_attn import cosine_attention, flash_cosine_sim_attention, why_not


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


def case(name, error, message, **arguments):
    return pytest.param(error, message, arguments, id=name)


Q, KV = (2, 5, 4, 8), (2, 7, 2, 8)  # B 2, T 5, S 7, N 4, K 2, H 8

BAD = [
    # Shapes of query, key and value.
    case(
        "rank-2",
        ValueError,
        "query must be [B, T, N, H] or [T, N, H]; got query (5, 8), key (2, 7, 2, 8)",
        query=zeros(5, 8),
    ),
    case(
        "rank-5",
        ValueError,
        "query must be [B, T, N, H] or [T, N, H]; got query (1, 2, 5, 4, 8)",
        query=zeros(1, *Q),
    ),
    case(
        "key-rank",
        ValueError,
        "key and value must be [B, S, K, H] or [S, K, H], of the rank of query; "
        "got query (2, 5, 4, 8), key (7, 2, 8), value (7, 2, 8)",
        key=zeros(7, 2, 8),
        value=zeros(7, 2, 8),
    ),
    case(
        "value-shape",
        ValueError,
        "key and value must have the same shape; "
        "got query (2, 5, 4, 8), key (2, 7, 2, 8), value (2, 6, 2, 8)",
        value=zeros(2, 6, 2, 8),
    ),
    case(
        "value-head-dim",
        ValueError,
        "key and value must have the same shape",
        value=zeros(2, 7, 2, 4),
    ),
    case(
        "batch",
        ValueError,
        "query and key must have the same batch (B=2 and 3); got query (2, 5, 4, 8), "
        "key (3, 7, 2, 8)",
        key=zeros(3, 7, 2, 8),
        value=zeros(3, 7, 2, 8),
    ),
    case(
        "batch-of-1-does-not-broadcast",
        ValueError,
        "query and key must have the same batch (B=2 and 1)",
        key=zeros(1, 7, 2, 8),
        value=zeros(1, 7, 2, 8),
    ),
    case(
        "head-dim",
        ValueError,
        "query and key must have the same head dim (H=16 and 8); got query (2, 5, 4, 16)",
        query=zeros(2, 5, 4, 16),
    ),
    case(
        "heads",
        ValueError,
        "query heads (N=6) must be a multiple of key heads (K=4); "
        "got query (2, 128, 6, 64), key (2, 128, 4, 64)",
        query=zeros(2, 128, 6, 64),
        key=zeros(2, 128, 4, 64),
        value=zeros(2, 128, 4, 64),
    ),
    case(
        "no-key-heads",
        ValueError,
        "query heads (N=4) must be a multiple of key heads (K=0)",
        key=zeros(2, 7, 0, 8),
        value=zeros(2, 7, 0, 8),
    ),
    case(
        "head-dim-257",
        ValueError,
        "head dim must be from 1 to 256, got H=257",
        query=zeros(1, 1, 1, 257),
        key=zeros(1, 1, 1, 257),
        value=zeros(1, 1, 1, 257),
    ),
    case(
        "head-dim-0",
        ValueError,
        "head dim must be from 1 to 256, got H=0",
        query=zeros(1, 1, 1, 0),
        key=zeros(1, 1, 1, 0),
        value=zeros(1, 1, 1, 0),
    ),
    case(
        "groups-divide-head-dim",
        ValueError,
        "head dim (H=8) must be a multiple of l2norm_groups=3",
        l2norm_groups=3,
    ),
    case("groups-0", ValueError, "l2norm_groups must be at least 1, got 0", l2norm_groups=0),
    case("groups-float", TypeError, "l2norm_groups must be an int, got 2.0", l2norm_groups=2.0),
    case("groups-bool", TypeError, "l2norm_groups must be an int, got True", l2norm_groups=True),
    # Dtypes of query, key and value.
    case(
        "integer",
        TypeError,
        "query must be float16 or bfloat16 or float32 or float64, got int32 of shape (2, 5, 4, 8)",
        query=zeros(*Q, dtype=jnp.int32),
    ),
    case("complex", TypeError, "value must be", value=zeros(*KV, dtype=jnp.complex64)),
    case("bool", TypeError, "key must be", key=zeros(*KV, dtype=bool)),
    case("float8", TypeError, "key must be", key=zeros(*KV, dtype=jnp.float8_e4m3fn)),
    case("object", TypeError, "query must be", query=np.zeros(Q, object)),
    case(
        "mixed",
        TypeError,
        "query, key and value must have the same dtype; "
        "got query float32, key bfloat16, value float32",
        key=zeros(*KV, dtype=jnp.bfloat16),
    ),
    case("list", TypeError, "query must be an array, got [1.0]", query=[1.0]),
    case("none", TypeError, "value must be an array, got None", value=None),
    # Bias, mask, relative bias.
    case(
        "bias-broadcast",
        ValueError,
        "bias must broadcast to [B, N, T, S] = (2, 4, 5, 7), got (3, 4, 5, 7)",
        bias=zeros(3, 4, 5, 7),
    ),
    case("bias-of-kv-heads", ValueError, "bias must broadcast to", bias=zeros(2, 2, 5, 7)),
    case("bias-rank", ValueError, "bias must broadcast to", bias=zeros(1, 1, 4, 5, 7)),
    case(
        "bias-dtype",
        TypeError,
        "bias must be float16 or bfloat16 or float32 or float64, got int32 of shape (1, 1, 5, 7)",
        bias=zeros(1, 1, 5, 7, dtype=jnp.int32),
    ),
    case("bias-bool", TypeError, "bias must be", bias=zeros(5, 7, dtype=bool)),
    case(
        "mask-broadcast",
        ValueError,
        "mask must broadcast to [B, N, T, S] = (2, 4, 5, 7), got (2, 7)",
        mask=zeros(2, 7, dtype=bool),
    ),
    case(
        "mask-dtype",
        TypeError,
        "mask must be bool, got float32 of shape (1, 1, 5, 7)",
        mask=zeros(1, 1, 5, 7),
    ),
    case(
        "relative-bias-length",
        ValueError,
        "relative_bias must be [N, T + S - 1] = (4, 11) or [1, T + S - 1] = (1, 11), got (4, 12)",
        relative_bias=zeros(4, 12),
    ),
    case(
        "relative-bias-heads",
        ValueError,
        "relative_bias must be [N, T + S - 1] = (4, 11)",
        relative_bias=zeros(2, 11),
    ),
    case(
        "relative-bias-dtype",
        TypeError,
        "relative_bias must be",
        relative_bias=zeros(4, 11, dtype=jnp.int32),
    ),
    # Lengths and segments.
    case(
        "query-lengths-shape",
        ValueError,
        "query_seq_lengths must be [B] = (2,), got (3,)",
        query_seq_lengths=zeros(3, dtype=jnp.int32),
    ),
    case(
        "key-lengths-shape",
        ValueError,
        "key_value_seq_lengths must be [B] = (2,), got ()",
        key_value_seq_lengths=7,
    ),
    case(
        "lengths-float",
        TypeError,
        "query_seq_lengths must be int32, got float32 of shape (2,)",
        query_seq_lengths=zeros(2),
    ),
    case(
        "lengths-int16",
        TypeError,
        "key_value_seq_lengths must be int32, got int16",
        key_value_seq_lengths=zeros(2, dtype=jnp.int16),
    ),
    case("lengths-list", TypeError, "must be an array, got [5, 5]", query_seq_lengths=[5, 5]),
    case(
        "segments-cross",
        ValueError,
        "one segment_ids array serves T == S only; got T=5, S=7",
        segment_ids=zeros(2, 5, dtype=jnp.int32),
    ),
    case(
        "segments-shape",
        ValueError,
        "segment_ids[1] must be [B, S] = (2, 7), got (2, 5)",
        segment_ids=(zeros(2, 5, dtype=jnp.int32), zeros(2, 5, dtype=jnp.int32)),
    ),
    case(
        "segments-dtype",
        TypeError,
        "segment_ids[0] must be int32, got float32",
        segment_ids=(zeros(2, 5), zeros(2, 7, dtype=jnp.int32)),
    ),
    case(
        "segments-triple",
        ValueError,
        "segment_ids must be one array or a (query, key) pair, got 3",
        segment_ids=(zeros(2, 5, dtype=jnp.int32),) * 3,
    ),
    # Windows and flags.
    case(
        "window-negative",
        ValueError,
        "local_window_size must be at least 0, got -1",
        local_window_size=-1,
    ),
    case("window-right", ValueError, "at least 0, got -2", local_window_size=(1, -2)),
    case("window-float", TypeError, "must be an int, got 1.5", local_window_size=1.5),
    case("window-bool", TypeError, "must be an int, got True", local_window_size=True),
    case(
        "window-triple",
        ValueError,
        "local_window_size must be an int or (left, right), got (1, 2, 3)",
        local_window_size=(1, 2, 3),
    ),
    case("causal-int", TypeError, "is_causal must be True or False, got 1", is_causal=1),
    case("l2norm-none", TypeError, "l2norm_qk must be True or False", l2norm_qk=None),
    case("deterministic", TypeError, "deterministic must be True or False", deterministic="yes"),
    case("residual", TypeError, "return_residual must be True or False", return_residual=2),
    # Scale.
    case("scale-inf", ValueError, "scale must be finite, got inf", scale=float("inf")),
    case("scale-nan", ValueError, "scale must be finite, got nan", scale=np.float32("nan")),
    case("scale-float16-inf", ValueError, "must be finite, got inf", scale=np.float16("inf")),
    case(
        "scale-array-inf", ValueError, "scale must be finite, got inf", scale=np.array(np.inf, "f")
    ),
    case("scale-huge-int", ValueError, "scale must be finite, got 1000", scale=10**400),
    case("scale-float32-range", ValueError, "scale must be finite, got 1e+39", scale=1e39),
    case("scale-text", TypeError, "scale must be a float or an array, got '8'", scale="8"),
    case("scale-none", TypeError, "scale must be a float or an array, got None", scale=None),
    case("scale-bool", TypeError, "scale must be a float or an array, got True", scale=True),
    case("scale-complex", TypeError, "scale must be", scale=1j),
    case(
        "scale-shape",
        ValueError,
        "an array scale must be [] or [N] = (4,), got (2,)",
        scale=zeros(2),
    ),
    case("scale-shape-1", ValueError, "an array scale must be [] or [N]", scale=zeros(1)),
    case(
        "scale-dtype",
        TypeError,
        "scale must be float32, got bfloat16 of shape (4,)",
        scale=zeros(4, dtype=jnp.bfloat16),
    ),
    case("scale-int-array", TypeError, "scale must be float32", scale=zeros(4, dtype=jnp.int32)),
    case(
        "scale-beyond-bound",
        ValueError,
        "scale=-12.0 lies beyond scale_bound=11.0",
        scale=-12.0,
        scale_bound=11.0,
    ),
    case("bound-0", ValueError, "scale_bound must be positive and finite, got 0", scale_bound=0),
    case("bound-negative", ValueError, "scale_bound must be positive", scale_bound=-1.0),
    case("bound-inf", ValueError, "scale_bound must be positive", scale_bound=float("inf")),
    case("bound-nan", ValueError, "scale_bound must be positive", scale_bound=float("nan")),
    case("bound-huge-int", ValueError, "scale_bound must be positive", scale_bound=10**400),
    case("bound-array", TypeError, "scale_bound must be a Python float", scale_bound=zeros()),
    # Precision.
    case("precision", ValueError, "precision must be None", precision="extreme"),
    case("precision-type", ValueError, "got 3", precision=3),
    case("precision-of-no-side", ValueError, "precision must be None", precision=()),
    case("precision-dict", ValueError, "got {}", precision={}),
]


@pytest.mark.parametrize("implementation", [None, "cuda", "xla", "reference"])
@pytest.mark.parametrize(("error", "message", "arguments"), BAD)
def test_bad_input(error, message, arguments, implementation):
    good = {"query": zeros(*Q), "key": zeros(*KV), "value": zeros(*KV)}
    with pytest.raises(error, match=re.escape(message)):
        cosine_attention(**(good | arguments), implementation=implementation)


@pytest.mark.parametrize(
    ("implementation", "error", "message"),
    [
        ("triton", ValueError, "got 'triton'"),
        ("", ValueError, "got ''"),
        (("cuda", "cudnn"), ValueError, "got ('cuda', 'cudnn')"),
        ((), ValueError, "got ()"),
        (3, TypeError, "implementation must be a name or a sequence of names, got 3"),
    ],
)
def test_unknown_implementation(implementation, error, message):
    with pytest.raises(error, match=re.escape(message)):
        cosine_attention(zeros(*Q), zeros(*KV), zeros(*KV), implementation=implementation)


def test_error_is_raised_while_tracing():
    traced = jax.jit(lambda q, k: cosine_attention(q, k, k))
    with pytest.raises(ValueError, match="same head dim"):
        traced.trace(zeros(1, 3, 2, 8), zeros(1, 3, 2, 4))


def test_traced_static_argument_is_an_error():
    with pytest.raises(TypeError, match="is_causal must be True or False"):
        jax.jit(lambda q, c: cosine_attention(q, q, q, is_causal=c))(zeros(1, 2, 2, 8), True)
    with pytest.raises(TypeError, match="scale_bound must be a Python float"):
        jax.jit(lambda q, b: cosine_attention(q, q, q, scale_bound=b))(zeros(1, 2, 2, 8), 8.0)


def test_single_entry_shapes():
    q, kv = zeros(5, 4, 8), zeros(7, 2, 8)
    with pytest.raises(ValueError, match=re.escape("mask must broadcast to [N, T, S] = (4, 5, 7)")):
        cosine_attention(q, kv, kv, mask=zeros(1, 4, 5, 7, dtype=bool))
    with pytest.raises(ValueError, match=re.escape("query_seq_lengths must be [] = (), got (1,)")):
        cosine_attention(q, kv, kv, query_seq_lengths=zeros(1, dtype=jnp.int32))
    with pytest.raises(ValueError, match=re.escape("segment_ids[0] must be [T] = (5,)")):
        cosine_attention(q, kv, kv, segment_ids=(zeros(1, 5, dtype=jnp.int32),) * 2)


def test_why_not_validates_like_the_call():
    with pytest.raises(ValueError, match="same head dim"):
        why_not("cuda", zeros(1, 3, 2, 8), zeros(1, 3, 2, 4), zeros(1, 3, 2, 4))
    with pytest.raises(TypeError, match="unexpected keyword"):
        why_not("xla", zeros(*Q), zeros(*KV), zeros(*KV), temperature=3.0)
    with pytest.raises(ValueError, match="implementation must be"):
        why_not("triton", zeros(*Q), zeros(*KV), zeros(*KV))


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("q must be [b, h, i, d] or [bh, i, d], got (4, 8)", {"q": zeros(4, 8)}),
        ("k must be [b, h, j, d] or [b, j, d], got (8,)", {"k": zeros(8)}),
        ("mask must be [b, j], got (2, 1, 1, 7)", {"mask": zeros(2, 1, 1, 7, dtype=bool)}),
        ("attn_bias must be [h, i, j], got (1, 4, 5, 7)", {"attn_bias": zeros(1, 4, 5, 7)}),
        (
            "attn_bias must be [b, i, j], got (5, 7)",
            {"attn_bias": zeros(5, 7), "attn_bias_batch_dim": True},
        ),
        ("bias must broadcast to [B, N, T, S] = (2, 4, 5, 7)", {"attn_bias": zeros(2, 5, 7)}),
        ("query heads (N=4) must be a multiple of key heads (K=3)", {"k": zeros(2, 3, 7, 8)}),
        ("head dim (H=8) must be a multiple of l2norm_groups=5", {"groups": 5}),
    ],
)
def test_bad_input_of_the_original_signature(message, arguments):
    good = {"q": zeros(2, 4, 5, 8), "k": zeros(2, 4, 7, 8)} | arguments
    good = {"v": good["k"]} | good
    with pytest.raises(ValueError, match=re.escape(message)):
        flash_cosine_sim_attention(**good)


def test_batch_dim_of_the_original_signature_is_a_flag():
    with pytest.raises(TypeError, match="attn_bias_batch_dim must be True or False, got 2"):
        flash_cosine_sim_attention(*[zeros(2, 4, 5, 8)] * 3, attn_bias_batch_dim=2)


def test_merged_heads_need_merged_keys():
    with pytest.raises(ValueError, match=re.escape("k must be [bh, j, d], got (2, 4, 7, 8)")):
        flash_cosine_sim_attention(zeros(8, 5, 8), zeros(2, 4, 7, 8), zeros(2, 4, 7, 8))


@pytest.mark.parametrize(
    "arguments",
    [
        {"scale": np.float32(3)},
        {"scale": np.float16(3)},
        {"scale": np.int64(-3)},
        {"scale": 0},
        {"scale": np.full(4, 3.0)},  # NumPy's default dtype, float32 inside JAX
        {"scale": 11.0, "scale_bound": 11},
        {"query_seq_lengths": np.array([3, 5])},
        {"is_causal": np.True_},
        {"local_window_size": (np.int64(2), None)},
        {"bias": np.zeros((5, 7)), "mask": np.ones(7, bool)},
        {"bias": zeros(4, 1, 1), "relative_bias": zeros(1, 11, dtype=jnp.bfloat16)},
        {"precision": jax.lax.Precision.HIGH},
        {"precision": ("highest", "default")},
        {"implementation": ["reference", "xla"]},
    ],
    ids=repr,
)
def test_good_input(arguments):
    out = jax.eval_shape(
        lambda: jax_cosine_attn.cosine_attention(zeros(*Q), zeros(*KV), zeros(*KV), **arguments)
    )
    assert (out.shape, out.dtype) == (Q, jnp.float32)
