"""The plain O(T S) formula: every option, readable, differentiable in every mode."""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
from jax import lax

from jax_cosine_attn._config import Config, Operands, shapes
from jax_cosine_attn._l2norm import accumulation_dtype, normalize

PRECISION = {
    "default": lax.Precision.DEFAULT,
    "high": lax.Precision.HIGH,
    "highest": lax.Precision.HIGHEST,
}


def reference_attention(ops: Operands, config: Config) -> tuple[jax.Array, jax.Array]:
    """Softmax attention over cosine similarity from the stored [B, N, T, S] logits.

    Everything between the inputs and the final cast is float32 (float64 for float64 inputs).

    Args:
      ops: operands with leading dims 1 or B, all of divisor 1.
      config: static description of the call.
    Returns:
      out, shape and dtype of q with the full batch, and lse [B, N, T].
    """
    t, n, s, k_heads, h = shapes(ops, config)
    group = n // max(k_heads, 1)
    dtype = accumulation_dtype(ops.q.dtype)
    # Products of 16-bit inputs run at full float32 precision: a reference has no reason not to.
    precision = PRECISION[config.precision if ops.q.dtype == jnp.float32 else "highest"]
    product = functools.partial(jnp.einsum, precision=precision)

    def heads_first(x: jax.Array) -> jax.Array:
        return x.swapaxes(1, 2) if config.layout == "BTNH" else x

    bias = _bias(ops, config, t, s, dtype)
    allowed = _allowed(ops, config, t, s) & (bias != -jnp.inf)  # [B|1, N|1, T, S]
    live_row = jnp.any(allowed, axis=3, keepdims=True)  # [B|1, N|1, T, 1]
    live_key = jnp.any(allowed, axis=2)[..., None]  # [B|1, N|1, S, 1]
    if live_key.shape[1] == n:
        live_key = live_key.reshape(live_key.shape[0], k_heads, group, s, 1).any(axis=2)

    # Dead rows and keys are replaced before anything touches them, so that neither their NaNs nor
    # 0 * NaN in a transposed product can reach a live value or a gradient.
    q = jnp.where(live_row, heads_first(ops.q), 0)
    k = jnp.where(live_key, heads_first(ops.k), 0)
    v = jnp.where(live_key, heads_first(ops.v), 0).astype(dtype)
    if config.l2norm_qk:
        q, k = normalize(q, config.groups), normalize(k, config.groups)
    q, k, v = (jnp.broadcast_to(x, (config.batch, *x.shape[1:])).astype(dtype) for x in (q, k, v))

    q = q.reshape(config.batch, k_heads, group, t, h)
    cosine = product("bkgth,bksh->bkgts", q, k).reshape(config.batch, n, t, s)
    scale = jnp.broadcast_to(ops.scale[..., None, None], (config.batch, n, t, 1))

    def logits_of(cosine: jax.Array) -> jax.Array:
        return jnp.where(allowed, scale * cosine + bias, -jnp.inf)

    # Measured from a row's mean cosine, which cancels out: what rounding adds to all gradients of
    # a row then adds nothing to the gradient of scale.
    p = jnp.where(live_row, jax.nn.softmax(lax.stop_gradient(logits_of(cosine))), 0)
    mean = lax.stop_gradient(jnp.sum(p * cosine, axis=3, keepdims=True))
    logits = logits_of(cosine - mean)

    shift = lax.stop_gradient(jnp.max(logits, axis=3, keepdims=True, initial=-jnp.inf))
    p = jnp.exp(logits - jnp.where(live_row, shift, 0))
    row_sum = jnp.where(live_row, p.sum(axis=3, keepdims=True), 1)
    # Weights before the product: the gradient of a row with one key, 0, then cancels exactly.
    p = (p / row_sum).reshape(config.batch, k_heads, group, t, s)
    out = product("bkgts,bksh->bkgth", p, v).reshape(config.batch, n, t, h)
    out = jnp.where(live_row, out, 0)
    lse = jnp.where(live_row, shift + jnp.log(row_sum) + scale * mean, -jnp.inf)[..., 0]
    return heads_first(out.astype(ops.v.dtype)), lse


def _distance(ops: Operands, t: int, s: int) -> jax.Array:
    """Aligned j - i - (S_b - T_b): int32 [B|1, 1, T, S]."""
    t_b = jnp.full((1,), t) if ops.q_lengths is None else ops.q_lengths
    s_b = jnp.full((1,), s) if ops.kv_lengths is None else ops.kv_lengths
    return jnp.arange(s) - jnp.arange(t)[:, None] - (s_b - t_b)[:, None, None, None]


def _bias(ops: Operands, config: Config, t: int, s: int, dtype: jnp.dtype) -> jax.Array:
    """bias + relative_bias: [B|1, N|1, T|1, S|1]."""
    total = jnp.zeros((1, 1, 1, 1), dtype)
    if ops.bias is not None:
        total = ops.bias.astype(dtype)
    if ops.relative_bias is not None:
        within = ops
        if ops.q_lengths is not None:
            within = ops._replace(q_lengths=jnp.minimum(ops.q_lengths, t))
        index = t - 1 - _distance(within, t, s)[:, 0]  # [B|1, T, S]
        index = jnp.clip(index, 0, max(t + s - 2, 0))
        row = ops.relative_bias.astype(dtype)
        index, row = (jnp.broadcast_to(x, (config.batch, *x.shape[1:])) for x in (index, row))
        total = total + jax.vmap(lambda r, i: r[:, i])(row, index)
    return total


def _allowed(ops: Operands, config: Config, t: int, s: int) -> jax.Array:
    """Which query may attend which key: bool [B|1, N|1, T, S]."""
    terms = [jnp.ones((1, 1, t, s), bool)]
    if ops.mask is not None:
        terms.append(ops.mask)
    if ops.q_lengths is not None:
        terms.append(jnp.arange(t)[:, None] < ops.q_lengths[:, None, None, None])
    if ops.kv_lengths is not None:
        terms.append(jnp.arange(s) < ops.kv_lengths[:, None, None, None])
    if ops.q_segments is not None and ops.kv_segments is not None:
        terms.append(ops.q_segments[:, None, :, None] == ops.kv_segments[:, None, None, :])
    left, right = config.window or (None, None)
    if config.is_causal:
        right = 0 if right is None else min(right, 0)
    if left is not None:
        terms.append(_distance(ops, t, s) >= -left)
    if right is not None:
        terms.append(_distance(ops, t, s) <= right)
    return functools.reduce(operator.and_, terms)
