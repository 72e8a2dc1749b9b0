"""What one attention call is: its data operands and its static description."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp


class Operands(NamedTuple):
    """Data operands of the primitives; None = absent.

    Batch entry b of the call reads operand x at `x[(b // div_x) % x.shape[0]]`, with `div_x` from
    `Config.div`. A plain call has div 1 and leading dims 1 or B. Under vmap an operand of the
    primitives has an axis for each mapped one besides, right after the batch, of size 1 where the
    operand is not mapped; `merged` makes a call of plain batch entries of it.

    T_b = q_lengths[b] may exceed T, for rows that are the first of a longer sequence. Row i stands
    at position i + (S_b - T_b) among the keys, and its entry of relative_bias for key j is
    (i - j) + (S_b - min(T_b, T)) + (T - 1): what live rows read lies within, whatever T_b is.
    """

    q: jax.Array  # [., T, N, H], or [., N, T, H] in the "BNTH" layout
    k: jax.Array  # [., S, K, H], or [., K, S, H]
    v: jax.Array  # like k
    scale: jax.Array  # [., 1|N], float32 (float64 for float64 inputs), clamped
    bias: jax.Array | None = None  # [., 1|N, 1|T, 1|S]
    relative_bias: jax.Array | None = None  # [., 1|N, T + S - 1]
    mask: jax.Array | None = None  # bool [., 1|N, 1|T, 1|S]; True = may attend
    q_lengths: jax.Array | None = None  # int32 [.], not negative; rows past it are dead
    kv_lengths: jax.Array | None = None  # int32 [.], in [0, S]; keys past it are dead
    q_segments: jax.Array | None = None  # int32 [., T]
    kv_segments: jax.Array | None = None  # int32 [., S]


FIELDS = Operands._fields


@dataclasses.dataclass(frozen=True)
class Config:
    """Static description of a call: a jit key, and the parameters of the primitives."""

    batch: int  # B
    layout: Literal["BTNH", "BNTH"] = "BTNH"
    l2norm_qk: bool = True
    groups: int = 1
    is_causal: bool = False
    window: tuple[int | None, int | None] | None = None  # (left, right), inclusive
    bound: float | None = None  # of |scale| * groups; None: an array scale without scale_bound
    precision: Literal["default", "high", "highest"] = "default"  # of float32 products
    deterministic: bool = False
    implementation: Literal["auto", "cuda", "xla"] = "auto"
    partial: bool = False  # backward: out and lse are of more keys than these
    div: tuple[int, ...] = (1,) * len(FIELDS)


def shapes(ops: Operands, config: Config) -> tuple[int, int, int, int, int]:
    """(T, N, S, K, H) of a call, whatever its layout."""
    if config.layout == "BTNH":
        (t, n, h), (s, k, _) = ops.q.shape[-3:], ops.k.shape[-3:]
    else:
        (n, t, h), (k, s, _) = ops.q.shape[-3:], ops.k.shape[-3:]
    return t, n, s, k, h


def merged(
    operands: Sequence[jax.Array], config: Config, fields: Sequence[str], sizes: tuple[int, ...]
) -> tuple[Operands, list[jax.Array], Config]:
    """A call mapped over axes of `sizes` as one of config.batch * prod(sizes) batch entries.

    Operands that are shared along an axis are read again through their divisors; only one that is
    shared along an axis between two along which it is not is repeated in memory.

    Returns:
      Operands and config of that call, and the operands beyond `fields`, which are never shared.
    """
    lead = (config.batch, *sizes)
    values, div = {}, dict(zip(FIELDS, config.div, strict=True))
    for name, x in zip(fields, operands, strict=False):
        values[name] = x
        if sizes:
            own, rest = x.shape[: len(lead)], x.shape[len(lead) :]
            wide = [axis for axis, size in enumerate(own) if size != 1] or [0]
            first, end = wide[0], wide[-1] + 1
            rows = lead[first:end] if own[first] != 1 else (1,)
            x = jnp.broadcast_to(x, (*own[:first], *rows, *own[end:], *rest))
            values[name] = x.reshape(math.prod(rows), *rest)
            div[name] = math.prod(lead[end:])
    batch = math.prod(lead)
    beyond = [x.reshape(batch, *x.shape[len(lead) :]) for x in operands[len(values) :]]
    config = dataclasses.replace(config, batch=batch, div=tuple(div.values()))
    return Operands(**values), beyond, config
