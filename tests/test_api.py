"""The public surface: defaults, shapes and dtypes of results, static choices, installation."""

import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jax_cosine_attn
from jax_cosine_attn import _api, _ffi, cosine_attention, has_cuda_kernels, show_config, why_not
from jax_cosine_attn._validate import validate

ROOT = Path(__file__).resolve().parents[1]
B, T, S, N, K, H = 2, 5, 7, 4, 2, 8

everywhere = pytest.mark.parametrize(
    "implementation", ["xla", "reference", pytest.param("cuda", marks=pytest.mark.gpu)]
)


def qkv(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H))
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def described(**given):
    """What validation makes of a call with these options."""
    q, k, v = qkv()
    given = _api.arguments(**({"query": q, "key": k, "value": v} | given))
    return validate(layout="BTNH", **given)


# Results.


@everywhere
def test_mathematics(implementation):
    q, k, v = qkv()
    out, lse = cosine_attention(
        q, k, v, precision="highest", implementation=implementation, return_residual=True
    )
    expected = oracle.attention(q, k, v)
    close(out, expected.out)
    close(lse, expected.lse)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@everywhere
def test_dtypes_of_results(implementation, dtype):
    out, lse = cosine_attention(*qkv(dtype), implementation=implementation, return_residual=True)
    assert (out.shape, out.dtype) == ((B, T, N, H), dtype)
    assert (lse.shape, lse.dtype) == ((B, T, N), jnp.float32)
    only = cosine_attention(*qkv(dtype), implementation=implementation)
    # Two programs: a GPU may add up the same products in another order.
    eps = float(jnp.finfo(dtype).eps)
    only, out = (np.asarray(x, np.float64) for x in (only, out))
    np.testing.assert_allclose(only, out, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_float64_keeps_every_digit(implementation):
    """Of a Python scale too: 0.1 is not float32(0.1)."""
    with jax.enable_x64(True):
        q, k, v = qkv(jnp.float64)
        for scale in (0.1, np.full(N, 0.1), np.float64(0.1)):
            out, lse = cosine_attention(
                q, k, v, scale=scale, implementation=implementation, return_residual=True
            )
            assert out.dtype == lse.dtype == jnp.float64
            expected = oracle.attention(q, k, v, scale=0.1)
            close(out, expected.out, 1e-13)
            close(lse, expected.lse, 1e-13)


@everywhere
def test_one_entry_without_a_batch_dim(implementation):
    q, k, v = qkv()
    mask = jnp.arange(S) != 2
    lengths = jnp.asarray([4, 3], jnp.int32), jnp.asarray([6, 5], jnp.int32)
    options = {
        "is_causal": True,
        "precision": "highest",
        "implementation": implementation,
        "return_residual": True,
    }
    out, lse = cosine_attention(
        q, k, v, mask=mask, query_seq_lengths=lengths[0], key_value_seq_lengths=lengths[1],
        **options,
    )  # fmt: skip
    for b in range(B):
        for length in (lambda x, b=b: x[b], lambda x, b=b: int(x[b])):
            one, one_lse = cosine_attention(
                q[b], k[b], v[b], mask=mask, query_seq_lengths=length(lengths[0]),
                key_value_seq_lengths=length(lengths[1]), **options,
            )  # fmt: skip
            assert one.shape == (T, N, H)
            assert one_lse.shape == (T, N)
            close(one, out[b])
            close(one_lse, lse[b])


@everywhere
def test_one_entry_with_every_option(implementation):
    q, k, v = qkv()
    rng = np.random.default_rng(1)
    bias = jnp.asarray(rng.normal(size=(N, 1, S)), jnp.bfloat16)
    relative_bias = jnp.asarray(rng.normal(size=(1, T + S - 1)), jnp.float32)
    segments = jnp.asarray([0, 0, 1, 1, 1]), jnp.asarray([0, 0, 0, 1, 1, 1, 1])
    one, gradients = jax.value_and_grad(
        lambda q, bias, r: cosine_attention(
            q, k[0], v[0], bias, relative_bias=r, segment_ids=segments, local_window_size=(2, None),
            precision="highest", implementation=implementation,
        ).sum(),
        (0, 1, 2),
    )(q[0], bias, relative_bias)  # fmt: skip
    whole = oracle.attention(
        q[:1], k[:1], v[:1], bias[None], relative_bias=relative_bias,
        segment_ids=tuple(x[None] for x in segments), local_window_size=(2, None),
        dout=np.ones((1, T, N, H)),
    )  # fmt: skip
    close(one, whole.out.sum(), 1e-4)
    close(gradients[0], whole.dq[0])
    assert (gradients[1].shape, gradients[1].dtype) == ((N, 1, S), jnp.bfloat16)
    close(gradients[1].astype(jnp.float32), whole.dbias[0], 1e-2)
    close(gradients[2], whole.drelative_bias)


@pytest.mark.parametrize(
    "shape", [(), (S,), (T, 1), (N, 1, 1), (1, 1, T, S), (B, N, T, S), (B, 1, 1, 1)], ids=str
)
@everywhere
def test_bias_gradient_has_the_shape_that_was_given(implementation, shape):
    q, k, v = qkv()
    bias = jnp.asarray(np.random.default_rng(2).normal(size=shape), jnp.float32)
    dout = jnp.asarray(np.random.default_rng(3).normal(size=q.shape), jnp.float32)
    options = {"precision": "highest", "implementation": implementation}
    _, vjp = jax.vjp(lambda b: cosine_attention(q, k, v, b, **options), bias)
    (actual,) = vjp(dout)
    expected = oracle.attention(
        q, k, v, np.reshape(bias, (1,) * (4 - bias.ndim) + shape), dout=dout
    ).dbias
    assert actual.shape == shape
    close(actual, expected.reshape(shape))


@everywhere
def test_lengths_are_clamped(implementation):
    q, k, v = qkv()
    options = {"is_causal": True, "implementation": implementation, "precision": "highest"}
    out = cosine_attention(
        q, k, v,
        query_seq_lengths=jnp.asarray([99, -3], jnp.int32),
        key_value_seq_lengths=jnp.asarray([99, 5], jnp.int32),
        **options,
    )  # fmt: skip
    close(out[0], cosine_attention(q, k, v, **options)[0])
    assert not jnp.any(out[1])


@everywhere
def test_scale_in_all_its_forms(implementation):
    q, k, v = qkv()
    options = {"implementation": implementation, "precision": "highest", "scale_bound": 6.0}
    expected = cosine_attention(q, k, v, scale=6.0, **options)
    clamped = jnp.full(N, 7.5)
    for scale in (6, np.float32(6), jnp.float32(6), jnp.full(N, 6.0), np.full(N, 6.0), clamped):
        close(cosine_attention(q, k, v, scale=scale, **options), expected)
    close(
        cosine_attention(q, k, v, scale=jnp.full(N, -7.5), **options),
        cosine_attention(q, k, v, scale=-6.0, **options),
    )


@everywhere
def test_gradient_of_a_clamped_scale(implementation):
    """1 inside and at the bound, 0 beyond."""
    q, k, v = qkv()

    def f(scale, bound):
        out = cosine_attention(
            q, k, v, scale=scale, scale_bound=bound, implementation=implementation,
            precision="highest",
        )  # fmt: skip
        return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum()

    clamped = jax.grad(f)(jnp.asarray([3.0, -6.0, 6.0, 6.5]), 6.0)
    free = jax.grad(f)(jnp.asarray([3.0, -6.0, 6.0, 6.0]), 10.0)
    close(clamped[:3], free[:3])
    assert jnp.all(free != 0)
    assert clamped[3] == 0


@everywhere
def test_scalar_scale_collects_the_gradients_of_all_heads(implementation):
    q, k, v = qkv()

    def f(scale):
        out = cosine_attention(
            q, k, v, scale=scale, scale_bound=9.0, implementation=implementation
        )  # fmt: skip
        return jnp.sin(out).sum()

    close(jax.grad(f)(jnp.float32(4)), jax.grad(f)(jnp.full(N, 4.0)).sum(), 1e-4)


def test_numpy_inputs():
    arrays = [np.asarray(x) for x in qkv()]
    np.testing.assert_array_equal(cosine_attention(*arrays), cosine_attention(*qkv()))


def test_argument_order_is_that_of_jax_nn():
    ours = list(inspect.signature(cosine_attention).parameters)
    theirs = list(inspect.signature(jax.nn.dot_product_attention).parameters)
    assert ours[:5] == theirs[:5]


@everywhere
def test_same_as_jax_nn_on_normalised_inputs(implementation):
    q, k, v = qkv()
    mask = jnp.asarray(np.random.default_rng(4).random((B, 1, T, S)) < 0.7).at[..., 0].set(True)
    options = {"key_value_seq_lengths": jnp.asarray([7, 4], jnp.int32)}
    with jax.default_matmul_precision("highest"):
        ours = cosine_attention(q, k, v, None, mask, implementation=implementation, **options)
        q, k = jax_cosine_attn.l2norm_tensors(q, k)
        close(ours, jax.nn.dot_product_attention(q, k, v, None, mask, scale=8.0, **options))


# Static choices.


@pytest.mark.parametrize(
    ("precision", "resolved"),
    [
        (None, "default"),
        ("default", "default"),
        ("fastest", "default"),
        ("bfloat16", "default"),
        ("high", "high"),
        ("tensorfloat32", "high"),
        ("highest", "highest"),
        ("float32", "highest"),
        (jax.lax.Precision.HIGHEST, "highest"),
        (("default", "highest"), "highest"),
        ((None, jax.lax.Precision.HIGH), "high"),
        ("TF32_TF32_F32_X3", "highest"),
        (jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3, "highest"),
        ("BF16_BF16_F32", "default"),
    ],
)
def test_precision(precision, resolved):
    assert described(precision=precision)[1].config.precision == resolved


@pytest.mark.parametrize("setting", ["default", "high", "highest", "float32", "TF32_TF32_F32"])
def test_precision_none_follows_the_configuration(setting):
    with jax.default_matmul_precision(setting):
        follows = described()[1].config.precision
        assert described(precision="highest")[1].config.precision == "highest"
    assert follows == described(precision=setting)[1].config.precision


@pytest.mark.parametrize(
    ("implementation", "candidates"),
    [
        (None, ("cuda", "xla")),
        ("cuda", ("cuda",)),
        ("xla", ("xla",)),
        (["reference"], ("reference",)),
        (("xla", "cuda"), ("xla",)),
        (("cuda", "cuda", "reference", "xla"), ("cuda", "reference")),
    ],
)
def test_candidates(implementation, candidates):
    assert described(implementation=implementation)[1].candidates == candidates


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({}, 8.0),
        ({"scale": -3.0, "l2norm_groups": 4}, 12.0),
        ({"scale": 3.0, "scale_bound": 9.0}, 3.0),
        ({"scale": np.ones(N, np.float32), "scale_bound": 9.0, "l2norm_groups": 2}, 18.0),
        ({"scale": np.ones(N, np.float32)}, None),
    ],
)
def test_bound_of_the_logits(options, bound):
    assert described(**options)[1].config.bound == bound


