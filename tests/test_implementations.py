"""Every implementation against the float64 oracle: accuracy, dead rows and keys, extreme inputs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from yardstick import check, few_on_a_cpu, make_inputs, measured, split

from jax_cosine_attn import _blockwise, _ffi, cosine_attention, why_not
from jax_cosine_attn._config import FIELDS, Config, Operands
from jax_cosine_attn._reference import reference_attention

DTYPES = F32, F16, BF16 = [np.dtype(x) for x in (jnp.float32, jnp.float16, jnp.bfloat16)]
LENGTHS = (1, 17, 63, 127, 1000)
HEAD_DIMS = (1, 8, 16, 20, 32, 40, 64, 80, 96, 128, 192, 256)


@pytest.fixture(params=["xla", "reference", pytest.param("cuda", marks=pytest.mark.gpu)])
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


# The reference, which these calls are slow for, in the full grid.
fast_implementations = pytest.mark.parametrize(
    "implementation",
    [
        "xla",
        pytest.param("reference", marks=pytest.mark.full),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)


def learned(n: int, bound: float = 10.0) -> dict[str, Any]:
    """A scale per head, of several signs and zero, with the bound that the kernels need."""
    return {"scale": np.resize(np.array([8, -2, 0, 10], np.float32), n), "scale_bound": bound}


# Lengths and head dims.


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize(
    "t, s",
    [(1, 1), (1, 1000), (17, 63), (63, 17), (127, 127), (127, 1000), (1000, 127), (1000, 1000)],
)
@fast_implementations
def test_lengths(implementation, t, s, is_causal):
    inputs = functools.partial(make_inputs, F32, b=1, t=t, s=s)
    check(implementation, inputs, is_causal=is_causal, **learned(2))


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("t, s", [(1, 63), (63, 1000)])
def test_lengths_of_16_bit_inputs(implementation, t, s, dtype):
    inputs = functools.partial(make_inputs, dtype, b=1, t=t, s=s)
    check(implementation, inputs, is_causal=True, **learned(2))


@pytest.mark.parametrize(
    "implementation, h, dtype", few_on_a_cpu(itertools.product(HEAD_DIMS, DTYPES), every=2), ids=str
)
def test_head_dims(implementation, h, dtype):
    inputs = functools.partial(make_inputs, dtype, b=1, t=17, s=63, h=h)
    check(implementation, inputs, **learned(2))


@pytest.mark.full
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("h", HEAD_DIMS)
@pytest.mark.parametrize("t, s", list(itertools.product(LENGTHS, LENGTHS)))
def test_lengths_and_head_dims(implementation, t, s, h, dtype):
    inputs = functools.partial(make_inputs, dtype, b=1, t=t, s=s, h=h)
    check(implementation, inputs, is_causal=(t + s + h) % 3 == 0, **learned(2))


# Options, alone and together.


class Sizes(NamedTuple):
    b: int
    t: int
    s: int
    n: int
    k: int
    h: int


Options = Callable[[Sizes, np.random.Generator], dict[str, Any]]


def normal(rng: np.random.Generator, *shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.asarray(jnp.asarray(rng.standard_normal(shape), dtype))


def mask(rng: np.random.Generator, *shape: int, kept: float = 0.6) -> np.ndarray:
    return rng.random(shape) < kept


def ids(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Sorted segment ids, as packing produces them."""
    return np.sort(rng.integers(0, 4, shape).astype(np.int32), axis=-1)


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def some_minus_infinity(z: Sizes, rng: np.random.Generator) -> dict[str, Any]:
    """A bias that masks: single pairs, a whole row, and a key for every query."""
    bias = np.where(rng.random((z.b, z.n, z.t, z.s)) < 0.3, -np.inf, 0).astype(np.float32)
    bias[0, :, z.t // 2] = -np.inf
    bias[:, :, :, z.s // 3] = -np.inf
    return {"bias": bias}


def relative_cutoff(z: Sizes, rng: np.random.Generator) -> dict[str, Any]:
    """ALiBi that ends: -inf beyond a distance."""
    distance = np.abs(np.arange(z.t + z.s - 1) - (z.t - 1)).astype(np.float32)
    slopes = 2.0 ** -np.arange(1, z.n + 1, dtype=np.float32)[:, None]
    return {"relative_bias": np.where(distance > z.s // 2, -np.inf, -slopes * distance)}


OPTIONS: dict[str, Options] = {
    "plain": lambda z, rng: {},
    "causal": lambda z, rng: {"is_causal": True},
    "query-lengths": lambda z, rng: {"query_seq_lengths": int32(z.t - 5, 1)},
    "key-lengths": lambda z, rng: {"key_value_seq_lengths": int32(z.s // 2, 2 * z.s)},
    "lengths-causal": lambda z, rng: {
        "query_seq_lengths": int32(z.t - 5, z.t),
        "key_value_seq_lengths": int32(z.s, z.t // 2),
        "is_causal": True,
    },
    "padded-entry": lambda z, rng: {"key_value_seq_lengths": int32(0, z.s)},
    "padded-entry-causal": lambda z, rng: {
        "query_seq_lengths": int32(z.t, 0),
        "key_value_seq_lengths": int32(z.s - 3, 0),
        "is_causal": True,
    },
    "negative-length": lambda z, rng: {"key_value_seq_lengths": int32(-3, 7)},
    "key-mask": lambda z, rng: {"mask": mask(rng, z.b, 1, 1, z.s)},
    "key-mask-causal": lambda z, rng: {"mask": mask(rng, z.b, 1, 1, z.s), "is_causal": True},
    "key-mask-of-all-entries": lambda z, rng: {"mask": mask(rng, z.s)},
    "key-mask-sparse-window-lengths": lambda z, rng: {
        "mask": mask(rng, z.b, 1, 1, z.s, kept=0.2),
        "local_window_size": (z.s // 4, 50),
        "query_seq_lengths": int32(z.t, z.t - 40),
        "key_value_seq_lengths": int32(z.s - 7, z.s),
    },
    "key-mask-prefix-lengths-causal": lambda z, rng: {
        "mask": np.stack([np.arange(z.s) < 3 * z.s // 4, mask(rng, z.s)])[:, None, None],
        "query_seq_lengths": int32(z.t - 5, z.t),
        "key_value_seq_lengths": int32(z.s - 7, z.s),
        "is_causal": True,
    },
    "key-mask-prefix-window": lambda z, rng: {
        "mask": np.arange(z.s) < np.array([[[[z.s // 2]]], [[[0]]]]),
        "local_window_size": (z.s // 4, 5),
    },
    "key-mask-segments": lambda z, rng: {
        "mask": mask(rng, 1, 1, 1, z.s),
        "segment_ids": (ids(rng, z.b, z.t), ids(rng, z.b, z.s)),
    },
    "key-mask-per-head": lambda z, rng: {"mask": mask(rng, 1, z.n, 1, z.s)},
    "row-mask": lambda z, rng: {"mask": mask(rng, z.b, 1, z.t, 1)},
    "full-mask": lambda z, rng: {"mask": mask(rng, z.b, z.n, z.t, z.s)},
    "sparse-mask": lambda z, rng: {"mask": mask(rng, 1, 1, z.t, z.s, kept=0.02)},
    "empty-mask": lambda z, rng: {"mask": np.zeros((1, 1, 1, 1), bool)},
    "groups": lambda z, rng: {"l2norm_groups": 4, "scale": 2.5},
    "normalised": lambda z, rng: {"l2norm_qk": False},
    "normalised-lengths-causal": lambda z, rng: {
        "l2norm_qk": False,
        "scale": np.arange(-4, 2 * z.n - 4, 2, dtype=np.float32),
        "scale_bound": 9.0,
        "key_value_seq_lengths": int32(z.s - 7, z.s // 2),
        "is_causal": True,
    },
    "full-bias": lambda z, rng: {"bias": normal(rng, z.b, z.n, z.t, z.s)},
    "bias-of-all-entries": lambda z, rng: {"bias": normal(rng, z.n, z.t, z.s)},
    "bias-of-all-heads": lambda z, rng: {"bias": normal(rng, z.b, 1, z.t, z.s)},
    "bias-matrix": lambda z, rng: {"bias": normal(rng, z.t, z.s)},
    "bias-per-key": lambda z, rng: {"bias": normal(rng, z.b, 1, 1, z.s)},
    "bias-vector": lambda z, rng: {"bias": normal(rng, z.s)},
    "bias-per-row": lambda z, rng: {"bias": normal(rng, 1, z.n, z.t, 1)},
    "bias-per-head": lambda z, rng: {"bias": normal(rng, z.n, 1, 1)},
    "bias-number": lambda z, rng: {"bias": normal(rng, 1, 1, 1, 1)},
    "bias-bfloat16": lambda z, rng: {"bias": normal(rng, z.n, z.t, z.s, dtype=BF16)},
    "bias-float16-causal": lambda z, rng: {
        "bias": normal(rng, z.b, z.n, z.t, z.s, dtype=F16),
        "is_causal": True,
    },
    "bias-minus-infinity": some_minus_infinity,
    "bias-large": lambda z, rng: {"bias": 1e4 * normal(rng, z.n, z.t, z.s)},
    "relative": lambda z, rng: {"relative_bias": normal(rng, z.n, z.t + z.s - 1)},
    "relative-of-all-heads": lambda z, rng: {
        "relative_bias": normal(rng, 1, z.t + z.s - 1, dtype=BF16)
    },
    "relative-lengths": lambda z, rng: {
        "relative_bias": normal(rng, z.n, z.t + z.s - 1),
        "query_seq_lengths": int32(z.t - 9, z.t),
        "key_value_seq_lengths": int32(z.s, z.s // 2),
    },
    "relative-cutoff": relative_cutoff,
    "window": lambda z, rng: {"local_window_size": 9},
    "window-left": lambda z, rng: {"local_window_size": (20, None)},
    "window-right-lengths": lambda z, rng: {
        "local_window_size": (None, 3),
        "key_value_seq_lengths": int32(z.s, z.s // 3),
    },
    "window-causal": lambda z, rng: {"local_window_size": (11, 5), "is_causal": True},
    "segments": lambda z, rng: {"segment_ids": (ids(rng, z.b, z.t), ids(rng, z.b, z.s))},
    "segments-causal": lambda z, rng: {
        "segment_ids": (ids(rng, z.b, z.t), ids(rng, z.b, z.s)),
        "is_causal": True,
    },
    "scale-10": lambda z, rng: {"scale": 10.0},
    "scale-30": lambda z, rng: {"scale": 30.0},
    "scale-60": lambda z, rng: {"scale": 60.0},
    "scale-100": lambda z, rng: {"scale": 100.0},
    "scale-0": lambda z, rng: {"scale": np.float32(0) * np.ones(z.n, np.float32), "scale_bound": 8},
    "scale-negative": lambda z, rng: {"scale": -5.0},
    "scale-learned": lambda z, rng: {"scale": np.linspace(1, 9, z.n, dtype=np.float32)},
    "scale-learned-one": lambda z, rng: {"scale": np.asarray(7, np.float32), "scale_bound": 9.0},
    "scale-learned-bounded": lambda z, rng: learned(z.n) | {"is_causal": True},
    "scale-learned-large": lambda z, rng: {"scale": np.linspace(50, 200, z.n, dtype=np.float32)},
    "deterministic": lambda z, rng: {"deterministic": True},
    "mask-bias-window-lengths": lambda z, rng: (
        {
            "mask": mask(rng, z.b, 1, 1, z.s),
            "bias": normal(rng, z.n, z.t, z.s),
            "local_window_size": (z.s // 3, None),
            "key_value_seq_lengths": int32(z.s - 9, z.s // 2),
        }
        | learned(z.n)
    ),
    "everything": lambda z, rng: (
        {
            "mask": mask(rng, 1, z.n, z.t, z.s, kept=0.9),
            "bias": normal(rng, z.b, 1, 1, z.s),
            "relative_bias": normal(rng, z.n, z.t + z.s - 1),
            "segment_ids": (ids(rng, z.b, z.t), ids(rng, z.b, z.s)),
            "local_window_size": (z.s // 2, z.s // 4),
            "is_causal": True,
            "query_seq_lengths": int32(z.t, z.t - 10),
            "key_value_seq_lengths": int32(z.s - 4, z.s),
            "l2norm_groups": 2,
        }
        | learned(z.n, bound=20.0)
    ),
}

# More than one block on both axes, whole and ragged; and one small block.
LARGE, SMALL = Sizes(2, 600, 1000, 4, 2, 8), Sizes(2, 63, 127, 4, 2, 16)


def check_options(
    implementation: str, name: str, dtype: np.dtype, sizes: Sizes, **more: Any
) -> None:
    options = OPTIONS[name](sizes, np.random.default_rng(1)) | more

    def inputs(seed: int) -> dict[str, np.ndarray]:
        made = make_inputs(dtype, **sizes._asdict(), seed=seed)
        if options.get("l2norm_qk") is False:
            for x in ("query", "key"):
                rows = made[x].astype(np.float32)
                made[x] = (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(dtype)
        return made

    check(implementation, inputs, **options)


@pytest.mark.parametrize("name", OPTIONS)
@fast_implementations
def test_options(implementation, name):
    check_options(implementation, name, F32, LARGE)


# Each option with one of the two dtypes; the full grid has both.
@pytest.mark.parametrize(
    "implementation, name, dtype",
    few_on_a_cpu([(name, (F16, BF16)[i % 2]) for i, name in enumerate(OPTIONS)], every=3),
    ids=str,
)
def test_options_of_16_bit_inputs(implementation, name, dtype):
    check_options(implementation, name, dtype, SMALL)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_kernels_refuse_nothing(monkeypatch, dtype):
    """Needs no GPU and no build: every option at every head dim, with or without determinism, and
    lengths down to 0; calls without a batch axis too."""
    monkeypatch.setattr(_ffi, "build_problem", lambda: None)
    monkeypatch.setattr(_ffi, "_device_problem", lambda: None)

    def arrays(z: Sizes) -> list[jax.ShapeDtypeStruct]:
        shapes = ((z.b, z.t, z.n, z.h), (z.b, z.s, z.k, z.h), (z.b, z.s, z.k, z.h))
        return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]

    for i, name in enumerate(OPTIONS):
        options = OPTIONS[name](SMALL, np.random.default_rng(1)) | {"deterministic": i % 2 == 0}
        assert why_not("cuda", *arrays(SMALL), **options) is None, name
    for h in range(1, 257):
        assert why_not("cuda", *arrays(Sizes(2, 3, 5, 4, 2, h)), is_causal=True) is None, h
    for t, s in itertools.product((0, 1, 16, 17, 100_000), repeat=2):
        q, k, v = arrays(Sizes(2, t, s, 4, 1, 64))
        assert why_not("cuda", q, k, v) is None, (t, s)
        one = [jax.ShapeDtypeStruct(x.shape[1:], dtype) for x in (q, k, v)]
        assert why_not("cuda", *one, return_residual=True, precision="highest") is None, (t, s)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("h", [20, 64])
@pytest.mark.parametrize("t, s", [(63, 17), (127, 127), (1000, 127), (1000, 1000)])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_and_lengths(implementation, name, t, s, h, dtype):
    check_options(implementation, name, dtype, Sizes(2, t, s, 2, 1, h))


# Few queries against many keys, which CTAs share out: every instance of the decode kernel, and head
# dims that are none's.
DECODE_SIZES = (
    Sizes(2, 1, 300, 2, 2, 64),
    Sizes(2, 1, 5000, 8, 2, 128),
    Sizes(2, 1, 5000, 16, 2, 256),
    Sizes(2, 2, 300, 16, 2, 72),
    Sizes(2, 2, 5000, 16, 2, 64),
    Sizes(2, 16, 300, 8, 2, 256),
    Sizes(2, 16, 5000, 8, 2, 128),
    Sizes(2, 16, 5000, 2, 1, 64),
    Sizes(2, 16, 5000, 2, 2, 16),
)
DECODE_OPTIONS = (
    "plain", "normalised", "causal", "query-lengths", "key-lengths", "lengths-causal",
    "padded-entry", "padded-entry-causal", "key-mask", "key-mask-causal",
    "key-mask-prefix-lengths-causal", "key-mask-prefix-window", "key-mask-per-head", "row-mask",
    "full-mask", "sparse-mask", "empty-mask", "window", "window-left", "window-causal",
    "segments", "segments-causal", "scale-10", "scale-negative", "scale-learned-bounded",
)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name, sizes, dtype",
    [
        (name, sizes, (F16, BF16)[(i + j) % 2])
        for i, name in enumerate(DECODE_OPTIONS)
        for j, sizes in enumerate(DECODE_SIZES)
    ],
    ids=str,
)
def test_decode(name, sizes, dtype):
    check_options("cuda", name, dtype, sizes)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "t, s, h", [(2, 300, 64), (2, 5000, 64), (130, 200, 64), (130, 200, 128), (300, 1100, 128)]
)
@pytest.mark.parametrize(
    "dtype, magnitude",
    [(BF16, 1e30), (BF16, 1e-4), (BF16, 1.0), (F16, 1e3), (F16, 1e-4)],
    ids=lambda x: f"{x:g}" if isinstance(x, float) else str(x),
)
def test_kernels_take_the_norms_of_all_keys(t, s, h, dtype, magnitude):
    """Zero keys, keys of norm below 1e-6, and in bfloat16 keys whose squares overflow; in decode,
    in the forward for Hopper on raw keys, and in the one that makes unit keys itself."""

    def inputs(seed: int) -> dict[str, np.ndarray]:
        made = make_inputs(dtype, b=1, t=t, s=s, n=4, k=1, h=h, magnitude=magnitude, seed=seed)
        made["key"][:, 7:9] = 0
        made["key"][:, 11] = np.where(np.arange(h) < 32, 1e-7, 0)
        if dtype == BF16:
            huge = made["key"][:, 3::50].astype(np.float64) / magnitude * 1e36
            made["key"][:, 3::50] = huge.astype(dtype)
        return made

    check("cuda", inputs, is_causal=True, **learned(4))


@pytest.fixture
def smaller_gpu(request):
    """Kernels are chosen as on a GPU with so much shared memory, in KB."""
    from jax_cosine_attn import _cuda

    jax.clear_caches()  # CUDA graphs keep the kernels that they were made of
    _cuda.limit_shared_memory(request.param * 1024)
    yield
    _cuda.limit_shared_memory(0)
    jax.clear_caches()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("h", [64, 128, 256])
@pytest.mark.parametrize("name", ["plain", "lengths-causal", "everything", "deterministic"])
@pytest.mark.parametrize("smaller_gpu", [99], indirect=True)
def test_kernels_for_99_kb(smaller_gpu, name, h, dtype):
    more = {"deterministic": True} if name == "deterministic" else {}
    name = "everything" if more else name
    check_options("cuda", name, dtype, Sizes(2, 70, 131, 4, 2, h), **more)


# Several tiles of queries and keys in each of the kernels, and a head dim that fills its tile.
TILE_OPTIONS = (
    "plain", "causal", "lengths-causal", "padded-entry-causal", "key-mask-causal", "window-causal",
    "key-mask-sparse-window-lengths", "key-mask-prefix-lengths-causal", "full-mask", "sparse-mask",
    "segments-causal", "groups", "normalised", "normalised-lengths-causal", "scale-negative",
    "scale-30", "window-right-lengths", "scale-learned-bounded", "key-mask-segments",
)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("name", TILE_OPTIONS)
@pytest.mark.parametrize("h", [64, 120, 128, 200])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_options_over_tiles(name, h, dtype):
    check_options("cuda", name, dtype, Sizes(2, 300, 700, 4, 2, h))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["plain", "causal", "lengths-causal", "window-causal", "normalised", "scale-30"]
)
@pytest.mark.parametrize("h", [64, 120, 128])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("t, s, n, k", [(300, 1100, 4, 2), (130, 200, 50, 50), (300, 520, 25, 25)])
def test_more_blocks_than_stages_and_tiles_than_ctas(name, t, s, n, k, h, dtype):
    """More keys than a CTA of the kernels for Hopper has stages for, and more tiles than a GPU runs
    at a time: of raw keys at H 120 and 128, and of keys that CTAs make for one another, in several
    sections of heads."""
    check_options("cuda", name, dtype, Sizes(2, t, s, n, k, h))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("h", [64, 128])
@pytest.mark.parametrize("name", ["causal", "key-mask-causal", "full-mask", "groups"])
@pytest.mark.parametrize("smaller_gpu", [162], indirect=True)
def test_portable_kernels_of_bounded_calls(smaller_gpu, name, h, dtype):
    """No tile of the kernels for Hopper fits into 162 KB (test_sanitizers_see_every_instance)."""
    check_options("cuda", name, dtype, Sizes(2, 300, 700, 4, 2, h))


@pytest.mark.gpu
def test_decode_repeats_bitwise():
    inputs = make_inputs(BF16, b=1, t=1, s=5000, n=8, k=2, h=128)
    tensors = tuple(jnp.asarray(inputs[x]) for x in ("query", "key", "value"))
    attend = jax.jit(functools.partial(cosine_attention, implementation="cuda"))
    first = np.asarray(attend(*tensors))
    for _ in range(20):
        np.testing.assert_array_equal(attend(*tensors), first)


@pytest.mark.parametrize(
    "implementation, k, dtype",
    few_on_a_cpu(itertools.product((1, 2, 3, 6), DTYPES), every=2),
    ids=str,
)
def test_heads_sharing_keys(implementation, k, dtype):
    inputs = functools.partial(make_inputs, dtype, b=1, t=65, s=33, n=6, k=k)
    check(implementation, inputs, is_causal=True, **learned(6))


@pytest.mark.parametrize("h", [20, 64])
def test_key_masks_of_entries_that_share_keys(implementation, h):
    """Under vmap over queries and masks: there are fewer entries of keys than lists of them."""

    def inputs(seed: int) -> dict[str, np.ndarray]:
        made = make_inputs(F16, b=3, t=33, s=70, h=h, seed=seed)
        for name in ("key", "value"):
            made[name][:] = made[name][:1]
        return made

    seen = mask(np.random.default_rng(2), 3, 1, 1, 70)
    check(implementation, inputs, form="vmap", shared=(1, 2), mask=seen)


# Kernels are chosen by dtype and head dim; the others take all alike.
over_kernels = pytest.mark.parametrize(
    "implementation, dtype, h",
    [
        ("xla", F32, 20),
        pytest.param("reference", F32, 20, marks=pytest.mark.full),
        *(
            pytest.param("cuda", *kernel, marks=pytest.mark.gpu)
            for kernel in ((F32, 20), (BF16, 20), (F16, 64), (BF16, 64), (BF16, 128))
        ),
    ],
    ids=str,
)


@over_kernels
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
def test_key_masks_that_are_prefixes_in_some_entries(implementation, is_causal, h, dtype):
    """Beside lists, all keys, none, and prefixes that end anywhere in a block of 128."""
    s, seen = 300, np.zeros((8, 300), bool)
    for entry, end in ((0, 130), (2, s), (4, 1), (5, 256), (7, 299)):
        seen[entry, :end] = True
    rng = np.random.default_rng(3)
    seen[1] = rng.random(s) < 0.5
    seen[6] = seen[1] & (np.arange(s) >= 17)  # as a prefix would, but not from the first key on
    inputs = functools.partial(make_inputs, dtype, b=8, t=70, s=s, n=2, k=1, h=h)
    check(implementation, inputs, is_causal=is_causal, mask=seen[:, None, None], **learned(2))


@over_kernels
@pytest.mark.parametrize("end", [1, 63, 64, 70, 127, 128])
def test_dead_keys_right_behind_a_prefix(implementation, end, h, dtype):
    """They hold NaN, in the block in which the prefix ends. `check` compares all gradients."""
    inputs = functools.partial(make_inputs, dtype, b=1, t=130, s=200, h=h)
    check(implementation, inputs, mask=np.arange(200) < end, **learned(2))


@over_kernels
@pytest.mark.parametrize("t", [1, 130])
def test_dead_keys_of_shared_prefixes(implementation, t, dtype, h):
    """Under vmap over queries alone one mask, and the NaN behind it, serve all entries."""

    def inputs(seed: int) -> dict[str, np.ndarray]:
        made = make_inputs(dtype, b=3, t=t, s=200, h=h, seed=seed)
        for name in ("key", "value"):
            made[name][:] = made[name][:1]
        return made

    seen = (np.arange(200) < 70)[None, None, None]
    check(implementation, inputs, form="vmap", shared=(1, 2), mask=seen)


@over_kernels
def test_more_queries_than_keys(implementation, dtype, h):
    """Causal: all but the last 128 rows are dead. Gradients are right, and the same again."""
    inputs = functools.partial(make_inputs, dtype, b=1, t=4096, s=128, n=2, k=1, h=h)
    check(implementation, inputs, is_causal=True, **learned(2))
    made = inputs()
    tensors = tuple(made[x] for x in ("query", "key", "value"))
    options = {"is_causal": True, "deterministic": True}
    twice = [
        measured(
            implementation, tensors, {"scale": learned(2)["scale"]}, {}, made["dout"],
            made["dlse"], (*options.items(), ("scale_bound", 10.0)),
        )
        for _ in range(2)
    ]  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, *twice)


@pytest.mark.parametrize("implementation, dtype", few_on_a_cpu([(BF16,)], every=1), ids=str)
def test_bias_over_a_large_batch(implementation, dtype):
    """As AlphaFold's: one matrix for each of many rows of an alignment, and one for each head."""
    rng, b, t, n = np.random.default_rng(4), 129, 17, 2
    inputs = functools.partial(make_inputs, dtype, b=b, t=t, s=t, n=n, h=8)
    check(implementation, inputs, bias=normal(rng, b, 1, t, t))
    check(implementation, inputs, bias=normal(rng, n, t, t))


@pytest.mark.parametrize("beyond", [10.0, -10.0, 12.0])
def test_scale_at_and_beyond_its_bound(implementation, beyond):
    """Clamped in the result; the gradient is 1 at the bound and 0 beyond it."""
    scale = np.array([beyond, 4], np.float32)
    inputs = make_inputs(F32, t=17, s=33)
    clamped = np.clip(scale, -10, 10)
    static = (("scale_bound", 10.0),)
    args = tuple(inputs[x] for x in ("query", "key", "value")), inputs["dout"], inputs["dlse"]
    tensors, dout, dlse = args
    out, lse, _, grads = measured(implementation, tensors, {"scale": scale}, {}, dout, dlse, static)
    want_out, want_lse, _, want = measured(
        implementation, tensors, {"scale": clamped}, {}, dout, dlse, static
    )
    np.testing.assert_array_equal(out, want_out)
    np.testing.assert_array_equal(lse, want_lse)
    factor = [abs(beyond) <= 10, 1]
    np.testing.assert_array_equal(grads["scale"], want["scale"] * np.array(factor, np.float32))


def test_only_visible_key_has_a_weight_of_one():
    """Exactly, in the backward of "xla" too, which divides weights by the total of the same."""
    sizes = Sizes(b=8, t=1, s=130, n=2, k=2, h=16)
    inputs, seen = make_inputs(F32, **sizes._asdict()), 37
    *_, (_, _, dv), _ = measured(
        "xla", tuple(inputs[x] for x in ("query", "key", "value")),
        {"relative_bias": normal(np.random.default_rng(1), sizes.n, sizes.s)},
        {"mask": np.arange(sizes.s) == seen}, inputs["dout"], inputs["dlse"],
        (("precision", "highest"),),
    )  # fmt: skip
    np.testing.assert_array_equal(dv[:, seen], inputs["dout"][:, 0])


@pytest.mark.parametrize("s", [1, 2, 7, 40])
@pytest.mark.parametrize("scale", [0.0, 1e-3, -0.5])
def test_scale_far_below_its_bound(implementation, scale, s):
    """Results are as exact as without a bound, which is only a promise about the scale."""
    inputs = functools.partial(make_inputs, F32, t=5, s=s, h=8)
    check(implementation, inputs, scale=np.full(2, scale, np.float32), scale_bound=19.0)


# Extreme inputs.


@pytest.mark.parametrize(
    "dtype, magnitude",
    [(F32, 1e30), (BF16, 1e30)] + [(d, m) for d in (F32, F16, BF16) for m in (1e4, 1e-4)],
    ids=lambda x: f"{x:g}" if isinstance(x, float) else str(x),
)
def test_magnitudes(implementation, dtype, magnitude):
    inputs = functools.partial(make_inputs, dtype, b=1, t=33, s=65, h=8, magnitude=magnitude)
    check(implementation, inputs, is_causal=True, **learned(2))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_zero_rows(implementation, dtype, groups):
    """Slices of norm below 1e-6 get a gradient of exactly zero."""
    half = slice(0, 16 // groups)

    def inputs_of(seed: int) -> dict[str, np.ndarray]:
        made = make_inputs(dtype, b=1, t=33, s=65, h=16, seed=seed)
        made["query"][:, 3, :, half] = 0
        made["query"][:, 5, :, half] = 1e-7  # norm below 1e-6
        made["key"][:, 7:9, :, half] = 0
        return made

    options = {"l2norm_groups": groups} | learned(2, bound=10.0 / groups)
    options["scale"] = options["scale"] / groups
    check(implementation, inputs_of, **options)

    inputs = inputs_of(0)
    tensors = tuple(inputs[x] for x in ("query", "key", "value"))
    static = (("scale_bound", options["scale_bound"]), ("l2norm_groups", groups))
    _, _, (dq, dk, _), _ = measured(
        implementation, tensors, {"scale": options["scale"]}, {}, inputs["dout"], inputs["dlse"],
        static,
    )  # fmt: skip
    assert not np.asarray(dq)[:, [3, 5], :, half].any()
    assert not np.asarray(dk)[:, 7:9, :, half].any()
    assert np.asarray(dq)[:, 4].all()


@pytest.mark.parametrize("b, t, s", [(2, 5, 0), (2, 0, 5), (0, 5, 7), (2, 0, 0)])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_empty_axes(implementation, b, t, s, dtype):
    inputs = make_inputs(dtype, b=b, t=t, s=s, h=8)
    tensors = tuple(inputs[x] for x in ("query", "key", "value"))
    static = (("is_causal", True), ("scale_bound", 10.0))
    arrays = {"mask": np.ones((b, 1, 1, s), bool), "key_value_seq_lengths": np.full(b, s, np.int32)}
    dout, dlse = np.full_like(inputs["dout"], np.nan), np.full_like(inputs["dlse"], np.nan)
    out, lse, grads, option_grads = measured(
        implementation, tensors, {"scale": learned(2)["scale"]}, arrays, dout, dlse, static
    )
    assert out.shape == (b, t, 2, 8) and out.dtype == dtype and not out.any()
    assert lse.shape == (b, t, 2) and np.isneginf(lse).all()
    for x, gradient in zip(tensors, grads, strict=True):
        assert gradient.shape == x.shape and not np.asarray(gradient).any()
    assert not np.asarray(option_grads["scale"]).any()


@pytest.mark.parametrize("name", ["plain", "everything", "mask-bias-window-lengths", "scale-100"])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_float64(implementation, name):
    options = OPTIONS[name](SMALL, np.random.default_rng(1))
    if not isinstance(options.get("scale", 1.0), float):
        options["scale"] = options["scale"].astype(np.float64)
    with jax.enable_x64(True):
        inputs = functools.partial(make_inputs, np.dtype(np.float64), **SMALL._asdict())
        check(implementation, inputs, **options)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_rows_that_nobody_normalised(implementation):
    """Without l2norm the bound is the caller's word; these implementations do not rely on it."""
    inputs = functools.partial(make_inputs, F32, h=64)
    check(implementation, inputs, l2norm_qk=False, is_causal=True)


# The batch rule of `Operands`, which only vmap uses to the full, over chunks of the batch.


@pytest.mark.parametrize("heads_per_step", [1, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_blockwise_batch_rule(monkeypatch, seed, heads_per_step):
    """Operands shorter than the batch and read through divisors equal their expansion."""
    monkeypatch.setattr(_blockwise, "BLOCK", 16)
    monkeypatch.setattr(_blockwise, "HEADS_PER_STEP", heads_per_step)
    batch, t, s, n, k, h = 12, 20, 37, 4, 2, 8
    rng = np.random.default_rng(seed)
    rules = [(1, 1), (1, 3), (12, 1), (4, 3), (3, 4), (2, 3), (3, 1), (6, 2)]
    rule = dict(zip(FIELDS, (rules[i] for i in rng.integers(0, len(rules), 11)), strict=True))
    size = {name: lead for name, (lead, _) in rule.items()}
    ops = Operands(
        q=normal(rng, size["q"], n, t, h),
        k=normal(rng, size["k"], k, s, h),
        v=normal(rng, size["v"], k, s, h),
        scale=normal(rng, size["scale"], n),
        bias=normal(rng, size["bias"], 1, t, s),
        relative_bias=normal(rng, size["relative_bias"], n, t + s - 1),
        mask=mask(rng, size["mask"], n, 1, s),
        q_lengths=rng.integers(0, t + 1, size["q_lengths"]).astype(np.int32) if seed else None,
        kv_lengths=rng.integers(0, s + 1, size["kv_lengths"]).astype(np.int32) if seed else None,
        q_segments=ids(rng, size["q_segments"], t),
        kv_segments=ids(rng, size["kv_segments"], s),
    )
    config = Config(batch=batch, layout="BNTH", is_causal=True, precision="highest")
    short = Config(**vars(config) | {"div": tuple(div for _, div in rule.values())})

    def read(name, x):
        return None if x is None else x[(np.arange(batch) // rule[name][1]) % rule[name][0]]

    whole = Operands(**{name: read(name, x) for name, x in ops._asdict().items()})
    dout, dlse = normal(rng, batch, n, t, h), normal(rng, batch, n, t)
    floats = ("q", "k", "v", "scale", "bias", "relative_bias")

    def loss(values):
        out, lse = reference_attention(whole._replace(**values), config)
        live = lse > -jnp.inf
        return jnp.sum(dout * out) + jnp.sum(jnp.where(live, dlse * lse, 0)), (out, lse)

    (_, (out, lse)), want = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        {name: getattr(whole, name) for name in floats}
    )
    got_out, got_lse, low = jax.jit(_blockwise.blockwise_fwd, static_argnums=1)(ops, short)
    np.testing.assert_allclose(got_out, out, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got_lse, lse, rtol=1e-5, atol=1e-6)

    wanted, grad_batch = floats[3:], (1, 3, 4)
    grads = jax.jit(_blockwise.blockwise_bwd, static_argnums=(6, 7, 8))(
        ops, got_out, got_lse, low, dout, dlse, short, wanted, grad_batch
    )
    for name, got, size_of in zip(floats, grads, (batch,) * 3 + grad_batch, strict=True):
        folded = np.asarray(want[name]).reshape(-1, size_of, *got.shape[1:]).sum(axis=0)
        np.testing.assert_allclose(
            got, folded, rtol=1e-4, atol=1e-5 * np.abs(folded).max(), err_msg=name
        )


@pytest.mark.parametrize(
    ("options", "lengths", "steps"),
    [
        ({}, {}, 16),
        ({"is_causal": True}, {}, 10),
        ({"window": (3, 0)}, {}, 7),
        ({}, {"kv_lengths": 20}, 8),
        ({}, {"q_lengths": 20, "kv_lengths": 16}, 2),
        ({"is_causal": True}, {"kv_lengths": 20}, 3),
        ({}, {"kv_lengths": 0}, 0),
    ],
    ids=str,
)
def test_blockwise_skips_blocks_without_a_pair(monkeypatch, options, lengths, steps):
    """Of 4 x 4 blocks, forward and backward; counted where they run, not where they are traced."""
    monkeypatch.setattr(_blockwise, "BLOCK", 16)
    allowed, seen = _blockwise._Call.allowed, []

    def counted(*args):
        jax.debug.callback(lambda: seen.append(None))
        return allowed(*args)

    monkeypatch.setattr(_blockwise._Call, "allowed", counted)
    rng = np.random.default_rng(0)
    q, k, v = normal(rng, 3, 1, 2, 64, 8)
    ops = Operands(q, k, v, np.full((1, 1), 8, np.float32))
    ops = ops._replace(**{name: int32(x) for name, x in lengths.items()})
    config = Config(batch=1, layout="BNTH", bound=8.0, **options)
    # Functions of this test's own: traces of others count elsewhere.
    results = jax.jit(lambda ops: _blockwise.blockwise_fwd(ops, config))(ops)
    jax.effects_barrier()
    assert len(seen) == steps
    seen.clear()
    backward = jax.jit(lambda *x: _blockwise.blockwise_bwd(*x, v, None, config, (), ()))
    jax.block_until_ready(backward(ops, *results))
    jax.effects_barrier()
    assert len(seen) == steps


# Gradients that are bitwise equal from run to run: on CUDA by kernels of their own.

DETERMINISTIC_OPTIONS = (
    "plain", "lengths-causal", "padded-entry-causal", "key-mask-causal",
    "key-mask-prefix-lengths-causal", "key-mask-prefix-window", "full-mask", "empty-mask", "groups",
    "normalised", "full-bias", "bias-of-all-entries", "bias-of-all-heads", "bias-matrix",
    "bias-per-key", "bias-vector", "bias-per-row", "bias-per-head", "bias-number",
    "bias-float16-causal", "bias-minus-infinity", "relative", "relative-of-all-heads",
    "relative-lengths", "relative-cutoff", "window", "window-right-lengths", "segments-causal",
    "scale-0", "scale-learned-bounded", "scale-learned-large", "mask-bias-window-lengths",
    "everything",
)  # fmt: skip


@pytest.mark.parametrize("name", DETERMINISTIC_OPTIONS)
@pytest.mark.gpu
def test_deterministic_options(name):
    check_options("cuda", name, F32, LARGE, deterministic=True)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("name", DETERMINISTIC_OPTIONS)
@pytest.mark.gpu
def test_deterministic_options_of_16_bit_inputs(name, dtype):
    check_options("cuda", name, dtype, Sizes(2, 150, 200, 4, 2, 16), deterministic=True)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("h", [20, 64, 96, 128, 200, 256])
@pytest.mark.gpu
def test_deterministic_head_dims(h, dtype):
    check_options("cuda", "everything", dtype, Sizes(2, 150, 200, 4, 2, h), deterministic=True)


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("t, s", [(1, 1), (1, 1000), (17, 63), (64, 64), (65, 129), (1000, 127)])
@pytest.mark.gpu
def test_deterministic_lengths(t, s, is_causal):
    rng = np.random.default_rng(1)
    biases = {"bias": normal(rng, 2, t, 1), "relative_bias": normal(rng, 2, t + s - 1)}
    check(
        "cuda", make_inputs(F32, t=t, s=s), is_causal=is_causal, deterministic=True,
        **biases, **learned(2),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize(
    "name", ["scale-learned-bounded", "bias-of-all-entries", "bias-number", "everything"]
)
@pytest.mark.parametrize("implementation", ["xla", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_results_repeat_bitwise(implementation, name, dtype):
    sizes = LARGE if implementation == "cuda" else SMALL
    options = OPTIONS[name](sizes, np.random.default_rng(1)) | {"deterministic": True}
    inputs = make_inputs(dtype, **sizes._asdict())
    differentiable, arrays = split(options)
    static = tuple((x, y) for x, y in options.items() if x not in differentiable | arrays)
    tensors = tuple(inputs[x] for x in ("query", "key", "value"))

    def results():
        everything = measured(
            implementation, tensors, differentiable, arrays, inputs["dout"], inputs["dlse"], static
        )
        return jax.tree.leaves(jax.tree.map(np.asarray, everything))

    first = results()
    for _ in range(20):
        for x, y in zip(results(), first, strict=True):
            np.testing.assert_array_equal(x, y)
