"""merge_partials: attention over disjoint key sets adds up to attention over all keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.test_util import check_grads
from yardstick import make_inputs

from jax_cosine_attn import cosine_attention, merge_partials

B, T, S, N, H = 2, 5, 12, 2, 8
SPLITS = [(12,), (5, 7), (1, 3, 8), (4, 0, 8)]

with_cuda = pytest.mark.parametrize(
    "implementation", ["xla", "reference", pytest.param("cuda", marks=pytest.mark.gpu)]
)


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((B, T, N, H), (B, S, N, H), (B, S, N, H))
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return q, k, v, rng.random((B, 1, 1, S)) < 0.6


def merged(q, k, v, mask, split, implementation):
    ends = np.cumsum(split)
    parts = [
        cosine_attention(
            q,
            k[:, start:end],
            v[:, start:end],
            mask=mask[..., start:end],
            precision="highest",
            implementation=implementation,
            return_residual=True,
        )
        for start, end in zip(ends - split, ends, strict=True)
    ]
    return merge_partials(*zip(*parts, strict=True))


@pytest.mark.parametrize("split", SPLITS, ids=str)
@with_cuda
def test_any_split_merges_to_the_whole(implementation, split):
    q, k, v, mask = inputs()
    mask[1, ..., :5] = False  # parts of entry 1 without a single key
    rng = np.random.default_rng(1)
    dout = rng.normal(size=(B, T, N, H)).astype(np.float32)
    dlse = rng.normal(size=(B, T, N)).astype(np.float32)

    @jax.jit
    def run(q, k, v):
        f = functools.partial(merged, mask=mask, split=split, implementation=implementation)
        results, vjp = jax.vjp(f, q, k, v)
        return results, vjp((dout, dlse))

    expected = oracle.attention(q, k, v, mask=mask, dout=dout, dlse=dlse)
    (out, lse), gradients = run(q, k, v)
    for actual, exact in [
        (out, expected.out),
        (lse, expected.lse),
        *zip(gradients, (expected.dq, expected.dk, expected.dv), strict=True),
    ]:
        np.testing.assert_allclose(actual, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("t", [1, 70])
@pytest.mark.parametrize(
    ("implementation", "h"),
    [
        ("xla", 16),
        *(pytest.param("cuda", h, marks=pytest.mark.gpu) for h in (20, 64, 128)),
    ],
)
def test_parts_of_16_bits_are_as_good_as_the_whole(implementation, h, t, dtype):
    """Of 1, 299, 0 and 400 keys, gradients through out and lse: in one call, and merged."""
    inputs = make_inputs(dtype, b=2, t=t, s=700, n=4, k=2, h=h)
    tensors = [inputs[x] for x in ("query", "key", "value")]
    mask = np.random.default_rng(2).random((2, 1, 1, 700)) < 0.6
    mask[0, ..., :1] = mask[1, ..., 300:] = False  # parts of an entry without a single key
    exact = oracle.attention(*tensors, mask=mask, dout=inputs["dout"], dlse=inputs["dlse"])

    @functools.partial(jax.jit, static_argnames="split")
    def run(tensors, split):
        f = functools.partial(merged, mask=mask, split=split, implementation=implementation)
        results, vjp = jax.vjp(f, *tensors)
        return *results, *vjp((jnp.asarray(inputs["dout"]), jnp.asarray(inputs["dlse"])))

    whole, parts = run(tensors, (700,)), run(tensors, (1, 299, 0, 400))
    ulp = float(jnp.finfo(dtype).eps)
    for name, of_whole, of_parts in zip(
        ("out", "lse", "dq", "dk", "dv"), whole, parts, strict=True
    ):
        wanted = getattr(exact, name)
        one, several = (
            np.abs(np.asarray(x, np.float64) - wanted).max() for x in (of_whole, of_parts)
        )
        assert several <= 2 * one + 4 * ulp * np.abs(wanted).max(), name


def partials(parts, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    outs = [jnp.asarray(rng.normal(size=(B, T, N, H)), dtype) for _ in range(parts)]
    lses = [jnp.asarray(rng.normal(size=(B, T, N)) * 5, jnp.float32) for _ in range(parts)]
    return outs, lses


def test_associative():
    outs, lses = partials(3)
    first = merge_partials(outs[:2], lses[:2])
    last = merge_partials(outs[1:], lses[1:])
    left = merge_partials((first[0], outs[2]), (first[1], lses[2]))
    right = merge_partials((outs[0], last[0]), (lses[0], last[1]))
    flat = merge_partials(outs, lses)
    for nested in (left, right):
        for actual, expected in zip(nested, flat, strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_one_part_is_itself():
    (out,), (lse,) = partials(1)
    merged_out, merged_lse = merge_partials([out], [lse])
    np.testing.assert_array_equal(merged_out, out)
    np.testing.assert_array_equal(merged_lse, lse)


def test_stacked_and_listed_parts_are_the_same():
    outs, lses = partials(3)
    stacked = merge_partials(jnp.stack(outs), jnp.stack(lses))
    for actual, expected in zip(stacked, merge_partials(outs, lses), strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("offset", [-1e30, -300.0, 300.0, 1e30])
def test_no_overflow_wherever_lse_lies(offset):
    outs, (a, b) = partials(2)
    out, lse = merge_partials(outs, [jnp.full_like(a, offset), jnp.full_like(b, offset)])
    np.testing.assert_allclose(out, (outs[0] + outs[1]) / 2, rtol=1e-6)
    np.testing.assert_allclose(lse, np.full(lse.shape, offset, np.float32), rtol=1e-2)


def test_accumulates_in_float32():
    outs, lses = partials(8, jnp.bfloat16)
    out, lse = merge_partials(outs, lses)
    assert out.dtype == jnp.bfloat16
    assert lse.dtype == jnp.float32
    exact, _ = merge_partials([x.astype(jnp.float32) for x in outs], lses)
    np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))


def test_float64():
    with jax.enable_x64(True):
        outs, lses = partials(2, jnp.float64)
        lses = [lse.astype(jnp.float64) for lse in lses]
        out, lse = merge_partials(outs, lses)
        weights = np.exp(np.stack(lses))
        assert out.dtype == lse.dtype == jnp.float64
        expected = (weights[..., None] * np.stack(outs)).sum(0) / weights.sum(0)[..., None]
        np.testing.assert_allclose(out, expected, rtol=1e-13)
        np.testing.assert_allclose(lse, np.log(weights.sum(0)), rtol=1e-13)


def test_no_nan_where_parts_are_dead():
    """Row 0 is dead in one part, row 1 in all; NaN in dead outs and cotangents stays there."""
    outs, lses = partials(2)
    lses = [lses[0].at[:, :2].set(-jnp.inf), lses[1].at[:, 1].set(-jnp.inf)]
    outs = [outs[0].at[:, :2].set(jnp.nan), outs[1].at[:, 1].set(jnp.nan)]
    (out, lse), vjp = jax.vjp(merge_partials, outs, lses)
    np.testing.assert_allclose(out[:, 0], outs[1][:, 0], rtol=1e-6)
    np.testing.assert_allclose(lse[:, 0], lses[1][:, 0], rtol=1e-6)
    assert not jnp.any(out[:, 1])
    assert jnp.all(lse[:, 1] == -jnp.inf)
    douts, dlses = vjp(
        (jnp.ones_like(out).at[:, 1].set(jnp.nan), jnp.ones_like(lse).at[:, 1].set(jnp.nan))
    )
    for gradient in (*douts, *dlses):
        assert jnp.all(jnp.isfinite(gradient))
        assert not jnp.any(gradient[:, 1])
    assert not jnp.any(douts[0][:, 0])
    assert not jnp.any(dlses[0][:, 0])
    np.testing.assert_allclose(dlses[1][:, 0], 1.0, rtol=1e-6)


def test_gradients():
    outs, lses = partials(3)

    def f(outs, lses):
        out, lse = merge_partials(outs, lses)
        return jnp.sin(out).sum() + jnp.cos(lse).sum()

    check_grads(f, (outs, lses), order=1, modes=("fwd", "rev"), rtol=2e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda outs, lses: ([], []), "as many outs as lses; got 0 and 0"),
        (lambda outs, lses: (outs, lses[:1]), "as many outs as lses; got 2 and 1"),
        (lambda outs, lses: (outs, [x.swapaxes(1, 2) for x in lses]), "every out must be"),
        (lambda outs, lses: ([outs[0], outs[1][:, :3]], lses), "every out must be"),
        (lambda outs, lses: ([outs[0], outs[1][:1]], [lses[0], lses[1][:1]]), "every out must be"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        merge_partials(*change(*partials(2)))


def test_integers_are_no_partials():
    outs, lses = partials(1)
    with pytest.raises(TypeError, match=r"must be floating point; got \['int32', 'float32'\]"):
        merge_partials([outs[0].astype(int)], lses)
