"""Every error of shape, dtype or range, raised before an implementation is chosen."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_cosine_attn._config import Config, Operands

IMPLEMENTATIONS = ("cuda", "xla", "reference")
MAX_HEAD_DIM = 256

_FLOATS = (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)
# What jax.lax.DotAlgorithmPreset, a value of jax_default_matmul_precision too, means for float32.
_ALGORITHMS: dict[str, Literal["default", "high", "highest"]] = {
    "TF32_TF32_F32": "high",
    "BF16_BF16_F32_X3": "highest",  # more digits than TF32, which "high" is on a GPU
    "BF16_BF16_F32_X6": "highest",
    "BF16_BF16_F32_X9": "highest",
    "TF32_TF32_F32_X3": "highest",
    "F32_F32_F32": "highest",
    "F64_F64_F64": "highest",
}


class Static(NamedTuple):
    """What is known of a valid call before its arrays are: hashable, a jit key."""

    config: Config
    scale: float | None  # None: scale is an array
    scale_bound: float | None  # what an array scale is clamped to
    candidates: tuple[str, ...]  # implementations: the first that supports the call
    return_residual: bool


def validate(
    *,
    layout: Literal["BTNH", "BNTH"],
    query: Any,
    key: Any,
    value: Any,
    bias: Any,
    mask: Any,
    scale: Any,
    scale_bound: Any,
    l2norm_qk: Any,
    l2norm_groups: Any,
    is_causal: Any,
    local_window_size: Any,
    query_seq_lengths: Any,
    key_value_seq_lengths: Any,
    segment_ids: Any,
    relative_bias: Any,
    precision: Any,
    deterministic: Any,
    implementation: Any,
    return_residual: Any,
) -> tuple[Operands, Static]:
    """The arrays of a call of `cosine_attention` as they were given, and the rest of it.

    Arrays may be abstract. A static scale leaves `Operands.scale` at None.

    Raises:
      ValueError: a shape, a range or a name is wrong.
      TypeError: a dtype or a Python type is wrong.
    """
    candidates = _candidates(implementation)
    check_flag("l2norm_qk", l2norm_qk)
    check_flag("is_causal", is_causal)
    check_flag("deterministic", deterministic)
    check_flag("return_residual", return_residual)

    dtype = _check_query_key_value(query, key, value, layout)
    single = len(query.shape) == 3
    batch = () if single else tuple(query.shape[:1])
    (t, n, h), (s, k, _) = query.shape[-3:], key.shape[-3:]
    if layout == "BNTH":
        t, n, s, k = n, t, k, s
    got = f"got query {query.shape}, key {key.shape}"
    if n % k if k else n:
        raise ValueError(f"query heads (N={n}) must be a multiple of key heads (K={k}); {got}")
    if not 1 <= h <= MAX_HEAD_DIM:
        raise ValueError(f"head dim must be from 1 to {MAX_HEAD_DIM}, got H={h}; {got}")
    groups = _integer("l2norm_groups", l2norm_groups, minimum=1)
    if h % groups:
        raise ValueError(f"head dim (H={h}) must be a multiple of l2norm_groups={groups}; {got}")

    full = ("[N, T, S]" if single else "[B, N, T, S]", (*batch, n, t, s))
    if bias is not None:
        _check_dtype("bias", bias, _FLOATS)
        _check_broadcast("bias", bias, *full)
    if mask is not None:
        _check_dtype("mask", mask, (jnp.bool_,))
        _check_broadcast("mask", mask, *full)
    if relative_bias is not None:
        distances = max(t + s - 1, 0)
        _check_dtype("relative_bias", relative_bias, _FLOATS)
        if relative_bias.shape not in ((n, distances), (1, distances)):
            raise ValueError(
                f"relative_bias must be [N, T + S - 1] = {(n, distances)} or [1, T + S - 1] = "
                f"{(1, distances)}, got {relative_bias.shape}"
            )

    lead = "" if single else "B"
    q_lengths = _lengths("query_seq_lengths", query_seq_lengths, lead, batch)
    kv_lengths = _lengths("key_value_seq_lengths", key_value_seq_lengths, lead, batch)
    q_segments, kv_segments = _segments(
        segment_ids, "" if single else "B, ", (*batch, t), (*batch, s)
    )

    scale_bound = _scale_bound(scale_bound)
    static_scale = _static_scale(scale, scale_bound, dtype)
    if static_scale is None:
        _check_array_scale(scale, dtype, n)
    bound = scale_bound if static_scale is None else abs(static_scale)
    config = Config(
        batch=1 if single else query.shape[0],
        layout=layout,
        l2norm_qk=bool(l2norm_qk),
        groups=groups,
        is_causal=bool(is_causal),
        window=_window(local_window_size),
        bound=None if bound is None else bound * groups,
        precision=_precision(precision),
        deterministic=bool(deterministic) or _deterministic_by_flag(),
        implementation=_primitive_choice(candidates),
    )
    array_scale: Any = scale if static_scale is None else None
    raw = Operands(
        q=query,
        k=key,
        v=value,
        scale=array_scale,
        bias=bias,
        relative_bias=relative_bias,
        mask=mask,
        q_lengths=q_lengths,
        kv_lengths=kv_lengths,
        q_segments=q_segments,
        kv_segments=kv_segments,
    )
    return raw, Static(config, static_scale, scale_bound, candidates, bool(return_residual))


def _dtype(name: str, x: Any) -> np.dtype:
    """The dtype x has inside JAX."""
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise TypeError(f"{name} must be an array, got {x!r}")
    if jnp.issubdtype(x.dtype, np.number):
        return jax.dtypes.canonicalize_dtype(x.dtype)
    return x.dtype


def _check_dtype(name: str, x: Any, allowed: Sequence[Any]) -> np.dtype:
    dtype = _dtype(name, x)
    if dtype not in allowed:
        expected = " or ".join(jnp.dtype(a).name for a in allowed)
        raise TypeError(f"{name} must be {expected}, got {dtype} of shape {x.shape}")
    return dtype


def check_flag(name: str, flag: Any) -> None:
    if not isinstance(flag, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {flag!r}")


def _check_query_key_value(query: Any, key: Any, value: Any, layout: str) -> np.dtype:
    dtypes = [
        _check_dtype(name, x, _FLOATS)
        for name, x in [("query", query), ("key", key), ("value", value)]
    ]
    if len(set(dtypes)) > 1:
        q_dtype, k_dtype, v_dtype = dtypes
        raise TypeError(
            "query, key and value must have the same dtype; "
            f"got query {q_dtype}, key {k_dtype}, value {v_dtype}"
        )
    got = f"got query {query.shape}, key {key.shape}, value {value.shape}"
    ranks, q_axes, k_axes = {
        "BTNH": ((4, 3), "[B, T, N, H] or [T, N, H]", "[B, S, K, H] or [S, K, H]"),
        "BNTH": ((4,), "[B, N, T, H]", "[B, K, S, H]"),
    }[layout]
    rank = len(query.shape)
    if rank not in ranks:
        raise ValueError(f"query must be {q_axes}; {got}")
    if len(key.shape) != rank or len(value.shape) != rank:
        raise ValueError(f"key and value must be {k_axes}, of the rank of query; {got}")
    if key.shape != value.shape:
        raise ValueError(f"key and value must have the same shape; {got}")
    if rank == 4 and query.shape[0] != key.shape[0]:
        raise ValueError(
            f"query and key must have the same batch (B={query.shape[0]} and {key.shape[0]}); {got}"
        )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            "query and key must have the same head dim "
            f"(H={query.shape[-1]} and {key.shape[-1]}); {got}"
        )
    return dtypes[0]


def _check_broadcast(name: str, x: Any, axes: str, target: tuple[int, ...]) -> None:
    sizes = target[len(target) - len(x.shape) :]
    if len(x.shape) > len(target) or any(
        size not in (1, full) for size, full in zip(x.shape, sizes, strict=True)
    ):
        raise ValueError(f"{name} must broadcast to {axes} = {target}, got {x.shape}")


def _check_int32(name: str, x: Any, axes: str, shape: tuple[int, ...]) -> None:
    _check_dtype(name, x, (jnp.int32,))
    if x.shape != shape:
        raise ValueError(f"{name} must be {axes} = {shape}, got {x.shape}")


def _lengths(name: str, x: Any, lead: str, batch: tuple[int, ...]) -> Any:
    if x is None:
        return None
    if isinstance(x, int) and not isinstance(x, bool):
        x = np.int32(np.clip(x, -1, 2**31 - 1))  # clamped to the real length later
    _check_int32(name, x, f"[{lead}]", batch)
    return x


def _segments(
    x: Any, lead: str, query_shape: tuple[int, ...], key_shape: tuple[int, ...]
) -> tuple[Any, Any]:
    if x is None:
        return None, None
    if isinstance(x, tuple | list):
        if len(x) != 2:
            raise ValueError(f"segment_ids must be one array or a (query, key) pair, got {len(x)}")
        _check_int32("segment_ids[0]", x[0], f"[{lead}T]", query_shape)
        _check_int32("segment_ids[1]", x[1], f"[{lead}S]", key_shape)
        return x[0], x[1]
    if query_shape != key_shape:
        raise ValueError(
            f"one segment_ids array serves T == S only; got T={query_shape[-1]}, "
            f"S={key_shape[-1]}: pass the pair ([{lead}T], [{lead}S])"
        )
    _check_int32("segment_ids", x, f"[{lead}T]", query_shape)
    return x, x


def _real(x: Any) -> bool:
    """x is a Python or NumPy real scalar, so static."""
    return isinstance(x, int | float | np.integer | np.floating) and not isinstance(x, bool)


def _float(x: Any) -> float:
    """Of a real scalar; NumPy's narrow ones would compare in their own precision."""
    try:
        return float(x)
    except OverflowError:  # of an int
        return math.inf


