"""The CUDA kernels as traceable JAX functions.

Loads the extension, registers its FFI targets and says what it cannot do. Importing this module
never fails: whatever keeps the kernels away is kept as the text of `build_problem`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np

from jax_cosine_attn._config import FIELDS, Config, Operands, shapes

_MAX_HEAD_DIM = 256
_LONGEST_QUERY_BLOCK = 128  # per-row numbers are padded to a multiple of every block
_ROW_STATS = 3  # RowStat in cuda/kernels/params.h
# Operands the kernels read; the order is that of the FFI handlers, absent ones are passed empty.
_OPERANDS = ("q", "k", "v", "scale", "mask", "q_lengths", "kv_lengths")
_EMPTY = {"mask": jnp.bool_, "q_lengths": jnp.int32, "kv_lengths": jnp.int32}


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    """The extension with its targets registered, or None and the reason."""
    try:
        extension = importlib.import_module("jax_cosine_attn._cuda")
        built_against = extension.build_info()["jaxlib"]
        # A runtime older than the headers refuses the whole CUDA backend at the first JAX call,
        # where it can no longer be caught.
        if _release(jaxlib.version.__version__) < _release(built_against):
            return None, (
                f"the CUDA kernels were built against jaxlib {built_against} and cannot run on the "
                f"older jaxlib {jaxlib.version.__version__}; upgrade jax or rebuild"
            )
        for name, capsule in extension.registrations().items():
            jax.ffi.register_ffi_target(name, capsule, platform="CUDA")
    except Exception as error:
        return None, f"the CUDA kernels are not available: {type(error).__name__}: {error}"
    return extension, None


def build_problem() -> str | None:
    """Why the kernels are unavailable in this installation, or None."""
    return _load()[1]


def has_cuda_kernels() -> bool:
    """Whether this installation has CUDA kernels. A GPU is not asked for."""
    return build_problem() is None


def show_config() -> dict[str, dict[str, Any]]:
    """Prints, and returns, what the kernels were built for and what they would run on."""
    extension, problem = _load()
    config: dict[str, dict[str, Any]] = {
        "build": {"cuda_kernels": problem or "available"},
        "runtime": {
            "jax": jax.__version__,
            "jaxlib": jaxlib.version.__version__,
            "devices": [str(device.device_kind) for device in jax.devices()],
        },
    }
    if extension is not None:
        config["build"] |= extension.build_info()
    for section, entries in config.items():
        print(f"{section}:")
        for name, value in entries.items():
            print(f"  {name}: {value}")
    return config


def why_not_cuda(ops: Operands, config: Config) -> str | None:
    """Why the kernels cannot do this call, or None; reads shapes and dtypes only."""
    head_dim = shapes(ops, config)[-1]
    problem = build_problem()
    if problem is not None:
        return problem
    if ops.q.dtype == jnp.float64:
        return "the CUDA kernels do not support float64"
    if head_dim > _MAX_HEAD_DIM:
        return f"the CUDA kernels support head dims up to {_MAX_HEAD_DIM}, got H={head_dim}"
    if ops.bias is not None:
        return f"the CUDA kernels do not support bias, got {ops.bias.shape}"
    if ops.relative_bias is not None:
        return f"the CUDA kernels do not support relative_bias, got {ops.relative_bias.shape}"
    if ops.mask is not None and ops.mask.shape[2] != 1:
        return f"the CUDA kernels support key-padding masks only, got mask {ops.mask.shape}"
    if ops.q_segments is not None:
        return "the CUDA kernels do not support segment_ids"
    if config.window is not None:
        return f"the CUDA kernels do not support local_window_size, got {config.window}"
    if config.deterministic:
        return "the CUDA kernels do not support deterministic=True"
    return None


def _constant_shift(dtype: Any, bound: float | None) -> float | None:
    """c of exp(logit - c) that loses no row and overflows nowhere for |logit| <= bound; None: the
    kernels need a running maximum.

    float16 weights: exp(-11) is the last to keep some digits, exp(11.09) the largest. float32:
    exp(-2 * 63 + 40) is still a normal number. bfloat16 has float32's range, but there the unit
    rows of the forward, in float16, and of the backward, in bfloat16, must differ by little.
    """
    largest = {jnp.dtype(jnp.float16): 11.0, jnp.dtype(jnp.bfloat16): 16.0}.get(dtype, 63.0)
    return None if bound is None or bound > largest else max(0.0, bound - 40.0)


def _call(
    target: str,
    results: Sequence[jax.ShapeDtypeStruct],
    ops: Operands,
    extra: Sequence[jax.Array],
    config: Config,
    **attributes: Any,
) -> Sequence[jax.Array]:
    if ops.mask is not None:  # [., 1|N, 1, S]
        s = shapes(ops, config)[2]
        ops = ops._replace(mask=jnp.broadcast_to(ops.mask, (*ops.mask.shape[:3], s)))
    operands = [
        jnp.zeros((0,), _EMPTY[field]) if (x := getattr(ops, field)) is None else x
        for field in _OPERANDS
    ]
    return jax.ffi.ffi_call(target, results)(
        *operands,
        *extra,
        heads_first=config.layout == "BNTH",
        l2norm_qk=config.l2norm_qk,
        groups=np.int32(config.groups),
        is_causal=config.is_causal,
        three_passes=_three_passes(config),
        div=np.array([config.div[FIELDS.index(field)] for field in _OPERANDS], np.int64),
        **attributes,
    )


def _three_passes(config: Config) -> bool:
    """float32 products in three TF32 passes; attribute of every call, meaningful for float32."""
    return config.precision != "default"


def _padded(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def _hats(ops: Operands, config: Config, dtype: Any) -> list[jax.ShapeDtypeStruct]:
    """Scratch of the pre-passes: q^ and k^, and v in rows of a multiple of 8 where H is not one."""
    t, n, s, k, h = shapes(ops, config)
    row = _padded(h, 8)
    return [
        jax.ShapeDtypeStruct((config.batch, n, t, row), dtype),
        jax.ShapeDtypeStruct((ops.k.shape[0], k, s, row), dtype),
        jax.ShapeDtypeStruct((ops.v.shape[0], k, 0 if row == h else s, row), ops.v.dtype),
    ]


def cuda_fwd(ops: Operands, config: Config) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(out, lse, lse_low) from the kernels, the latter two float32 [B, N, T]."""
    t, n, _, _, _ = shapes(ops, config)
    dtype = ops.q.dtype
    shift = _constant_shift(dtype, config.bound)
    # Unit vectors need no range: float16 keeps three bits more of them than bfloat16.
    hat = jnp.float16 if dtype == jnp.bfloat16 and shift is not None else dtype
    rows = jax.ShapeDtypeStruct((config.batch, n, t), jnp.float32)
    results = [
        jax.ShapeDtypeStruct((config.batch, *ops.q.shape[1:]), dtype),
        rows,
        rows,
        *_hats(ops, config, hat),
    ]
    out, lse, lse_low, *_ = _call(
        "jax_cosine_attn_fwd",
        results,
        ops,
        (),
        config,
        shift=np.float32(shift or 0),
        running_max=shift is None,
    )
    return out, lse, lse_low


