"""examples/position_bias.py: each bias as a relative bias against the matrix that it stands for.

Output and gradients, those of the bias's own parameters included, are held to the yardstick: the
exact ones are of the plain formula in float64 with the full [B, N, T, S] bias, and the error may be
twice that of the same formula in float32, plus 4 ulp of the largest value, in the mean over several
calls where one misses. A wrong distance, or a gradient that goes to the neighbouring entry, is off
by a thousand times as much.
"""

import functools
import itertools
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from yardstick import few_on_a_cpu, hold, make_inputs

from jax_cosine_attn import cosine_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import position_bias
from position_bias import alibi, alibi_slopes, distances, dynamic, init_dynamic, t5, t5_buckets

pytestmark = pytest.mark.usefixtures("exact_products")
HEADS = 4
rng = np.random.default_rng(0)
BIASES = {
    "alibi": (alibi, alibi_slopes(HEADS)),
    "t5": (t5, rng.standard_normal((HEADS, 32)).astype(np.float32)),
    "t5-bidirectional": (
        functools.partial(t5, bidirectional=True),
        rng.standard_normal((HEADS, 32)).astype(np.float32),
    ),
    "dynamic": (dynamic, init_dynamic(jax.random.key(0), HEADS)),
}
# T, S and further options.
CALLS = {
    "square": (150, 150, {}),
    "square-causal": (150, 150, {"is_causal": True}),
    "fewer-queries": (61, 150, {}),
    "fewer-queries-causal": (61, 150, {"is_causal": True}),
    "more-queries-causal": (150, 61, {"is_causal": True}),
    "one-query": (1, 300, {}),
    "lengths-causal": (
        70, 150,
        {"query_seq_lengths": (61, 9), "key_value_seq_lengths": (40, 150), "is_causal": True},
    ),
}  # fmt: skip


def matrix(t, s, query_seq_lengths=None, key_value_seq_lengths=None):
    """The distance of every pair, [B, T, S]: the last query stands at the last key."""
    t_b = np.array([t, t]) if query_seq_lengths is None else query_seq_lengths
    s_b = np.array([s, s]) if key_value_seq_lengths is None else key_value_seq_lengths
    return np.arange(t)[:, None] - np.arange(s) + (s_b - t_b)[:, None, None]


@functools.partial(jax.jit, static_argnames=("name", "static"))
def attend(tensors, values, arrays, dout, name, static):
    """Output, and gradients of q, k, v and of the bias, which is passed as argument `name`."""

    def attention(tensors, values):
        return cosine_attention(
            *tensors, **{name: values}, **arrays, **dict(static), precision="highest"
        )

    out, vjp = jax.vjp(attention, tensors, values)
    return out, *vjp(dout)


def results(bias, params, inputs, distance, arrays, **static):
    """Output and gradients of q, k, v and of every parameter of the bias, by name. A distance for
    each pair makes a full bias, one for each entry a relative bias.
    """
    tensors, dout = tuple(inputs[x] for x in ("query", "key", "value")), inputs["dout"]
    # Outside of `attend`, which is then compiled once for all biases.
    values, vjp = jax.vjp(lambda params: bias(params, distance), params)
    name, static = "relative_bias", tuple(static.items())
    if distance.ndim == 3:
        name, values = "bias", jnp.moveaxis(values, 0, 1)
    out, tensor_grads, grads = attend(tensors, values, arrays, dout, name, static)
    if distance.ndim == 3:
        grads = jnp.moveaxis(grads, 1, 0)
    found = {"out": out} | dict(zip(("dq", "dk", "dv"), tensor_grads, strict=True))
    (grads,) = vjp(grads)
    found |= {
        f"d{jax.tree_util.keystr(path) or 'params'}": x
        for path, x in jax.tree_util.tree_leaves_with_path(grads)
    }
    return {key: np.asarray(x) for key, x in found.items()}


@functools.cache
def with_full_bias(name, case, seed):
    """(inputs, lengths, results in float64, results in float32) of the plain formula."""
    bias, params = BIASES[name]
    t, s, options = CALLS[case]
    inputs = make_inputs(np.float32, t=t, s=s, n=HEADS, k=2, seed=seed)
    lengths = {x: np.array(y, np.int32) for x, y in options.items() if x != "is_causal"}
    pairs = matrix(t, s, **lengths)
    static = {"implementation": "reference", "is_causal": "is_causal" in options}
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (params, inputs))
        exact = results(bias, *wide, pairs, lengths, **static)
    return inputs, lengths, exact, results(bias, params, inputs, pairs, lengths, **static)


@pytest.mark.parametrize(
    "implementation, case, name", few_on_a_cpu(itertools.product(CALLS, BIASES), every=3)
)
def test_equals_the_full_bias(implementation, name, case):
    bias, params = BIASES[name]
    t, s, options = CALLS[case]

    def errors_of(seed):
        inputs, lengths, exact, yard = with_full_bias(name, case, seed)
        ours = results(
            bias, params, inputs, distances(t, s), lengths,
            implementation=implementation, is_causal="is_causal" in options,
        )  # fmt: skip
        assert ours.keys() == exact.keys() == yard.keys()
        assert len(ours) == 4 + len(jax.tree.leaves(params))
        found = {}
        for key, wanted in exact.items():
            assert wanted.dtype == np.float64
            assert wanted.any(), key
            error, of_plain = (np.abs(x[key].astype(np.float64) - wanted) for x in (ours, yard))
            assert np.isfinite(error).all(), key
            found[key] = error, of_plain, wanted
        return found

    hold(errors_of, np.float32)


def test_alibi_slopes():
    of_eight = 2.0 ** -np.arange(1, 9)
    np.testing.assert_array_equal(alibi_slopes(8), of_eight)
    of_twelve = [*of_eight, *2.0 ** -np.array([0.5, 1.5, 2.5, 3.5])]
    np.testing.assert_allclose(alibi_slopes(12), of_twelve, rtol=1e-7)


@pytest.mark.parametrize(
    ("buckets", "farthest", "bidirectional"),
    [(32, 128, False), (32, 128, True), (64, 1000, False), (8, 20, True)],
)
def test_t5_buckets(buckets, farthest, bidirectional):
    """The published formula in double precision, with a hair added for exact powers."""

    def bucket(distance):
        each = buckets // 2 if bidirectional else buckets
        first = each if bidirectional and distance < 0 else 0
        back = abs(distance) if bidirectional else max(distance, 0)
        exact = each // 2
        if back < exact:
            return first + back
        octaves = math.log(back / exact) / math.log(farthest / exact)
        return first + min(each - 1, exact + int(octaves * (each - exact) + 1e-9))

    reach = np.arange(-3 * farthest, 3 * farthest)
    found = t5_buckets(reach, buckets=buckets, farthest=farthest, bidirectional=bidirectional)
    np.testing.assert_array_equal(found, [bucket(int(x)) for x in reach])


def test_script(capsys):
    """Without positions the latest of several writes cannot be told from the earlier ones."""
    losses = position_bias.main(
        ["--bias", "none", "alibi", "dynamic", "--steps=60", "--length=32", "--batch-size=8"]
    )
    assert losses["alibi"] < losses["none"] / 10
    assert losses["dynamic"] < losses["none"] / 10
    printed = capsys.readouterr().out
    assert all(f"{name}: loss {x:.3f}" in printed for name, x in losses.items())