def _scale_bound(bound: Any) -> float | None:
    if bound is None:
        return None
    if not _real(bound):
        raise TypeError(f"scale_bound must be a Python float, got {bound!r}")
    value = _float(bound)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"scale_bound must be positive and finite, got {bound}")
    return value


def _static_scale(scale: Any, bound: float | None, dtype: np.dtype) -> float | None:
    """The value of a scale known when tracing, None for an array."""
    if not _real(scale):
        return None
    largest = float(jnp.finfo(jnp.float64 if dtype == jnp.float64 else jnp.float32).max)
    value = _float(scale)
    if not abs(value) <= largest:
        raise ValueError(f"scale must be finite, got {scale}")
    if bound is not None and abs(value) > bound:
        raise ValueError(f"scale={scale} lies beyond scale_bound={bound}")
    return value


def _check_array_scale(scale: Any, dtype: np.dtype, n: int) -> None:
    if isinstance(scale, bool) or not hasattr(scale, "dtype"):
        raise TypeError(f"scale must be a float or an array, got {scale!r}")
    allowed = (jnp.float32, jnp.float64) if dtype == jnp.float64 else (jnp.float32,)
    _check_dtype("scale", scale, allowed)
    if scale.shape not in ((), (n,)):
        raise ValueError(f"an array scale must be [] or [N] = {(n,)}, got {scale.shape}")
    if isinstance(scale, np.ndarray) and not np.isfinite(scale).all():
        raise ValueError(f"scale must be finite, got {scale}")


