"""The whole contract on random calls, forward and gradients, held to the yardstick; and what only a
GPU can get wrong: results that are not written or not repeated.

A `Bucket` is what a call is compiled for: shapes, dtypes, static options, which operands there are.
A `Draw` is what the operands hold, so that many draws run through one compilation. The same ones
are drawn in every run, more of both on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import strategies as st
from yardstick import Inputs, check, make_inputs, measured

from jax_cosine_attn import _blockwise, why_not

# Buckets of an implementation, each of which is compiled once, and draws of each: 160 calls on a
# CPU; on a GPU 2000 of the kernels beside 200, in 100 compilations.
BUCKETS = {"xla": 20, "cuda": 80}
DRAWS = {"xla": 8 if jax.default_backend() != "gpu" else 10, "cuda": 25}
SETTINGS = hypothesis.settings(
    database=None,
    deadline=None,
    derandomize=True,
    phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
    report_multiple_bugs=False,
)


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
    form: str  # form and shared: of `measured`
    shared: tuple[int, ...]


def bucket(number: int, implementation: str) -> Bucket:
    rng = np.random.default_rng(number)
    # Every second one of "cuda" is a call for the kernels of Hopper and of decode, over several of
    # their tiles: 16 bits, rows that they take, bounded logits.
    bounded = implementation == "cuda" and number % 2 == 1

    def pick(*choices: Any) -> Any:
        return choices[rng.integers(len(choices))]

    if bounded:
        t, s = pick(
            (1, 300), (16, 700), (70, 130), (128, 128), (129, 257), (257, 511), (300, 700),
            (600, 300), (512, 64),
        )  # fmt: skip
        n, k = pick((1, 1), (2, 2), (2, 1), (4, 2), (3, 1))
        b, h = pick(1, 2), pick(8, 24, 64, 64, 72, 96, 128, 128, 200, 256)
    else:
        t, s = pick(
            (1, 1), (1, 130), (70, 1), (17, 70), (70, 17),
            (33, 33), (64, 64), (70, 130), (33, 260), (200, 40),
        )  # fmt: skip
        n, k = pick((1, 1), (2, 2), (2, 1), (4, 2), (3, 1), (6, 2))
        b, h = pick(1, 2, 3), pick(1, 3, 8, 16, 20, 40, 64, 80, 130)

    form, shared = pick("batch", "heads first", "vmap"), ()
    if form == "vmap":
        shared = tuple(i for i in range(3) if pick(True, False, False))

    static: dict[str, Any] = {}
    if pick(True, *[False] * 15):
        static["deterministic"] = True
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
    largest_scale = (10.0 if bounded else pick(10.0, 10.0, 30.0)) / groups
    scale = pick("static", "shared", "per head", "per head")
    if scale == "static":
        static["scale"] = largest_scale * pick(1.0, 0.3, -0.5)
    else:
        arrays["scale"] = ((n,) if scale == "per head" else (), "float32")
        if bounded or pick(True, True, False):
            static["scale_bound"] = largest_scale
    floats = ("float32", "float16", "bfloat16")
    for name, dtypes in (("mask", ("bool",)), ("bias", floats)):
        if bounded and name == "bias":
            continue
        if pick(True, False):
            shape = [pick(size, size, 1) for size in (b, n, t, s)]
            if bounded and pick(True, False):
                shape = [b, 1, 1, s]
            arrays[name] = (tuple(shape[pick(0, 0, 0, 1, 2, 3) :]), pick(*dtypes))
    if not bounded and pick(True, False, False):
        arrays["relative_bias"] = ((pick(n, 1), t + s - 1), pick(*floats))
    for name in ("query_seq_lengths", "key_value_seq_lengths"):
        if pick(True, False):
            arrays[name] = ((b,), "int32")
    if pick(True, False, False):
        # Those of both, or of queries and then of keys.
        arrays["segment_ids"] = ((b, t if t == s else t + s), "int32")
    dtype = pick(*floats[1:]) if bounded else floats[number % 3]
    if implementation == "xla" and number % 8 == 7:
        dtype = "float64"  # which the kernels refuse
        if "scale" in arrays:
            arrays["scale"] = (arrays["scale"][0], dtype)
    sizes = dict(b=b, t=t, s=s, n=n, k=k, h=h)
    return Bucket(sizes, dtype, static, arrays, largest_scale, form, shared)


class Draw(NamedTuple):
    """What the operands of a call hold, those that the bucket has."""

    seed: int
    magnitude: float  # of query, key and value
    zero_rows: float  # share of the rows of query and key
    scale: list[float]  # per head, in units of the bucket's largest
    mask: float  # share of True
    prefixes: float  # share of the mask's rows that are True first and then False
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
    magnitudes = [1.0, 1e3, 1e-2] if bucket.dtype == "float16" else [1.0, 1e20, 1e-4]
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
        prefixes=st.sampled_from([0.0, 1.0, 0.5]),
        bias=st.sampled_from([1.0, 0.0, 10.0]),
        minus_infinity=st.sampled_from([0.0, 0.2, 0.95]),
        query_lengths=lengths(bucket.sizes["t"], b),
        key_lengths=lengths(bucket.sizes["s"], b),
        segments=st.integers(1, 5),
        sorted_segments=st.booleans(),
    )


def call(bucket: Bucket, draw: Draw) -> tuple[Callable[..., Inputs], dict[str, Any]]:
    """(inputs, options) of `check`."""
    dtype = jnp.dtype(bucket.dtype)

    def inputs(*, seed: int) -> Inputs:
        made = make_inputs(dtype, **bucket.sizes, seed=[draw.seed, seed], magnitude=draw.magnitude)
        # As much smaller as values are larger: what dout and dlse add to the gradient weighs alike.
        made["dout"] = (made["dout"].astype(np.float64) / draw.magnitude).astype(dtype)
        rng = np.random.default_rng(draw.seed)
        for i, name in enumerate(("query", "key", "value")):
            x = made[name].astype(np.float64)
            if i in bucket.shared:
                x[:] = x[:1]
            if name != "value":
                if bucket.static.get("l2norm_qk") is False:
                    x /= np.linalg.norm(x, axis=-1, keepdims=True)
                zero = rng.random(x.shape[:3]) < draw.zero_rows
                if i in bucket.shared:
                    zero[:] = zero[:1]
                x[zero] = 0
            made[name] = x.astype(dtype)
        return made

    rng = np.random.default_rng(draw.seed)

    def operand(name: str, shape: tuple[int, ...]) -> np.ndarray:
        match name:
            case "scale":
                return np.resize(draw.scale, shape) * bucket.largest_scale
            case "mask":
                mask = rng.random(shape) < draw.mask
                is_prefix = rng.random((*shape[:-1], 1)) < draw.prefixes
                return np.where(is_prefix, -np.sort(-mask.astype(int)), mask).astype(bool)
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
        name: np.asarray(operand(name, shape)).astype(jnp.dtype(of))
        for name, (shape, of) in bucket.arrays.items()
    }
    if "segment_ids" in arrays:
        ids = [x for x in np.split(arrays["segment_ids"], [bucket.sizes["t"]], axis=1) if x.size]
        ids = [np.sort(x) if draw.sorted_segments else x for x in ids]
        arrays["segment_ids"] = ids[0] if len(ids) == 1 else tuple(ids)
    options = bucket.static | arrays
    if "bias" in arrays:
        # What all of its pairs are ruled out for otherwise, no one may read.
        no_part = ("bias", "relative_bias", "deterministic")
        others = {name: x for name, x in options.items() if name not in no_part}
        made = inputs(seed=0)
        allowed = oracle.attention(*(made[x] for x in ("query", "key", "value")), **others).allowed
        arrays["bias"][oracle.summed_to(allowed.astype(int), arrays["bias"].shape) == 0] = np.nan
    return inputs, options


def signature(inputs: Inputs, options: dict[str, Any]) -> str:
    """All that a compilation for these depends on."""

    def described(x: Any) -> Any:
        return (x.shape, str(x.dtype)) if isinstance(x, np.ndarray) else x

    return str(jax.tree.map(described, (inputs, options)))


@pytest.mark.parametrize(
    "implementation, number",
    [
        pytest.param(name, number, marks=pytest.mark.gpu if name == "cuda" else ())
        for name, buckets in BUCKETS.items()
        for number in range(buckets)
    ],
)
def test_contract(implementation, number):
    compiled_for, drawn, signatures = bucket(number, implementation), 0, set()

    @hypothesis.seed(number)
    @hypothesis.settings(SETTINGS, max_examples=DRAWS[implementation])
    @hypothesis.given(draws(compiled_for))
    def holds(draw):
        nonlocal drawn
        drawn += 1
        hypothesis.note(str(compiled_for))
        inputs, options = call(compiled_for, draw)
        signatures.add(signature(inputs(seed=0), options))
        check(implementation, inputs, form=compiled_for.form, shared=compiled_for.shared, **options)

    with jax.enable_x64(True) if compiled_for.dtype == "float64" else contextlib.nullcontext():
        holds()
    assert drawn >= DRAWS[implementation]
    assert len(signatures) == 1, "a bucket is compiled once"


# On a GPU alone.


@pytest.mark.gpu
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("t, s, h", [(1, 300, 64), (70, 130, 20), (300, 200, 128), (65, 65, 256)])
def test_every_element_is_written(t, s, h, dtype, with_bias):
    """Where nothing is to be computed too. The first call compiles, and what that leaves in memory
    may be anything; the second finds NaN."""
    rng = np.random.default_rng(1)
    inputs = make_inputs(jnp.dtype(dtype), b=3, t=t, s=s, n=4, k=2, h=h)
    options = {
        "scale": np.array([8, -2, 0, 10], np.float32),
        "scale_bound": 10.0,
        "is_causal": True,
        "mask": rng.random((3, 1, 1, s)) < 0.7,
        "query_seq_lengths": np.array([t, t // 2, t], np.int32),
        "key_value_seq_lengths": np.array([s // 2, s, 0], np.int32),
    }
    if with_bias:
        options["bias"] = rng.standard_normal((3, 4, t, s)).astype(np.float32)
        options["relative_bias"] = rng.standard_normal((4, t + s - 1)).astype(np.float32)
    for _ in range(2):
        check("cuda", inputs, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("h", [64, 128])
def test_results_repeat_bitwise(h, dtype):
    inputs = make_inputs(jnp.dtype(dtype), t=300, s=500, n=4, k=1, h=h)
    tensors = tuple(inputs[x] for x in ("query", "key", "value"))
    scale = np.array([8, -2, 0, 10], np.float32)
    options = {"scale_bound": 10.0, "is_causal": True, "deterministic": True}
    options["deterministic"] = why_not("cuda", *tensors, scale=scale, **options) is None

    def results() -> list[np.ndarray]:
        out, lse, *gradients = measured(
            "cuda", tensors, {"scale": scale}, {}, inputs["dout"], inputs["dlse"],
            tuple(options.items()),
        )  # fmt: skip
        # Otherwise gradients are sums in whatever order the blocks come.
        compared = (out, lse, gradients) if options["deterministic"] else (out, lse)
        return [np.asarray(x).view(np.uint8) for x in jax.tree.leaves(compared)]

    first = results()
    for _ in range(19):
        for x, wanted in zip(results(), first, strict=True):
            np.testing.assert_array_equal(x, wanted)
