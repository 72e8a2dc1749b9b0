"""The interface of the original flash-cosine-sim-attention."""

from __future__ import annotations

from typing import Any

import jax

from jax_cosine_attn._api import arguments, attend
from jax_cosine_attn._validate import check_flag, validate


def flash_cosine_sim_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None = None,
    attn_bias: jax.Array | None = None,
    scale: float | jax.Array = 8,
    groups: int = 1,
    causal: bool = False,
    l2norm_qk: bool = True,
    attn_bias_batch_dim: bool = False,
) -> jax.Array:
    """`cosine_attention` with the original's arguments and layouts, and its best implementation.

    Letters as in the original: b batch, h heads, i queries, j keys, d head dim.

    Args:
      q: [b, h, i, d], or merged [bh, i, d]; then k, v, mask and attn_bias lead with bh too.
      k: [b, h, j, d], or [b, j, d] for one head of keys and values that all queries share.
      v: like k.
      mask: bool [b, j]; True = may be attended. Unlike in the original, it combines with causal.
      attn_bias: [h, i, j], or [b, i, j] with attn_bias_batch_dim; a dim of size 1 broadcasts.
      scale: as in `cosine_attention`.
      groups: `l2norm_groups` of `cosine_attention`.
      causal: query i sees keys j <= i + (j_total - i_total), as the original has it.
      l2norm_qk: False if q and k are normalised already.
      attn_bias_batch_dim: attn_bias leads with b, not h.

    Returns:
      out, shaped and typed like q.

    Raises:
      ValueError, TypeError: as `cosine_attention` does.
    """
    return _attend(
        None, q, k, v, mask, attn_bias, scale, groups, causal, l2norm_qk, attn_bias_batch_dim
    )


def plain_cosine_sim_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None = None,
    attn_bias: jax.Array | None = None,
    scale: float | jax.Array = 8,
    groups: int = 1,
    causal: bool = False,
    l2norm_qk: bool = True,
    attn_bias_batch_dim: bool = False,
) -> jax.Array:
    """`flash_cosine_sim_attention` by the plain formula, which stores all logits.

    Args:
      q, k, v, mask, attn_bias, scale, groups, causal, l2norm_qk, attn_bias_batch_dim: as there.

    Returns:
      out, shaped and typed like q: [b, h, i, d], or merged [bh, i, d].

    Raises:
      ValueError, TypeError: as `cosine_attention` does.
    """
    return _attend(
        "reference", q, k, v, mask, attn_bias, scale, groups, causal, l2norm_qk, attn_bias_batch_dim
    )


def _attend(
    implementation: str | None,
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    attn_bias: Any,
    scale: Any,
    groups: Any,
    causal: Any,
    l2norm_qk: Any,
    attn_bias_batch_dim: Any,
) -> jax.Array:
    check_flag("attn_bias_batch_dim", attn_bias_batch_dim)
    _check_rank("q", q, {4: "[b, h, i, d]", 3: "[bh, i, d]"})
    merged = len(q.shape) == 3
    kv_axes = {3: "[bh, j, d]"} if merged else {4: "[b, h, j, d]", 3: "[b, j, d]"}
    _check_rank("k", k, kv_axes)
    _check_rank("v", v, kv_axes)
    if mask is not None:
        _check_rank("mask", mask, {2: "[b, j]"})
        mask = mask[:, None, None, :]
    if attn_bias is not None:
        over_batch = merged or attn_bias_batch_dim
        _check_rank("attn_bias", attn_bias, {3: "[b, i, j]" if over_batch else "[h, i, j]"})
        attn_bias = attn_bias[:, None] if over_batch else attn_bias[None]
    q, k, v = (x[:, None] if len(x.shape) == 3 else x for x in (q, k, v))
    given = arguments(
        q,
        k,
        v,
        attn_bias,
        mask,
        scale=scale,
        l2norm_qk=l2norm_qk,
        l2norm_groups=groups,
        is_causal=causal,
        implementation=implementation,
    )
    out = attend(*validate(layout="BNTH", **given))
    return out[:, 0] if merged else out


def _check_rank(name: str, x: Any, axes: dict[int, str]) -> None:
    if not hasattr(x, "shape"):
        raise TypeError(f"{name} must be an array, got {x!r}")
    if len(x.shape) not in axes:
        raise ValueError(f"{name} must be {' or '.join(axes.values())}, got {x.shape}")
