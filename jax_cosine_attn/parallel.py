"""Attention whose keys are spread over several calls or devices."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def merge_partials(
    outs: Sequence[jax.Array] | jax.Array, lses: Sequence[jax.Array] | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Attention over the union of disjoint key sets, from attention over each of them.

    Exact and associative: a result can be merged again. Where no part attends a key, lse is -inf,
    out is 0 and gradients are 0.

    Args:
      outs: outputs, each [B, T, N, H] (or [T, N, H]), or one array of them stacked on axis 0.
      lses: their log-sum-exps in natural units, each [B, T, N] (or [T, N]), stacked likewise.

    Returns:
      (out, lse): out in the dtype of outs, lse float32 (float64 for float64 outs).

    Raises:
      ValueError: no parts, as many outs as lses are not given, or shapes do not match.
    """
    if len(outs) != len(lses) or len(outs) == 0:
        raise ValueError(
            f"merge_partials needs as many outs as lses; got {len(outs)} and {len(lses)}"
        )
    for out, lse in zip(outs, lses, strict=True):
        if out.shape[:-1] != lse.shape or out.shape != outs[0].shape:
            raise ValueError(
                "every out must be [B, T, N, H] and its lse [B, T, N]; got "
                f"outs {[x.shape for x in outs]}, lses {[x.shape for x in lses]}"
            )
    dtype = jnp.result_type(*outs)
    accumulated = jnp.promote_types(dtype, jnp.float32)
    out = jnp.stack([x.astype(accumulated) for x in outs])
    lse = jnp.stack([x.astype(accumulated) for x in lses])

    # Each `where` guards one quotient or exponential at -inf; the values it replaces and their
    # gradients are finite, so no NaN is multiplied by zero on the way back.
    live = lse > -jnp.inf
    any_live = live.any(axis=0)
    shift = jax.lax.stop_gradient(jnp.where(any_live, lse.max(axis=0), 0))
    weight = jnp.where(live, jnp.exp(jnp.where(live, lse - shift, 0)), 0)
    total = jnp.where(any_live, weight.sum(axis=0), 1)
    merged = (weight[..., None] * jnp.where(live[..., None], out, 0)).sum(axis=0) / total[..., None]
    merged = jnp.where(any_live[..., None], merged, 0)
    return merged.astype(dtype), jnp.where(any_live, shift + jnp.log(total), -jnp.inf)