def _integer(name: str, x: Any, minimum: int) -> int:
    if isinstance(x, bool | np.bool_) or not isinstance(x, int | np.integer):
        raise TypeError(f"{name} must be an int, got {x!r}")
    if x < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {x}")
    return int(x)


def _window(size: Any) -> tuple[int | None, int | None] | None:
    if size is None:
        return None
    sides = size if isinstance(size, tuple | list) else (size, size)
    if len(sides) != 2:
        raise ValueError(f"local_window_size must be an int or (left, right), got {size!r}")
    left, right = (
        None if side is None else _integer("local_window_size", side, minimum=0) for side in sides
    )
    return None if left is None and right is None else (left, right)


def _precision(precision: Any) -> Literal["default", "high", "highest"]:
    """float32 precision as one of three names; None is JAX's own default."""
    if precision is None:
        config: Any = jax.config
        precision = config.jax_default_matmul_precision or "default"
    if (
        isinstance(precision, tuple | list) and precision
    ):  # of the two sides of a product: the stricter one
        levels: Any = ("default", "high", "highest")
        return max(map(_precision, precision), key=levels.index)
    if isinstance(precision, jax.lax.DotAlgorithmPreset):
        precision = precision.name
    if isinstance(precision, str) and precision in jax.lax.DotAlgorithmPreset.__members__:
        return _ALGORITHMS.get(precision, "default")
    try:
        name: Any = jax.lax.Precision(precision).name.lower()
    except (ValueError, TypeError):  # TypeError: not hashable
        raise ValueError(
            "precision must be None, a jax.lax.Precision or one of its names "
            f"('default', 'high', 'highest', ...), got {precision!r}"
        ) from None
    return name


def _deterministic_by_flag() -> bool:
    """Whether XLA is told to be deterministic; of a repeated flag the last one counts."""
    state = {"xla_gpu_deterministic_ops": False, "xla_gpu_exclude_nondeterministic_ops": False}
    for flag in os.environ.get("XLA_FLAGS", "").split():
        name, _, value = flag.lstrip("-").partition("=")
        if name in state:
            state[name] = value.lower() in ("", "true", "1")
    return any(state.values())


def _candidates(implementation: Any) -> tuple[str, ...]:
    """Implementations to try: one, or "cuda" and what serves where the kernels do not."""
    if implementation is None:
        return ("cuda", "xla")
    if not isinstance(implementation, str | Sequence):
        raise TypeError(
            f"implementation must be a name or a sequence of names, got {implementation!r}"
        )
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    for name in names:
        if name not in IMPLEMENTATIONS:
            raise ValueError(
                f"implementation must be None or among {IMPLEMENTATIONS}, got {implementation!r}"
            )
    if not names:
        raise ValueError(f"implementation names none of {IMPLEMENTATIONS}, got {implementation!r}")
    if names[0] != "cuda":
        return names[:1]  # "xla" and "reference" support every call
    return ("cuda", *[name for name in names if name != "cuda"][:1])


def _primitive_choice(candidates: tuple[str, ...]) -> Literal["auto", "cuda", "xla"]:
    if candidates == ("cuda", "xla"):
        return "auto"
    return "cuda" if candidates[0] == "cuda" else "xla"