@pytest.mark.parametrize(
    ("size", "window"),
    [
        (None, None),
        (3, (3, 3)),
        ((0, None), (0, None)),
        ([None, 2], (None, 2)),
        ((None,) * 2, None),
    ],
)
def test_window(size, window):
    assert described(local_window_size=size)[1].config.window == window


# Installation.


def test_version_is_that_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert jax_cosine_attn.__version__ == project["version"]


def test_public_names():
    names = {
        "cosine_attention", "flash_cosine_sim_attention", "plain_cosine_sim_attention", "l2norm",
        "l2norm_tensors", "merge_partials", "has_cuda_kernels", "show_config", "why_not",
    }  # fmt: skip
    for name in names:
        assert getattr(jax_cosine_attn, name).__doc__, name
    assert (Path(jax_cosine_attn.__file__).parent / "py.typed").exists()


def test_every_argument_is_documented():
    text = inspect.getdoc(cosine_attention)
    for name in inspect.signature(cosine_attention).parameters:
        assert f"\n  {name}: " in text, name


def test_import_needs_neither_flax_nor_devices():
    """A failing extension and a missing flax are no obstacle; no backend is started."""
    program = """
import sys
sys.modules["flax"] = None
sys.modules["jax_cosine_attn._cuda"] = None
import jax
jax.config.update("jax_platforms", "none")  # starting a backend would fail
import jax_cosine_attn
assert not jax_cosine_attn.has_cuda_kernels()
jax.config.update("jax_platforms", "cpu")
import jax.numpy as jnp
q = jnp.ones((1, 2, 1, 4))
assert jax_cosine_attn.cosine_attention(q, q, q).shape == q.shape
print(jax_cosine_attn.why_not("cuda", q, q, q))
"""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "the CUDA kernels are not available" in result.stdout


def test_show_config(capsys):
    config = show_config()
    printed = capsys.readouterr().out
    assert config["runtime"]["jax"] == jax.__version__
    assert len(config["runtime"]["devices"]) == len(jax.devices())
    assert jax.__version__ in printed
    assert (config["build"]["cuda_kernels"] == "available") is has_cuda_kernels()
    assert str(config["build"]["cuda_kernels"]) in printed


def test_an_old_runtime_refuses_newer_kernels(monkeypatch):
    class Extension:
        @staticmethod
        def build_info():
            return {"jaxlib": "99.1.0"}

        @staticmethod
        def registrations():
            raise AssertionError("must not register")

    monkeypatch.setitem(sys.modules, "jax_cosine_attn._cuda", Extension)
    _, problem = _ffi._load.__wrapped__()
    assert "built against jaxlib 99.1.0 and cannot run on the older jaxlib" in problem


def test_why_not_answers_from_shapes():
    q, k, v = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in qkv())
    assert why_not("xla", q, k, v, is_causal=True) is None
    assert (why_not("cuda", q, k, v) is None) is has_cuda_kernels()
    assert (why_not("cuda", q, k, v, deterministic=True) is None) is has_cuda_kernels()
