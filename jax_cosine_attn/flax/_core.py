"""What the nnx and the linen module share: everything between the projections.

Letters: `[batch...]` any number of leading dimensions, none included; B their product; T queries,
S keys, L positions of a decode cache; N query heads, K key/value heads; H head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, PrecisionLike

from jax_cosine_attn import cosine_attention, l2norm

Rotary = Callable[[jax.Array, jax.Array], jax.Array]
Window = int | tuple[int | None, int | None]


class Cache(NamedTuple):
    """Keys and values of the positions decoded so far.

    Keys are stored as the attention wants them, normalised and rotated, so that no later step does
    either again.
    """

    key: jax.Array  # [batch..., L, K, H]
    value: jax.Array  # [batch..., L, K, H]
    length: jax.Array  # int32 []: number of positions written


def attention_fn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Dtype | None = None,
    precision: PrecisionLike = None,
    module: Any = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable[..., jax.Array] | None = None,
    qk_attn_weights_einsum: Callable[..., jax.Array] | None = None,
    attn_weights_value_einsum: Callable[..., jax.Array] | None = None,
    is_causal: bool = False,
    *,
    scale: float | jax.Array = 8.0,
    scale_bound: float | None = None,
    l2norm_groups: int = 1,
    local_window_size: Window | None = None,
    implementation: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """Cosine attention with the signature of Flax's `dot_product_attention`.

    Pass it as `attention_fn` to `flax.nnx.MultiHeadAttention` or to
    `flax.linen.MultiHeadDotProductAttention`; `functools.partial` sets the keywords after
    `is_causal`, which mean what they mean in `cosine_attention`.

    Args:
      query: [batch..., T, N, H].
      key, value: [batch..., S, K, H], with N a multiple of K.
      bias: broadcastable to [batch..., N, T, S].
      mask: broadcastable to [batch..., N, T, S], boolean, or numeric with 0 for "may not attend" as
        Flax's mask helpers make them. Rows that may attend to nothing give 0.
      broadcast_dropout, dropout_rng, dropout_rate, deterministic: accepted while no dropout
        follows from them.
      dtype: computation and result in this dtype; None promotes query, key and value together.
      precision: of float32 products, see `cosine_attention`.
      module: the module to sow attention weights into; they are never formed, so only None.
      force_fp32_for_softmax: accepted, the softmax is float32 in any case.
      einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum: only None.
      is_causal: bottom-right aligned: query i sees keys j <= i + (S - T).

    Returns: [batch..., T, N, H].

    Raises:
      NotImplementedError: active dropout, attention weights to be sown, einsum hooks.
      ValueError, TypeError: from `cosine_attention`.
    """
    reject_dropout(dropout_rate, deterministic)
    if module is not None:
        raise NotImplementedError(NO_WEIGHTS)
    reject_hooks(
        einsum_dot_general=einsum_dot_general,
        qk_attn_weights_einsum=qk_attn_weights_einsum,
        attn_weights_value_einsum=attn_weights_value_einsum,
    )
    query, key, value = promote_dtype(query, key, value, dtype=dtype)
    return attend(
        query,
        key,
        value,
        bias=bias,
        mask=mask,
        is_causal=is_causal,
        precision=precision,
        scale=scale,
        scale_bound=scale_bound,
        l2norm_groups=l2norm_groups,
        local_window_size=local_window_size,
        implementation=implementation,
    )


NO_WEIGHTS = "sow_weights: attention weights are never stored, so there is nothing to sow"


def reject_dropout(rate: float, deterministic: bool | None) -> None:
    """Raise unless attention dropout is off."""
    if rate > 0.0 and deterministic is None:
        raise ValueError(f"dropout_rate is {rate}, and deterministic is neither True nor False")
    if rate > 0.0 and not deterministic:
        raise NotImplementedError(
            f"cosine attention has no attention dropout; got dropout_rate={rate} with "
            "deterministic=False"
        )


def reject_hooks(**hooks: Any) -> None:
    """Raise for every hook that would replace a part of the fused attention."""
    for name, hook in hooks.items():
        if hook is not None:
            raise NotImplementedError(f"{name} cannot be replaced in a fused attention; got {hook}")


def reject_attention_fn(given: Callable[..., jax.Array]) -> None:
    """Raise for an attention that is not this library's."""
    if given is not attention_fn:
        raise NotImplementedError(
            f"attention_fn={given}: a cosine attention module has its own; Flax's takes any"
        )


