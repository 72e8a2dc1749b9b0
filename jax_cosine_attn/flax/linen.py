"""Cosine attention as a Flax linen module."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from jax_cosine_attn.flax import _core


class MultiHeadCosineAttention(nn.MultiHeadDotProductAttention):
    """`flax.linen.MultiHeadDotProductAttention` with attention over cosine similarity.

    Every attribute and argument of the Flax module means what it means there, and the parameters
    have the same names and shapes, so checkpoints can be exchanged. Dropout while it is active,
    `sow_weights`, the einsum hooks and another `attention_fn` raise NotImplementedError.
    `force_fp32_for_softmax` changes nothing: it is float32 in any case.

    Attributes:
      num_kv_heads: key and value heads, a divisor of num_heads; None is num_heads.
      scale: inverse temperature of the softmax over cosine similarities.
      learned_scale: learn it, one for each head, from `scale` on: the parameter
        `inverse_temperature`, float32 [num_heads]. It acts clamped to what needs no running maximum
        in the softmax: +-11 / l2norm_groups for float16, +-60 / l2norm_groups otherwise.
      l2norm_groups: normalise each of so many equal slices of the head dim instead of all of it.
      is_causal: causal attention, bottom-right aligned.
      local_window_size: see `cosine_attention`; None is unlimited.
      rotary: `rotary(x, positions) -> x`, float [T, H] and int [T], turns queries and keys between
        norm and attention, before the decode cache.
      implementation: see `cosine_attention`; None is the best available.

    With `decode`, `init` makes a cache as long as its input, and calls that have the collection
    "cache" mutable take any number of positions: a prompt at once, then one token at a time.
    Attention in it is always causal. It holds normalised keys. Running over its end is a
    ValueError, or NaN where the position is only known inside a jitted function.
    """

    attention_fn: Callable[..., jax.Array] = _core.attention_fn
    num_kv_heads: int | None = None
    scale: float = 8.0
    learned_scale: bool = False
    l2norm_groups: int = 1
    is_causal: bool = False
    local_window_size: _core.Window | None = None
    rotary: _core.Rotary | None = None
    implementation: str | tuple[str, ...] | None = None

    @nn.compact
    def __call__(
        self,
        inputs_q: jax.Array,
        inputs_k: jax.Array | None = None,
        inputs_v: jax.Array | None = None,
        *,
        inputs_kv: jax.Array | None = None,
        mask: jax.Array | None = None,
        deterministic: bool | None = None,
        dropout_rng: jax.Array | None = None,
        sow_weights: bool = False,
    ) -> jax.Array:
        """Attention from inputs_q to inputs_k (default inputs_q) and inputs_v (default inputs_k).

        Args:
          inputs_q: [batch..., T, features].
          inputs_k, inputs_v: [batch..., S, features].
          inputs_kv: the older way to give both.
          mask: broadcastable to [batch..., num_heads, T, S], with decode to
            [batch..., num_heads, T, cache length]; boolean, or numeric with 0 for "may not attend".
          deterministic, dropout_rng: accepted as in Flax while no dropout follows from them.
          sow_weights: only False.

        Returns: [batch..., T, out_features].
        """
        self._reject(sow_weights, deterministic)
        if inputs_kv is not None:
            if inputs_k is not None or inputs_v is not None:
                raise ValueError("inputs_kv replaces inputs_k and inputs_v: give one or the other")
            inputs_k = inputs_v = inputs_kv
        inputs_k, inputs_v = _core.self_or_cross(inputs_q, inputs_k, inputs_v)

        query, key, value = self._project(inputs_q, inputs_k, inputs_v)
        cache = self._cache(key, value) if self.decode else None
        learned = (
            self.param(
                "inverse_temperature",
                nn.initializers.constant(self.scale),
                (self.num_heads,),
                jnp.float32,
            )
            if self.learned_scale
            else None
        )
        out, cache = _core.multi_head_attention(
            query,
            key,
            value,
            cache=cache,
            mask=mask,
            positions=None,
            dtype=self.dtype,
            precision=self.precision,
            scale=self.scale,
            inverse_temperature=learned,
            l2norm_groups=self.l2norm_groups,
            is_causal=self.is_causal,
            local_window_size=self.local_window_size,
            rotary=self.rotary,
            implementation=self.implementation,
        )
        if cache is not None:
            self.put_variable("cache", "cached_key", cache.key)
            self.put_variable("cache", "cached_value", cache.value)
            self.put_variable("cache", "cache_index", cache.length)
        return nn.DenseGeneral(
            features=self.out_features or inputs_q.shape[-1],
            axis=(-2, -1),
            kernel_init=self.out_kernel_init or self.kernel_init,
            bias_init=self.out_bias_init or self.bias_init,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            dot_general=self.out_dot_general,
            dot_general_cls=self.out_dot_general_cls,
            name="out",
        )(out)

    def _reject(self, sow_weights: bool, deterministic: bool | None) -> None:
        """Raise for what a fused attention cannot do."""
        if sow_weights:
            raise NotImplementedError(_core.NO_WEIGHTS)
        _core.reject_attention_fn(self.attention_fn)
        _core.reject_hooks(
            qk_attn_weights_einsum_cls=self.qk_attn_weights_einsum_cls,
            attn_weights_value_einsum_cls=self.attn_weights_value_einsum_cls,
        )
        if self.dropout_rate > 0.0:
            deterministic = nn.merge_param("deterministic", self.deterministic, deterministic)
        _core.reject_dropout(self.dropout_rate, deterministic)

    def _project(
        self, inputs_q: jax.Array, inputs_k: jax.Array, inputs_v: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Query [batch..., T, N, H], key and value [batch..., S, K, H], LayerNorm included."""
        kv_heads = self.num_kv_heads or self.num_heads
        features = self.qkv_features or inputs_q.shape[-1]
        if features % self.num_heads or self.num_heads % kv_heads:
            raise ValueError(
                f"qkv_features={features} must be a multiple of num_heads={self.num_heads}, and "
                f"that of num_kv_heads={kv_heads}"
            )
        dense = functools.partial(
            nn.DenseGeneral,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            use_bias=self.use_bias,
            precision=self.precision,
            dot_general=self.qkv_dot_general,
            dot_general_cls=self.qkv_dot_general_cls,
        )
        head_dim = features // self.num_heads
        query = dense((self.num_heads, head_dim), name="query")(inputs_q)
        key = dense((kv_heads, head_dim), name="key")(inputs_k)
        value = dense((kv_heads, head_dim), name="value")(inputs_v)
        if self.normalize_qk:
            norm = functools.partial(
                nn.LayerNorm, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype
            )
            query, key = norm(name="query_ln")(query), norm(name="key_ln")(key)
        return query, key, value

    def _cache(self, key: jax.Array, value: jax.Array) -> _core.Cache | None:
        """The cache to append to; None when this call is the one that makes it."""
        is_initialised = self.has_variable("cache", "cached_key")
        cached_key = self.variable("cache", "cached_key", jnp.zeros, key.shape, key.dtype)
        cached_value = self.variable("cache", "cached_value", jnp.zeros, value.shape, value.dtype)
        index = self.variable("cache", "cache_index", jnp.zeros, (), jnp.int32)
        if not is_initialised:
            return None
        return _core.Cache(cached_key.value, cached_value.value, index.value)
