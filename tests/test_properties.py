"""The whole contract on random calls, forward and gradients, held to the yardstick; and what only a
GPU can get wrong: results that are not written or not repeated.

A `Bucket` is what a call is compiled for: shapes, dtypes, static options, the operands it has. A
`Draw` is what the operands hold, so that many draws run through one compilation. The same ones are
drawn in every run. HYPOTHESIS_PROFILE=gpu draws more of both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import strategies as st
from yardstick import check, make_inputs, measured, split

from jax_cosine_attn import _blockwise, why_not

# Examples are draws of one bucket.
for profile, examples in (("ci", 16), ("gpu", 24)):
    hypothesis.settings.register_profile(
        profile,
        max_examples=examples,
        database=None,
        deadline=None,
        derandomize=True,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        report_multiple_bugs=False,
    )
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")
BUCKETS = {"ci": 24, "gpu": 100}[PROFILE]

F32, F16, BF16 = (np.dtype(x) for x in (jnp.float32, jnp.float16, jnp.bfloat16))


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """Several blocks on both axes of "xla" for lengths that the oracle answers in milliseconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_blockwise, "BLOCK", 16)
        yield


class Bucket(NamedTuple):
    """What a compilation depends on."""

    sizes: dict[str, int]  # b, t, s, n, k, h
    dtype: str
    static: dict[str, Any]
    arrays: dict[str, tuple[tuple[int, ...], str]]  # (shape, dtype) of each operand but q, k, v
    largest_scale: float


def bucket(number: int) -> Bucket:
    rng = np.random.default_rng(number)

    def pick(*choices: Any) -> Any:
        return choices[rng.integers(len(choices))]

    t, s = pick(
        (1, 1), (1, 130), (70, 1), (17, 70), (70, 17), (33, 33), (64, 64), (70, 130), (150, 260)
    )  # fmt: skip
    n, k = pick((1, 1), (2, 2), (2, 1), (4, 2), (3, 1), (6, 2))
    b, h = pick(1, 2, 3), pick(1, 3, 8, 16, 20, 40, 64, 80, 130)

    static: dict[str, Any] = {}
    if pick(True, False):
        static["is_causal"] = True
    if pick(True, False):
        left, right = (int(size) for size in rng.integers(0, s + 1, 2))
        static["local_window_size"] = pick(left, (left, None), (None, right), (left, right))
    groups = pick(*(x for x in (1, 1, 1, 2, 4, 5, h) if h % x == 0 and x <= 8))
    if groups > 1:
        static["l2norm_groups"] = groups
    elif pick(True, False, False):
        static["l2norm_qk"] = False

    arrays: dict[str, tuple[tuple[int, ...], str]] = {}
    # Within and beyond what the kernels do without a running maximum in each dtype.
    largest_scale = pick(10.0, 10.0, 30.0) / groups
    scale = pick("static", "shared", "per head", "per head")
    if scale == "static":
        static["scale"] = largest_scale * pick(1.0, 0.3, -0.5)
    else:
        arrays["scale"] = ((n,) if scale == "per head" else (), "float32")
        if pick(True, True, False):
            static["scale_bound"] = largest_scale
    floats = ("float32", "float16", "bfloat16")
    for name, dtypes in (("mask", ("bool",)), ("bias", floats)):
        if pick(True, False):
            shape = [pick(size, size, 1) for size in (b, n, t, s)]
            arrays[name] = (tuple(shape[pick(0, 0, 0, 1, 2, 3) :]), pick(*dtypes))
    if pick(True, False, False):
        arrays["relative_bias"] = ((pick(n, 1), t + s - 1), pick(*floats))
    for name in ("query_seq_lengths", "key_value_seq_lengths"):
        if pick(True, False):
            arrays[name] = ((b,), "int32")
    if pick(True, False, False):
        arrays["segment_ids"] = ((b, t + s), "int32")
    return Bucket(
        dict(b=b, t=t, s=s, n=n, k=k, h=h), floats[number % 3], static, arrays, largest_scale
    )


class Draw(NamedTuple):
    """What the operands of a call hold, those that the bucket has."""

    seed: int
    magnitude: float  # of query, key and value
    zero_rows: float  # share of the rows of query and key
    scale: list[float]  # per head, in units of the bucket's largest
    mask: float  # share of True
    bias: float  # magnitude of both biases
    minus_infinity: float  # share of both biases
    query_lengths: list[int]
    key_lengths: list[int]
    segments: int
    sorted_segments: bool


