"""The original's interface, on the grid of the original's own tests and then some."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jax_cosine_attn import (
    cosine_attention,
    flash_cosine_sim_attention,
    plain_cosine_sim_attention,
)

# The original allows 1e-1 in float16 and 1e-4 in float32.
TOLERANCE = {jnp.float16: 5e-3, jnp.float32: 1e-5}


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def inputs(batch, heads, i, j, dim, kv_heads, bias=None, seed=0):
    rng = np.random.default_rng(seed)
    kv = (batch, j, dim) if kv_heads == 1 else (batch, kv_heads, j, dim)
    q, k, v = (rng.normal(size=shape) for shape in ((batch, heads, i, dim), kv, kv))
    mask = rng.random((batch, j)) < 0.5
    mask[:, 0] = True
    bias = {
        None: None,
        "heads": rng.normal(size=(heads, i, j)),
        "batch": rng.normal(size=(batch, i, j)),
    }[bias]
    return q, k, v, mask, bias


@functools.partial(jax.jit, static_argnames=("attention", "causal", "over_batch"))
def out_and_gradients(attention, q, k, v, mask, bias, dout, causal, over_batch):
    def f(q, k, v, bias):
        return attention(
            q, k, v, mask, bias, causal=causal, attn_bias_batch_dim=over_batch
        )  # fmt: skip

    out, vjp = jax.vjp(f, q, k, v, bias)
    return out, *vjp(dout)


def check(case, dtype):
    """flash against plain, which gets the same rounded inputs in float32 at full precision."""
    length, dim, masking, bias, kv_heads = case
    i, j = length
    q, k, v, mask, bias_value = inputs(2, 4, i, j, dim, kv_heads, bias)
    q, k, v, bias_value = jax.tree.map(lambda x: jnp.asarray(x, dtype), (q, k, v, bias_value))
    mask = jnp.asarray(mask) if "mask" in masking else None
    dout = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), dtype)
    options = {"causal": "causal" in masking, "over_batch": bias == "batch"}
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), (q, k, v, bias_value, dout))
    actual = out_and_gradients(
        flash_cosine_sim_attention, q, k, v, mask, bias_value, dout, **options
    )
    expected = out_and_gradients(
        plain_cosine_sim_attention, *exact[:3], mask, exact[3], exact[4], **options
    )
    for name, x, y in zip(("out", "dq", "dk", "dv", "dbias"), actual, expected, strict=True):
        if y is None:
            continue
        assert x.dtype == dtype, name
        # The original compares absolute values of order one; gradients of keys and values sum
        # over the queries, so theirs is relative to the largest.
        tolerance = TOLERANCE[dtype] * max(1.0, float(jnp.abs(y).max()))
        np.testing.assert_allclose(x.astype(jnp.float32), y, rtol=0, atol=tolerance, err_msg=name)


GRID = {
    "length": [(63, 63), (127, 127), (63, 127)],
    "dim": [32, 64, 96, 128],
    "masking": ["none", "mask", "causal"],
    "bias": [None, "heads", "batch"],
    "kv_heads": [4, 1],
}


def name_of(case, dtype):
    (i, j), dim, masking, bias, kv_heads = case
    parts = [masking, jnp.dtype(dtype).name, f"T{i}-S{j}-H{dim}"]
    return "-".join(parts + [f"bias-{bias}"] * bool(bias) + ["single-kv"] * (kv_heads == 1))


def grid(cases, marks=()):
    return [
        pytest.param(case, dtype, id=name_of(case, dtype), marks=marks)
        for case in cases
        for dtype in TOLERANCE
    ]


FULL = list(itertools.product(*GRID.values()))
# A slice in which every value of the grid, and causal with a mask, meets every masking.
QUICK = [
    ((63, 63), 32, "none", None, 4),
    ((127, 127), 64, "none", "heads", 1),
    ((63, 127), 96, "none", "batch", 4),
    ((127, 127), 128, "mask", None, 1),
    ((63, 127), 64, "mask", "heads", 4),
    ((63, 63), 96, "mask", "batch", 1),
    ((63, 127), 128, "causal", None, 4),
    ((63, 63), 64, "causal", "heads", 1),
    ((127, 127), 32, "causal", "batch", 4),
    ((63, 127), 64, "causal-mask", None, 1),
    ((127, 127), 64, "causal-mask", "heads", 4),
]


@pytest.mark.parametrize(("case", "dtype"), grid(QUICK))
def test_original_grid(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize(("case", "dtype"), grid(FULL, pytest.mark.full))
def test_original_grid_in_full(case, dtype):
    check(case, dtype)


def test_plain_is_the_formula_in_float64():
    q, k, v, mask, bias = inputs(2, 4, 9, 14, 32, 1, "heads")
    with jax.enable_x64(True):
        out = plain_cosine_sim_attention(
            *map(jnp.asarray, (q, k, v, mask, bias)), scale=10, groups=4, causal=True
        )
    expected = oracle.attention(
        q.swapaxes(1, 2), k[:, :, None], v[:, :, None], bias[None], mask[:, None, None],
        scale=10, l2norm_groups=4, is_causal=True,
    )  # fmt: skip
    np.testing.assert_allclose(out, expected.out.swapaxes(1, 2), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "attention", [flash_cosine_sim_attention, plain_cosine_sim_attention], ids=["flash", "plain"]
)
class TestBoth:
    def test_same_as_cosine_attention(self, attention):
        q, k, v, mask, bias = (
            jnp.asarray(x, jnp.float32) for x in inputs(2, 4, 5, 7, 16, 2, "heads")
        )
        mask = mask.astype(bool)
        out = attention(q, k, v, mask, bias, scale=4, groups=2, causal=True, l2norm_qk=True)
        expected = cosine_attention(
            *(x.swapaxes(1, 2) for x in (q, k, v)),
            bias,
            mask[:, None, None],
            scale=4,
            l2norm_groups=2,
            is_causal=True,
        )
        np.testing.assert_allclose(out, expected.swapaxes(1, 2), rtol=1e-5, atol=1e-6)

    def test_merged_batch_and_heads(self, attention):
        """Everything leads with bh: as many entries with one head."""
        q, k, v, mask, bias = (
            jnp.asarray(x, jnp.float32) for x in inputs(6, 1, 5, 7, 16, 1, "batch")
        )
        mask = mask.astype(bool)
        merged = attention(q[:, 0], k, v, mask, bias)
        assert merged.shape == (6, 5, 16)
        apart = attention(q, k, v, mask, bias, attn_bias_batch_dim=True)
        np.testing.assert_allclose(merged, apart[:, 0], rtol=1e-6)

    def test_single_headed_keys_are_shared_by_all_heads(self, attention):
        q, k, v, mask, _ = (
            None if x is None else jnp.asarray(x) for x in inputs(2, 4, 5, 7, 16, 1)
        )
        repeated = (jnp.repeat(x[:, None], 4, axis=1) for x in (k, v))
        np.testing.assert_allclose(
            attention(q, k, v, mask), attention(q, *repeated, mask), rtol=1e-5, atol=1e-6
        )

    def test_l2norm_outside(self, attention):
        q, k, v, _, _ = inputs(2, 4, 5, 7, 16, 4)
        inside = attention(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)))
        q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
        outside = attention(
            *(jnp.asarray(x, jnp.float32) for x in (q, k, v)), l2norm_qk=False
        )  # fmt: skip
        np.testing.assert_allclose(outside, inside, rtol=1e-5, atol=1e-6)

    def test_learned_scale(self, attention):
        q, k, v, _, _ = (
            None if x is None else jnp.asarray(x, jnp.float32) for x in inputs(2, 4, 5, 7, 16, 4)
        )
        out = attention(q, k, v, scale=jnp.full(4, 10.0))
        np.testing.assert_allclose(out, attention(q, k, v, scale=10), rtol=1e-5, atol=1e-6)

    def test_defaults_are_those_of_the_original(self, attention):
        q, k, v, _, _ = (
            None if x is None else jnp.asarray(x, jnp.float32) for x in inputs(2, 4, 5, 7, 16, 4)
        )
        explicit = attention(q, k, v, None, None, 8, 1, False, True, False)
        np.testing.assert_array_equal(attention(q, k, v), explicit)

    def test_rows_before_the_first_key_are_zero(self, attention):
        """Causal with more queries than keys: bottom-right aligned."""
        q, k, v, _, _ = (
            None if x is None else jnp.asarray(x, jnp.float32) for x in inputs(1, 2, 7, 4, 16, 2)
        )
        out = attention(q, k, v, causal=True)
        assert not jnp.any(out[:, :, :3])
        np.testing.assert_allclose(out[:, :, 3], v[:, :, 0], rtol=1e-5)
