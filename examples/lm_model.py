"""A byte-level GPT in Flax nnx whose attention is jax_cosine_attn's module, and its sampler."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jax_cosine_attn.flax.nnx import MultiHeadCosineAttention

VOCABULARY = 256  # bytes


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What a model is; everything but `remat` and `dtype` decides the shape of its parameters."""

    layers: int
    width: int
    heads: int
    norm: Literal["pre", "post"]
    attention: Literal["cosine", "softmax"]
    scale: float  # these three are for cosine attention
    learned_scale: bool
    l2norm_groups: int
    dtype: Literal["float32", "bfloat16"]
    remat: bool  # recompute each block in the backward pass: O(T width) memory for all layers


def rotary(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary position embedding: pairs (i, i + H/2) of x [T, H] turn with position [T]."""
    half = x.shape[-1] // 2
    frequency = 1e4 ** (-jnp.arange(half) / half)
    angle = positions[:, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[:, :half], x[:, half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class SoftmaxAttention(nnx.Module):
    """The same layer with jax.nn.dot_product_attention, to compare with."""

    def __init__(self, heads: int, width: int, *, dtype: Any, rngs: nnx.Rngs):
        head = (heads, width // heads)
        project = functools.partial(nnx.LinearGeneral, width, head, dtype=dtype, rngs=rngs)
        self.query, self.key, self.value = project(), project(), project()
        self.out = nnx.LinearGeneral(head, width, axis=(-2, -1), dtype=dtype, rngs=rngs)
        self.head = head

    def init_cache(self, input_shape: tuple[int, int, int], dtype: Any) -> None:
        shape = (*input_shape[:-1], *self.head)
        self.cached_key = nnx.Cache(jnp.zeros(shape, dtype))
        self.cached_value = nnx.Cache(jnp.zeros(shape, dtype))
        self.cache_index = nnx.Cache(jnp.array(0))

    def __call__(self, x: jax.Array, *, decode: bool) -> jax.Array:  # [B, T, width]
        start = self.cache_index[...] if decode else jnp.array(0)
        positions = start + jnp.arange(x.shape[1])
        turn = jax.vmap(jax.vmap(rotary, (-2, None), -2), (0, None))  # over heads, over the batch
        query, key = turn(self.query(x), positions), turn(self.key(x), positions)
        value, mask = self.value(x), None
        if decode:
            write = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
            self.cached_key[...] = key = write(self.cached_key[...], key, start)
            self.cached_value[...] = value = write(self.cached_value[...], value, start)
            self.cache_index[...] = start + x.shape[1]
            mask = jnp.arange(key.shape[1]) <= positions[:, None]
        return self.out(
            jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=not decode)
        )


def make_attention(
    config: ModelConfig, rngs: nnx.Rngs
) -> SoftmaxAttention | MultiHeadCosineAttention:
    if config.attention == "softmax":
        return SoftmaxAttention(config.heads, config.width, dtype=config.dtype, rngs=rngs)
    return MultiHeadCosineAttention(
        config.heads,
        config.width,
        scale=config.scale,
        learned_scale=config.learned_scale,
        l2norm_groups=config.l2norm_groups,
        is_causal=True,
        rotary=rotary,
        dtype=config.dtype,
        rngs=rngs,
    )


class Block(nnx.Module):
    """Attention and a two-layer perceptron, each with a residual and a norm before or after it."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        width = config.width
        options: dict[str, Any] = {"dtype": config.dtype, "rngs": rngs}
        self.pre_norm = config.norm == "pre"
        self.attention_norm = nnx.LayerNorm(width, **options)
        self.attention = make_attention(config, rngs)
        self.mlp_norm = nnx.LayerNorm(width, **options)
        self.mlp_in = nnx.Linear(width, 4 * width, **options)
        self.mlp_out = nnx.Linear(4 * width, width, **options)

    def __call__(self, x: jax.Array, decode: bool) -> jax.Array:  # [B, T, width]
        if self.pre_norm:
            x = x + self.attention(self.attention_norm(x), decode=decode)
            return x + self.mlp(self.mlp_norm(x))
        x = self.attention_norm(x + self.attention(x, decode=decode))
        return self.mlp_norm(x + self.mlp(x))

    def mlp(self, x: jax.Array) -> jax.Array:
        return self.mlp_out(jax.nn.gelu(self.mlp_in(x)))


class GPT(nnx.Module):
    """Next-byte model: bytes [B, T] to logits, float32 [B, T, 256]."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(VOCABULARY, config.width, dtype=config.dtype, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.LayerNorm(config.width, dtype=config.dtype, rngs=rngs)
        self.head = nnx.Linear(config.width, VOCABULARY, dtype=config.dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array, *, decode: bool = False) -> jax.Array:
        x = self.embed(tokens.astype(jnp.int32))
        for block in self.blocks:
            if self.config.remat and not decode:
                x = nnx.remat(lambda block, x: block(x, decode=False))(block, x)
            else:
                x = block(x, decode=decode)
        return self.head(self.norm(x)).astype(jnp.float32)

    def init_cache(self, batch: int, length: int) -> None:
        """An empty decode cache in every block."""
        for block in self.blocks:
            block.attention.init_cache((batch, length, self.config.width), self.config.dtype)


def bits_per_byte(model: GPT, windows: jax.Array) -> jax.Array:
    """Mean cross-entropy of every byte of windows [B, T + 1] but the first, in bits."""
    log_p = jax.nn.log_softmax(model(windows[:, :-1]))
    target = windows[:, 1:, None].astype(jnp.int32)
    return -jnp.take_along_axis(log_p, target, axis=-1).mean() / math.log(2)


@functools.partial(jax.jit, static_argnames=("graphdef", "length"))
def generate(
    graphdef: nnx.GraphDef[GPT],
    params: nnx.State,
    prompt: jax.Array,
    key: jax.Array,
    *,
    length: int,
    temperature: float = 1.0,
) -> jax.Array:
    """Continue prompts, bytes [B, P], by `length` sampled bytes: uint8 [B, length].

    The prompt goes through the decode cache in one call, every further byte in one step.
    """
    model = nnx.merge(graphdef, params)
    batch, prompt_length = prompt.shape
    model.init_cache(batch, prompt_length + length)
    logits = model(prompt, decode=True)[:, -1]
    stateless, cache, *rest = nnx.split(model, nnx.Cache, ...)

    def step(carry: tuple[Any, jax.Array], key: jax.Array) -> tuple[Any, jax.Array]:
        cache, logits = carry
        token = jax.random.categorical(key, logits / temperature)
        model = nnx.merge(stateless, cache, *rest)
        logits = model(token[:, None], decode=True)[:, -1]
        return (nnx.state(model, nnx.Cache), logits), token.astype(jnp.uint8)

    _, tokens = jax.lax.scan(step, (cache, logits), jax.random.split(key, length))
    return tokens.T
