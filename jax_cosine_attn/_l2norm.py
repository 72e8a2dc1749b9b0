"""l2 normalisation of rows, in one piece or in groups."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

EPS = 1e-6  # the norm is clamped here; a slice below it has gradient exactly zero


def accumulation_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """float64 for float64, float32 for every other float: sums are never kept in 16 bits."""
    return jnp.promote_types(dtype, jnp.float32)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def normalize(x: jax.Array, groups: int) -> jax.Array:
    """`l2norm` in the accumulation dtype, without checks: what the implementations multiply."""
    y = _slices(x, groups)
    # Squares of values beyond 1e19 overflow float32 and below 1e-19 vanish, so every slice is first
    # divided by a power of two near its largest entry, which changes no digit.
    largest = jnp.max(jnp.abs(y), axis=-1, keepdims=True, initial=1e-30)
    divisor = lax.reduce_precision(0.5 * largest, jnp.finfo(y.dtype).nexp, mantissa_bits=0)
    unit = y / divisor
    norm = jnp.sqrt(jnp.sum(unit * unit, axis=-1, keepdims=True))
    is_zero = norm * divisor < EPS
    return jnp.where(is_zero, y / EPS, unit / jnp.where(is_zero, 1, norm)).reshape(x.shape)


@normalize.defjvp
def _normalize_jvp(
    groups: int, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The part of dx orthogonal to u = x / ||x||, over the norm; 0 where the norm is clamped.

    Written out because the derivative of the quotient takes a difference of large numbers: its
    float32 error is several times this one's. One component alone is 1 or -1, whatever its length.
    """
    (x,), (dx,) = primals, tangents
    out = normalize(x, groups)
    if x.shape[-1] == groups:
        return out, jnp.zeros_like(out)
    u, y, dy = (_slices(z, groups) for z in (out, x, dx))
    norm = jnp.sum(u * y, axis=-1, keepdims=True)
    is_zero = norm < EPS
    norm = jnp.where(is_zero, 1, norm)
    du = (dy - u * jnp.sum(u * dy, axis=-1, keepdims=True)) / norm
    return out, jnp.where(is_zero, 0, du).reshape(x.shape)


def _slices(x: jax.Array, groups: int) -> jax.Array:
    """[.., H] to [.., groups, H / groups] in the accumulation dtype."""
    shape = (*x.shape[:-1], groups, x.shape[-1] // groups)
    return x.astype(accumulation_dtype(x.dtype)).reshape(shape)


def l2norm(x: jax.Array, groups: int = 1) -> jax.Array:
    """x / max(||x||, 1e-6) over the last axis, or over each of `groups` equal slices of it.

    Args:
      x: [..., H], any float dtype. Norms are taken in float32 (float64 for float64) and neither
        overflow nor underflow, whatever the magnitude of x.
      groups: number of contiguous slices of H that are normalised separately.
    Returns:
      [..., H], dtype of x. Differentiable in every mode; a slice whose norm is below 1e-6 has
      gradient exactly zero.
    Raises:
      TypeError: x is not floating point, or groups is not an integer.
      ValueError: x has no axis, or groups does not divide H.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"l2norm needs a floating-point array; got {x.dtype} {x.shape}")
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"groups must be an int; got {groups!r}")
    if x.ndim == 0:
        raise ValueError("l2norm needs an array of at least one axis; got shape ()")
    if groups < 1 or x.shape[-1] % groups:
        raise ValueError(
            f"groups={groups} must be positive and divide H={x.shape[-1]}; got x {x.shape}"
        )
    return normalize(x, groups).astype(x.dtype)


def l2norm_tensors(*xs: jax.Array, groups: int = 1) -> tuple[jax.Array, ...]:
    """`l2norm` of each argument: `q, k = l2norm_tensors(q, k)`.

    Args:
      *xs: arrays [..., H], each of any float dtype and with an H of its own.
      groups: as in `l2norm`, of all of them.
    Returns:
      A tuple of arrays, each shaped and typed like its argument.
    Raises:
      TypeError, ValueError: as `l2norm` does.
    """
    return tuple(l2norm(x, groups) for x in xs)