def lengths(size: int, batch: int) -> st.SearchStrategy[list[int]]:
    length = st.sampled_from([size, 0, -3, size + 7]) | st.integers(0, size)
    return st.lists(length, min_size=batch, max_size=batch)


def draws(bucket: Bucket) -> st.SearchStrategy[Draw]:
    """The first of each choice is the plain one, which failures shrink to."""
    b, n = bucket.sizes["b"], bucket.sizes["n"]
    # float16 has no room for the gradients of smaller or larger rows.
    magnitudes = [1.0, 1e3, 1e-2] if bucket.dtype == "float16" else [1.0, 1e30, 1e-4]
    # Beyond 1 the bound clamps.
    factors = [1.0, 0.0, -1.0] + ([1.5, -1.5] if "scale_bound" in bucket.static else [])
    return st.builds(
        Draw,
        seed=st.integers(0, 999),
        magnitude=st.sampled_from(magnitudes),
        zero_rows=st.sampled_from([0.0, 0.1, 1.0]),
        scale=st.lists(
            st.sampled_from(factors) | st.floats(-1, 1, width=16), min_size=n, max_size=n
        ),
        mask=st.sampled_from([1.0, 0.9, 0.5, 0.1, 0.02, 0.0]),
        bias=st.sampled_from([1.0, 0.0, 10.0]),
        minus_infinity=st.sampled_from([0.0, 0.2, 0.95]),
        query_lengths=lengths(bucket.sizes["t"], b),
        key_lengths=lengths(bucket.sizes["s"], b),
        segments=st.integers(1, 5),
        sorted_segments=st.booleans(),
    )


def call(bucket: Bucket, draw: Draw) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(inputs, options) of `check`."""
    dtype = jnp.dtype(bucket.dtype)
    inputs = make_inputs(dtype, **bucket.sizes, seed=draw.seed, magnitude=draw.magnitude)
    # The cotangents of out and lse weigh alike: their sum may not be all rounding.
    inputs["dout"] = (inputs["dout"] / draw.magnitude).astype(dtype)
    rng = np.random.default_rng(draw.seed)
    for name in ("query", "key"):
        x = inputs[name].astype(np.float64)
        if bucket.static.get("l2norm_qk") is False:
            x /= np.linalg.norm(x, axis=-1, keepdims=True)
        x[rng.random(x.shape[:3]) < draw.zero_rows] = 0
        inputs[name] = x.astype(dtype)

    def operand(name: str, shape: tuple[int, ...]) -> np.ndarray:
        match name:
            case "scale":
                return np.resize(draw.scale, shape) * bucket.largest_scale
            case "mask":
                return rng.random(shape) < draw.mask
            case "bias" | "relative_bias":
                masked = rng.random(shape) < draw.minus_infinity
                return np.where(masked, -np.inf, draw.bias * rng.standard_normal(shape))
            case "query_seq_lengths":
                return np.array(draw.query_lengths)
            case "key_value_seq_lengths":
                return np.array(draw.key_lengths)
            case "segment_ids":
                return rng.integers(0, draw.segments, shape)
        raise ValueError(name)

    arrays = {
        name: operand(name, shape).astype(jnp.dtype(of)) for name, (shape, of) in bucket.arrays.items()
    }
    if "segment_ids" in arrays:
        pair = np.split(arrays["segment_ids"], [bucket.sizes["t"]], axis=1)
        arrays["segment_ids"] = tuple(np.sort(x) if draw.sorted_segments else x for x in pair)
    return inputs, bucket.static | arrays


@pytest.mark.parametrize("number", range(BUCKETS))
@pytest.mark.parametrize("implementation", ["xla", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_contract(implementation, number):
    compiled_for = bucket(number)

    @hypothesis.seed(number)
    @hypothesis.settings(hypothesis.settings.get_profile(PROFILE))
    @hypothesis.given(draws(compiled_for))
    def holds(draw):
        hypothesis.note(str(compiled_for))
        inputs, options = call(compiled_for, draw)
        check(implementation, inputs, **options)

    holds()