def self_or_cross(
    inputs_q: jax.Array, inputs_k: jax.Array | None, inputs_v: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The inputs of keys and values, with Flax's defaults for those left out."""
    if inputs_k is None:
        if inputs_v is not None:
            raise ValueError("inputs_v without inputs_k; for the same value in both give inputs_k")
        inputs_k = inputs_q
    return inputs_k, inputs_k if inputs_v is None else inputs_v


def multi_head_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    cache: Cache | None,
    mask: jax.Array | None,
    positions: jax.Array | None,
    dtype: Dtype | None,
    precision: PrecisionLike,
    scale: float,
    inverse_temperature: jax.Array | None,
    l2norm_groups: int,
    is_causal: bool,
    local_window_size: Window | None,
    rotary: Rotary | None,
    implementation: str | tuple[str, ...] | None,
) -> tuple[jax.Array, Cache | None]:
    """Attention of projected heads, through the cache if there is one.

    Args:
      query: [batch..., T, N, H].
      key, value: [batch..., S, K, H].
      cache: the keys and values before these; then S == T, attention is causal, and the T
        positions follow those written.
      mask: broadcastable to [batch..., N, T, S], or to [batch..., N, T, L] with a cache.
      positions: [batch..., T], for rotary in self-attention; None counts along the sequence,
        onwards from the cache's length, the last query at the last key.
      scale: the fixed inverse temperature, or where the learned one starts.
      inverse_temperature: learned, float32 [N], or None.
      rotary: as in the modules.

    Returns: [batch..., T, N, H] and the cache with these keys and values in it.
    """
    query, key, value = promote_dtype(query, key, value, dtype=dtype)
    if positions is not None and rotary is None:
        raise ValueError("input_positions are for rotary embeddings, but rotary is None")

    # The kernels normalise best themselves. Only what has to happen between the norm and the
    # attention takes it out of them.
    normalise_here = cache is not None or rotary is not None
    if normalise_here:
        query, key = l2norm(query, groups=l2norm_groups), l2norm(key, groups=l2norm_groups)
    if rotary is not None:
        start = 0 if cache is None else cache.length
        query, key = _rotate(query, key, positions, start, rotary)

    length = overflow = None
    if cache is not None:
        steps = query.shape[-3]
        if key.shape[-3] != steps:
            raise ValueError(
                f"decoding appends one key per query, got {steps} queries, {key.shape[-3]} keys"
            )
        cache, overflow = _append(cache, key, value)
        key, value, length = cache.key, cache.value, cache.length
        query, key, value = promote_dtype(query, key, value, dtype=query.dtype)

    out = attend(
        query,
        key,
        value,
        mask=mask,
        kv_length=length,
        # The last query stands at the last key written, so bottom-right causality also keeps the
        # unwritten rest of the cache out, without a [T, L] mask.
        is_causal=is_causal or cache is not None,
        local_window_size=local_window_size,
        l2norm_qk=not normalise_here,
        l2norm_groups=l2norm_groups,
        precision=precision,
        implementation=implementation,
        **_scale_options(scale, inverse_temperature, query.dtype, l2norm_groups),
    )
    if overflow is not None:
        out = jnp.where(overflow, jnp.nan, out)
    return out, cache


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    kv_length: jax.Array | None = None,
    **options: Any,
) -> jax.Array:
    """`cosine_attention` over any leading dimensions.

    Args:
      query, key, value: [batch..., T, N, H], [batch..., S, K, H] twice.
      bias, mask: broadcastable to [batch..., N, T, S]; a mask of any dtype.
      kv_length: int32 [], the number of keys that exist, of the S there is memory for.
    """
    batch = query.shape[:-3]
    if query.ndim < 3 or key.shape[:-3] != batch or value.shape[:-3] != batch:
        raise ValueError(
            "query, key and value are [batch..., length, heads, head dim] with the same batch; got "
            f"{query.shape}, {key.shape} and {value.shape}"
        )
    if mask is not None:
        mask = _merge_batch(mask.astype(bool), batch, "mask")
    if bias is not None:
        bias = _merge_batch(bias, batch, "bias")
    size = math.prod(batch)
    if kv_length is not None:
        options["key_value_seq_lengths"] = jnp.broadcast_to(kv_length, (size,))
    query, key, value = (x.reshape(size, *x.shape[-3:]) for x in (query, key, value))
    out = cosine_attention(query, key, value, bias, mask, **options)
    return out.reshape(*batch, *out.shape[-3:])


