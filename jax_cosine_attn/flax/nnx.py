"""Cosine attention as a Flax nnx module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import DotGeneralT, Dtype, Initializer, PrecisionLike, PromoteDtypeFn, Shape

from jax_cosine_attn.flax import _core

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_ZEROS = nnx.initializers.zeros_init()


class MultiHeadCosineAttention(nnx.MultiHeadAttention):
    """`flax.nnx.MultiHeadAttention` with attention over cosine similarity.

    Every argument of the Flax module means what it means there, and the parameters have the same
    names and shapes, so checkpoints can be exchanged. Dropout while it is active, `sow_weights` and
    another `attention_fn` raise NotImplementedError. Beyond it:

    Args:
      scale: inverse temperature of the softmax over cosine similarities.
      learned_scale: learn it, one for each head, from `scale` on: the parameter
        `inverse_temperature`, float32 [num_heads]. It acts clamped to what needs no running maximum
        in the softmax: +-11 / l2norm_groups for float16, +-60 / l2norm_groups otherwise.
      l2norm_groups: normalise each of so many equal slices of the head dim instead of all of it.
      is_causal: the default of the call's `is_causal`.
      local_window_size: see `cosine_attention`; None is unlimited.
      rotary: `rotary(x, positions) -> x`, float [T, H] and int [T], turns queries and keys between
        norm and attention, before the decode cache; a `flax.nnx.RoPE` will do.
      implementation: see `cosine_attention`; None is the best available.

    The decode cache (`init_cache`, then calls with `decode=True`) takes any number of positions in
    one call: a prompt at once, then one token at a time. Attention in it is always causal. It holds
    normalised keys. Running over its end is a ValueError, or NaN where the position is only known
    inside a jitted function.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        *,
        scale: float = 8.0,
        learned_scale: bool = False,
        l2norm_groups: int = 1,
        is_causal: bool = False,
        local_window_size: _core.Window | None = None,
        rotary: _core.Rotary | None = None,
        implementation: str | tuple[str, ...] | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        broadcast_dropout: bool = True,
        dropout_rate: float = 0.0,
        deterministic: bool | None = None,
        precision: PrecisionLike = None,
        kernel_init: Initializer = nnx.nn.linear.default_kernel_init,
        out_kernel_init: Initializer | None = None,
        bias_init: Initializer = _ZEROS,
        out_bias_init: Initializer | None = None,
        use_bias: bool = True,
        attention_fn: Callable[..., jax.Array] = _core.attention_fn,
        decode: bool | None = None,
        normalize_qk: bool = False,
        qkv_promote_dtype: PromoteDtypeFn = nnx.nn.dtypes.promote_dtype,
        out_promote_dtype: PromoteDtypeFn = nnx.nn.dtypes.promote_dtype,
        ln_promote_dtype: PromoteDtypeFn = nnx.nn.dtypes.promote_dtype,
        qkv_dot_general: DotGeneralT | None = None,
        out_dot_general: DotGeneralT | None = None,
        qkv_dot_general_cls: Any = None,
        out_dot_general_cls: Any = None,
        rngs: nnx.Rngs,
        keep_rngs: bool = True,
        kernel_metadata: Mapping[str, Any] = _NOTHING,
        out_kernel_metadata: Mapping[str, Any] = _NOTHING,
        bias_metadata: Mapping[str, Any] = _NOTHING,
        out_bias_metadata: Mapping[str, Any] = _NOTHING,
        query_ln_scale_metadata: Mapping[str, Any] = _NOTHING,
        key_ln_scale_metadata: Mapping[str, Any] = _NOTHING,
    ):
        _core.reject_attention_fn(attention_fn)
        super().__init__(
            num_heads,
            in_features,
            qkv_features,
            out_features,
            num_kv_heads,
            in_kv_features,
            dtype=dtype,
            param_dtype=param_dtype,
            broadcast_dropout=broadcast_dropout,
            dropout_rate=dropout_rate,
            deterministic=deterministic,
            precision=precision,
            kernel_init=kernel_init,
            out_kernel_init=out_kernel_init,
            bias_init=bias_init,
            out_bias_init=out_bias_init,
            use_bias=use_bias,
            attention_fn=attention_fn,
            decode=decode,
            normalize_qk=normalize_qk,
            qkv_promote_dtype=qkv_promote_dtype,
            out_promote_dtype=out_promote_dtype,
            ln_promote_dtype=ln_promote_dtype,
            qkv_dot_general=qkv_dot_general,
            out_dot_general=out_dot_general,
            qkv_dot_general_cls=qkv_dot_general_cls,
            out_dot_general_cls=out_dot_general_cls,
            rngs=rngs,
            keep_rngs=keep_rngs,
            kernel_metadata=kernel_metadata,
            out_kernel_metadata=out_kernel_metadata,
            bias_metadata=bias_metadata,
            out_bias_metadata=out_bias_metadata,
            query_ln_scale_metadata=query_ln_scale_metadata,
            key_ln_scale_metadata=key_ln_scale_metadata,
        )
        self.scale = scale
        self.l2norm_groups = l2norm_groups
        self.is_causal = is_causal
        self.local_window_size = local_window_size
        self.rotary = rotary
        self.implementation = implementation
        self.inverse_temperature: nnx.Param[jax.Array] | None = (
            nnx.Param(jnp.full(num_heads, scale, jnp.float32)) if learned_scale else nnx.data(None)
        )

    def __call__(
        self,
        inputs_q: jax.Array,
        inputs_k: jax.Array | None = None,
        inputs_v: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        sow_weights: bool = False,
        decode: bool | None = None,
        is_causal: bool | None = None,
        out_sharding: Any = None,
        qkv_sharding: Any = None,
        input_positions: jax.Array | None = None,
    ) -> jax.Array:
        """Attention from inputs_q to inputs_k (default inputs_q) and inputs_v (default inputs_k).

        Args:
          inputs_q: [batch..., T, in_features].
          inputs_k, inputs_v: [batch..., S, in_kv_features].
          mask: broadcastable to [batch..., num_heads, T, S], with decode to
            [batch..., num_heads, T, cache length]; boolean, or numeric with 0 for "may not attend".
          deterministic, rngs: accepted as in Flax while no dropout follows from them.
          sow_weights: only False.
          decode: put these positions into the cache and attend to all in it; None is the module's.
          is_causal: bottom-right aligned, see `cosine_attention`; None is the module's.
          out_sharding, qkv_sharding: of the results of the output and input projections.
          input_positions: int [batch..., T], for rotary; None counts along the sequence, onwards
            from what is in the cache.

        Returns: [batch..., T, out_features].
        """
        if sow_weights:
            raise NotImplementedError(_core.NO_WEIGHTS)
        _core.reject_dropout(
            self.dropout_rate, self.deterministic if deterministic is None else deterministic
        )
        inputs_k, inputs_v = _core.self_or_cross(inputs_q, inputs_k, inputs_v)
        if inputs_q.shape[-1] != self.in_features:
            raise ValueError(
                f"inputs_q must have in_features={self.in_features} features, got {inputs_q.shape}"
            )
        query = self.query(inputs_q, out_sharding=qkv_sharding)
        key = self.key(inputs_k, out_sharding=qkv_sharding)
        value = self.value(inputs_v, out_sharding=qkv_sharding)
        if self.query_ln is not None and self.key_ln is not None:
            query, key = self.query_ln(query), self.key_ln(key)

        variables: tuple[nnx.Cache[jax.Array], ...] = ()
        if self.decode if decode is None else decode:
            variables = self._cache_variables()
        learned = self.inverse_temperature
        out, cache = _core.multi_head_attention(
            query,
            key,
            value,
            cache=_core.Cache(*(variable[...] for variable in variables)) if variables else None,
            mask=mask,
            positions=input_positions,
            dtype=self.dtype,
            precision=self.precision,
            scale=self.scale,
            inverse_temperature=None if learned is None else learned[...],
            l2norm_groups=self.l2norm_groups,
            is_causal=self.is_causal if is_causal is None else is_causal,
            local_window_size=self.local_window_size,
            rotary=self.rotary,
            implementation=self.implementation,
        )
        for variable, new in zip(variables, cache or (), strict=True):
            variable[...] = new
        return self.out(out, out_sharding=out_sharding)

    def _cache_variables(self) -> tuple[nnx.Cache[jax.Array], ...]:
        key, value, length = self.cached_key, self.cached_value, self.cache_index
        if key is None or value is None or length is None:
            raise ValueError("decode=True needs a cache: call init_cache first")
        return key, value, length

    def init_cache(self, input_shape: Shape, dtype: Dtype | None = None) -> None:
        """Make an empty decode cache.

        Args:
          input_shape: [batch..., length of the cache, features].
          dtype: of the stored keys and values; None is the module's dtype, or else float32. Give
            the dtype that the attention computes in: any other is converted at every step.
        """
        super().init_cache(input_shape, dtype or self.dtype or jnp.float32)