def cuda_bwd(
    ops: Operands,
    out: jax.Array,
    lse: jax.Array,
    lse_low: jax.Array,
    dout: jax.Array,
    dlse: jax.Array | None,
    config: Config,
    wanted: tuple[str, ...],
    grad_batch: tuple[int, ...],
) -> tuple[jax.Array, ...]:
    """(dq, dk, dv, and the gradient of each operand in wanted) from the kernels."""
    t, n, s, k, h = shapes(ops, config)
    batch, dtype, row = config.batch, ops.q.dtype, _padded(h, 8)
    padded_t = _padded(t, _LONGEST_QUERY_BLOCK)
    # Three passes accumulate in float64: two float32 each, which needs no jax_enable_x64.
    accum = 2 * row if dtype == jnp.float32 and _three_passes(config) else row
    dscale_shape = (grad_batch[0], n) if wanted else (0, n)  # only scale: biases are refused
    results = [
        jax.ShapeDtypeStruct((batch, *ops.q.shape[1:]), dtype),
        jax.ShapeDtypeStruct((batch, *ops.k.shape[1:]), dtype),
        jax.ShapeDtypeStruct((batch, *ops.v.shape[1:]), dtype),
        jax.ShapeDtypeStruct(dscale_shape, jnp.float32),
        *_hats(ops, config, dtype),
        jax.ShapeDtypeStruct((batch, n, 0 if row == h else t, row), dtype),  # dout, padded
        jax.ShapeDtypeStruct((batch, n, t, config.groups), jnp.float32),  # inverse norms of q
        jax.ShapeDtypeStruct((ops.k.shape[0], k, s, config.groups), jnp.float32),  # and of k
        jax.ShapeDtypeStruct((batch, n, _ROW_STATS, padded_t), jnp.float32),
        jax.ShapeDtypeStruct((batch, n, t if wanted else 0, 2), jnp.float32),  # sums over keys
        jax.ShapeDtypeStruct((batch, n, t, accum), jnp.float32),  # dq accumulator
    ]
    extra = (out, lse, lse_low, dout, jnp.zeros((0,), jnp.float32) if dlse is None else dlse)
    dq, dk, dv, dscale, *_ = _call("jax_cosine_attn_bwd", results, ops, extra, config)
    return (dq, dk, dv, dscale) if wanted else (dq, dk, dv)