def _merge_batch(x: jax.Array, batch: tuple[int, ...], name: str) -> jax.Array:
    """[batch..., N, T, S] as [B, N, T, S], or as [1, N, T, S] where x is the same for all of it."""
    missing = len(batch) + 3 - x.ndim
    if missing < 0:
        raise ValueError(
            f"{name} must broadcast to [batch..., heads, queries, keys] with batch {batch}; "
            f"got {x.shape}"
        )
    x = x.reshape((1,) * missing + x.shape)
    lead, rest = x.shape[:-3], x.shape[-3:]
    if math.prod(lead) != 1:
        x = jnp.broadcast_to(x, batch + rest)
    return x.reshape(math.prod(x.shape[:-3]), *rest)


def _append(cache: Cache, key: jax.Array, value: jax.Array) -> tuple[Cache, jax.Array]:
    """The cache with key and value [batch..., T, K, H] written behind its last position.

    Also returns whether they ran over its end, bool []. Outside of a trace that is an error here;
    inside one the caller has to spoil the result, because XLA would shift the write silently.
    """
    *batch, max_length, heads, head_dim = cache.key.shape
    steps = key.shape[-3]
    if key.shape != (*batch, steps, heads, head_dim):
        raise ValueError(
            f"the decode cache was made for keys {(*batch, 'T', heads, head_dim)}, got {key.shape}"
        )
    written = None if isinstance(cache.length, jax.core.Tracer) else int(cache.length)
    if steps > max_length or (written is not None and written + steps > max_length):
        raise ValueError(
            f"the decode cache holds {max_length} positions: cannot add {steps} to "
            f"{'those in it' if written is None else written}"
        )
    start: tuple[int | jax.Array, ...] = (*(0,) * len(batch), cache.length, 0, 0)
    new = Cache(
        jax.lax.dynamic_update_slice(cache.key, key.astype(cache.key.dtype), start),
        jax.lax.dynamic_update_slice(cache.value, value.astype(cache.value.dtype), start),
        cache.length + steps,
    )
    return new, new.length > max_length


def _rotate(
    query: jax.Array,
    key: jax.Array,
    positions: jax.Array | None,
    start: int | jax.Array,
    rotary: Rotary,
) -> tuple[jax.Array, jax.Array]:
    """Query and key turned to their positions; norms, and so the bound on logits, stay."""
    t, s = query.shape[-3], key.shape[-3]
    if positions is None:
        key_positions = start + jnp.arange(s)
        query_positions = start + jnp.arange(s - t, s)
    elif t == s:
        query_positions = key_positions = positions
    else:
        raise ValueError(f"input_positions need as many queries as keys; got {t} and {s}")

    def turn(x: jax.Array, at: jax.Array) -> jax.Array:
        over_heads = jax.vmap(rotary, in_axes=(-2, None), out_axes=-2)
        if at.ndim == 1:
            over_batch = jax.vmap(over_heads, in_axes=(0, None))
        else:
            over_batch = jax.vmap(over_heads)
            at = jnp.broadcast_to(at, x.shape[:-2]).reshape(-1, at.shape[-1])
        merged = x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])
        return over_batch(merged, at).reshape(x.shape).astype(x.dtype)

    return turn(query, query_positions), turn(key, key_positions)


def _scale_options(
    scale: float, inverse_temperature: jax.Array | None, dtype: Dtype, groups: int
) -> dict[str, Any]:
    """How `cosine_attention` gets the scale, fixed or learned."""
    if inverse_temperature is None:
        return {"scale": scale}
    # Under this bound on the logits no softmax needs a running maximum: float16 weights hold
    # exp(11) = 59874 < 65504, and float32 sums of exp(60) stay far below their range.
    bound = (11.0 if dtype == jnp.float16 else 60.0) / groups
    if abs(scale) > bound:
        raise ValueError(
            f"a learned scale stays in [-{bound}, {bound}] for {jnp.dtype(dtype).name} and "
            f"l2norm_groups={groups}, so it cannot start at scale={scale}"
        )
    return {"scale": inverse_temperature, "scale_bound": bound}
