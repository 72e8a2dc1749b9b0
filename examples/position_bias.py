"""Position biases for cosine attention in O(T + S) memory: ALiBi, T5's buckets, a small network.

    python examples/position_bias.py

Each is a function of the distance. Over `distances(t, s)` it gives the `relative_bias` of
`cosine_attention`, [N, T + S - 1], and the matrix [N, T, S] that this stands for exists nowhere.

Run as a script it trains a layer of attention with each of them, and without any, on a task that
asks for the latest of several matching keys: without positions no attention can tell which that is.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jax_cosine_attn import cosine_attention

Bias = Callable[[Any, jax.Array], jax.Array]  # (parameters, distance [...]) -> [N, ...]


def distances(t: int, s: int) -> jax.Array:
    """Distance that each entry of a relative bias is for: 1 - T, ..., S - 1.

    Positive looks back. The last query stands at the last key, so its distance to key j is
    S - 1 - j. Lengths given to `cosine_attention` change which entry a pair reads, not this.
    """
    return jnp.arange(1 - t, s)


def alibi_slopes(heads: int) -> jax.Array:
    """The slopes of "Train Short, Test Long" (Press, Smith and Lewis, ICLR 2022): [N].

    For a power of two they are 2^(-8/N), 2^(-16/N), ..., 2^-8; other numbers of heads take those of
    the power below, then every second one of the power above.
    """
    below = 2 ** int(math.log2(heads))
    exponents = [8 * i / below for i in range(1, below + 1)]
    exponents += [8 * i / (2 * below) for i in range(1, 2 * (heads - below), 2)]
    return 2.0 ** -jnp.array(exponents)


def alibi(slopes: jax.Array, distance: jax.Array) -> jax.Array:
    """-slope * |distance|. The paper keeps the slopes [N] fixed; they may as well be learned."""
    return -jnp.multiply.outer(slopes, jnp.abs(distance))


def t5_buckets(
    distance: jax.Array, *, buckets: int = 32, farthest: int = 128, bidirectional: bool = False
) -> jax.Array:
    """Bucket of each distance (Raffel et al., JMLR 2020): one each for short distances, then
    logarithmically wider ones, the last for `farthest` and beyond. Keys ahead of the query share
    bucket 0, or have the upper half of the buckets if bidirectional.
    """
    sides = 2 if bidirectional else 1
    each = buckets // sides
    exact = each // 2
    # The distance at which each bucket but the first begins, in Python's own floats: a float32
    # logarithm could put a distance right at an edge into either bucket.
    growth = (farthest / exact) ** (1 / (each - exact))
    begin = [*range(1, exact), *(math.ceil(exact * growth**i - 1e-9) for i in range(each - exact))]
    back = jnp.abs(distance) if bidirectional else jnp.maximum(distance, 0)
    bucket = jnp.searchsorted(jnp.array(begin), back, side="right")
    return jnp.where(distance < 0, (sides - 1) * each, 0) + bucket


def t5(table: jax.Array, distance: jax.Array, **options: Any) -> jax.Array:
    """A learned number for each head and bucket: table [N, buckets]; options of `t5_buckets`."""
    return table[:, t5_buckets(distance, buckets=table.shape[1], **options)]


class DynamicBias(NamedTuple):
    """Parameters of a perceptron from a distance to one number per head."""

    first: jax.Array  # [width]
    first_offset: jax.Array  # [width]
    second: jax.Array  # [width, width]
    second_offset: jax.Array  # [width]
    last: jax.Array  # [width, N]


def init_dynamic(key: jax.Array, heads: int, width: int = 32) -> DynamicBias:
    normal = functools.partial(jax.random.normal, dtype=jnp.float32)
    first, offset, second, last = jax.random.split(key, 4)
    return DynamicBias(
        normal(first, (width,)),
        normal(offset, (width,)),
        normal(second, (width, width)) / math.sqrt(width),
        jnp.zeros(width),
        normal(last, (width, heads)) / math.sqrt(width),
    )


def dynamic(params: DynamicBias, distance: jax.Array) -> jax.Array:
    """A small network over the distance, run on T + S - 1 numbers and not on T S pairs.

    The "1d dynamic positional bias" that flash-cosine-sim-attention had on its list; the logarithm
    is that of Swin Transformer V2 (Liu et al., CVPR 2022), and carries over to longer inputs.
    """
    x = jnp.sign(distance) * jnp.log1p(jnp.abs(distance))
    x = jax.nn.silu(x[..., None] * params.first + params.first_offset)
    x = jax.nn.silu(x @ params.second + params.second_offset)
    return jnp.moveaxis(x @ params.last, -1, 0)


# The task: every step writes a value into one of a few registers and reads a register; the answer
# is the value written to it last.
REGISTERS, VALUES = 8, 16
HEADS, HEAD_DIM = 4, 32


class Batch(NamedTuple):
    """All int32 [B, T]; an answer is -1 where nothing has been written yet."""

    reads: jax.Array
    writes: jax.Array
    values: jax.Array
    answers: jax.Array


def make_batch(key: jax.Array, size: int, length: int) -> Batch:
    keys = jax.random.split(key, 3)
    reads, writes, values = (
        jax.random.randint(key, (size, length), 0, below)
        for key, below in zip(keys, (REGISTERS, REGISTERS, VALUES), strict=True)
    )

    def step(memory: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        read, write, value = now
        memory = memory.at[write].set(value)
        return memory, memory[read]

    run = jax.vmap(lambda *now: jax.lax.scan(step, jnp.full(REGISTERS, -1), now)[1])
    return Batch(reads, writes, values, run(reads, writes, values))


def init(key: jax.Array) -> dict[str, jax.Array]:
    """Embeddings of what is read, written and stored, and the way from heads to an answer."""
    shapes = {
        "read": (REGISTERS, HEADS, HEAD_DIM),
        "write": (REGISTERS, HEADS, HEAD_DIM),
        "value": (VALUES, HEADS, HEAD_DIM),
        "answer": (HEADS, HEAD_DIM, VALUES),
    }
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.normal(key, shape) / math.sqrt(HEAD_DIM)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def loss(params: dict[str, Any], bias: Bias | None, batch: Batch) -> jax.Array:
    """Mean cross-entropy of the answers; that of guessing is log(VALUES) = 2.77."""
    length = batch.reads.shape[1]
    out = cosine_attention(
        params["read"][batch.reads],
        params["write"][batch.writes],
        params["value"][batch.values],
        scale=16.0,
        is_causal=True,
        relative_bias=bias and bias(params["bias"], distances(length, length)),
    )
    logits = jnp.einsum("btnh,nha->bta", out, params["answer"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.answers.clip(0))
    return losses.mean(where=batch.answers >= 0)


def train(
    bias: Bias | None, bias_params: Any, *, steps: int, batch_size: int, length: int
) -> float:
    """Loss after training, on a batch of twice the length that was trained on."""
    params: dict[str, Any] = init(jax.random.key(0)) | {"bias": bias_params}
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, steps))

    @jax.jit
    def step(params: Any, state: Any, key: jax.Array) -> tuple[Any, Any]:
        batch = make_batch(key, batch_size, length)
        updates, state = optimizer.update(jax.grad(loss)(params, bias, batch), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for key in jax.random.split(jax.random.key(1), steps):
        params, state = step(params, state, key)
    held_out = make_batch(jax.random.key(2), batch_size, 2 * length)
    return float(jax.jit(loss, static_argnums=1)(params, bias, held_out))


# (function, initial parameters)
BIASES: dict[str, tuple[Bias | None, Callable[[], Any]]] = {
    "none": (None, tuple),
    "alibi": (alibi, lambda: alibi_slopes(HEADS)),
    "t5": (t5, lambda: jnp.zeros((HEADS, 32))),
    "dynamic": (dynamic, lambda: init_dynamic(jax.random.key(3), HEADS)),
}


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Trains with each bias; prints and returns the losses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bias", nargs="+", choices=BIASES, default=list(BIASES))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    options = vars(parser.parse_args(argv))
    print(f"guessing: loss {math.log(VALUES):.3f}")
    losses = {}
    for name in options.pop("bias"):
        bias, init_bias = BIASES[name]
        losses[name] = train(bias, init_bias(), **options)
        print(f"{name}: loss {losses[name]:.3f} on twice the length trained on", flush=True)
    return losses


if __name__ == "__main__":
    main()
