"""Temporary memory of the compiled "xla" implementation is O(T + S); of "cuda" for relative biases.

XLA reports it without running anything. The bound is one byte per pair of query and key, so that a
single boolean [T, S], the smallest array of that order, would break it. Gradients of a [T, S] bias
are results and not counted. What a fused kernel allocates inside is not in XLA's report, so where
no operand is [T, S] no shape of the compiled program may be that large either.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_cosine_attn import _ffi, cosine_attention

LENGTH = 8192  # T = S
BOUND = LENGTH * LENGTH
HEADS, HEAD_DIM = 2, 16


def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


ROWS = array(1, LENGTH, HEADS, HEAD_DIM)
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"local_window_size": (100, 0)},
    "large-scale": {"scale": 50.0},
    "lengths": {"key_value_seq_lengths": array(1, dtype=jnp.int32), "is_causal": True},
    "segments": {"segment_ids": array(1, LENGTH, dtype=jnp.int32)},
    "key-mask": {"mask": array(1, 1, 1, LENGTH, dtype=jnp.bool_)},
    "mask": {"mask": array(1, HEADS, LENGTH, LENGTH, dtype=jnp.bool_)},
    "bias": {"bias": array(HEADS, LENGTH, LENGTH)},
    "bias-of-all-heads": {"bias": array(1, 1, LENGTH, LENGTH)},
    "bias-per-key": {"bias": array(1, HEADS, 1, LENGTH)},
    "relative-bias": {"relative_bias": array(HEADS, 2 * LENGTH - 1)},
    "relative-bias-lengths": {
        "relative_bias": array(HEADS, 2 * LENGTH - 1),
        "key_value_seq_lengths": array(1, dtype=jnp.int32),
    },
}


def temporaries(fun: Callable[..., Any], *shapes: Any) -> int:
    """Bytes of temporaries, or the entries of the largest array inside if those are more."""
    compiled = jax.jit(fun).lower(*shapes).compile()
    reported = compiled.memory_analysis().temp_size_in_bytes
    if any(x.size >= BOUND for x in jax.tree.leaves(shapes)):
        return reported
    dims = re.findall(r"\b(?:pred|[suf]\d+|bf16)\[([\d,]+)\]", compiled.as_text())
    return max(reported, *(math.prod(map(int, d.split(","))) for d in dims))


def call(
    options: dict[str, Any], implementation: str = "xla"
) -> tuple[Callable[..., jax.Array], dict[str, Any]]:
    """(attention over (q, k, v, arrays of the options), those arrays)."""
    arrays = {name: x for name, x in options.items() if isinstance(x, jax.ShapeDtypeStruct)}
    static = {name: x for name, x in options.items() if name not in arrays}

    def attend(q: Any, k: Any, v: Any, arrays: dict[str, Any]) -> jax.Array:
        return cosine_attention(q, k, v, **arrays, **static, implementation=implementation)

    return attend, arrays


def gradient(attend: Callable[..., jax.Array], arrays: dict[str, Any]) -> Callable[..., Any]:
    """Gradient with respect to q, k, v and the biases."""

    def loss(differentiable: tuple, rest: dict[str, Any]) -> jax.Array:
        q, k, v, biases = differentiable
        return attend(q, k, v, biases | rest).sum()

    def run(q: Any, k: Any, v: Any, arrays: dict[str, Any]) -> Any:
        biases = {name: x for name, x in arrays.items() if "bias" in name}
        rest = {name: x for name, x in arrays.items() if "bias" not in name}
        return jax.grad(loss)((q, k, v, biases), rest)

    return run


@pytest.mark.parametrize("name", CALLS)
def test_forward(name):
    attend, arrays = call(CALLS[name])
    assert temporaries(attend, ROWS, ROWS, ROWS, arrays) < BOUND


@pytest.mark.parametrize("name", CALLS)
def test_gradient(name):
    attend, arrays = call(CALLS[name])
    assert temporaries(gradient(attend, arrays), ROWS, ROWS, ROWS, arrays) < BOUND


MAPPED = array(3, *ROWS.shape)
WHICH = {"all": (0, 0, 0), "queries": (0, None, None), "keys": (None, 0, 0)}


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("name", ["causal", "key-mask", "mask", "bias", "relative-bias"])
def test_vmap(name, which):
    """Operands that are not mapped, a [T, S] bias among them, are not repeated."""
    attend, arrays = call(CALLS[name])
    axes = (*WHICH[which], None)
    shapes = [ROWS if axis is None else MAPPED for axis in axes[:3]]
    assert temporaries(jax.vmap(attend, axes), *shapes, arrays) < BOUND


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("name", ["causal", "key-mask", "mask", "relative-bias"])
def test_gradient_of_vmap(name, which):
    attend, arrays = call(CALLS[name])
    axes = (*WHICH[which], None)
    shapes = [ROWS if axis is None else MAPPED for axis in axes[:3]]
    fun = gradient(jax.vmap(attend, axes), arrays)
    assert temporaries(fun, *shapes, arrays) < BOUND


@pytest.mark.parametrize("name", ["mask", "bias"])
def test_vmap_of_gradient(name):
    attend, arrays = call(CALLS[name])
    axes = (0, 0, 0, dict.fromkeys(arrays))
    fun = jax.vmap(gradient(attend, arrays), axes)
    assert temporaries(fun, MAPPED, MAPPED, MAPPED, arrays) < BOUND


def test_gradient_of_16_bit_inputs():
    attend, _ = call(CALLS["causal"])
    rows = array(*ROWS.shape, dtype=jnp.bfloat16)
    assert temporaries(gradient(attend, {}), rows, rows, rows, {}) < BOUND


def test_the_bound_notices_one_boolean_array():
    """The reference formula, and a mask that is built before it is applied, both exceed it."""
    formula = functools.partial(cosine_attention, implementation="reference")
    assert temporaries(formula, ROWS, ROWS, ROWS) > BOUND

    def with_mask(q: Any, k: Any, v: Any, ids: Any) -> jax.Array:
        mask = (ids[:, None] == ids[None, :])[None, None]
        return cosine_attention(q, k, v, mask=mask, implementation="xla")

    assert temporaries(with_mask, ROWS, ROWS, ROWS, array(LENGTH, dtype=jnp.int32)) > BOUND


# A relative bias at T = S = 16384. One [T, S] array of bytes would be 256 MiB. The bound is forty
# float32 arrays of q's size, 80 MiB: room for padded heads and for sums apart from their operands.
LONG = 16_384
LONG_ROWS = array(1, LONG, HEADS, HEAD_DIM)
LONG_CALL = {"relative_bias": array(HEADS, 2 * LONG - 1), "is_causal": True}
LONG_BOUND = 40 * 4 * LONG * HEADS * HEAD_DIM


@pytest.mark.parametrize("of", ["output", "gradient"])
@pytest.mark.parametrize("implementation", ["xla", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_relative_bias_of_16k(implementation, of):
    attend, arrays = call(LONG_CALL, implementation)
    fun = attend if of == "output" else gradient(attend, arrays)
    assert LONG_BOUND < LONG * LONG
    assert temporaries(fun, *[LONG_ROWS] * 3, arrays) < LONG_BOUND


def test_relative_bias_of_16k_has_no_matrix_on_cuda(monkeypatch):
    """Needs no GPU: what goes into the kernels and comes out of them, and all that is between, is
    in the lowered program. None of it is as large as T x S, or has two axes of that length.
    """
    monkeypatch.setattr(_ffi, "build_problem", lambda: None)
    attend, arrays = call(LONG_CALL, "cuda")
    traced = jax.jit(gradient(attend, arrays)).trace(*[LONG_ROWS] * 3, arrays)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert all(f"@jax_cosine_attn_{name}(" in text for name in ("fwd", "bwd"))
    tensors = [
        [int(d) for d in re.findall(r"(\d+)x", dims)]
        for dims in re.findall(r"tensor<((?:\d+x)+)", text)
    ]
    assert [1, HEADS, 2 * LONG - 1] in tensors
    for dims in tensors:
        assert sum(d >= LONG for d in dims) <= 1, dims
        assert math.prod(dims) <= LONG_BOUND / 4, dims
