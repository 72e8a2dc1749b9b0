"""What one attention call is: its data operands and its static description."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax


class Operands(NamedTuple):
    """Data operands of the primitives; None = absent.

    Batch entry b of the call reads operand x at `x[(b // div_x) % x.shape[0]]`, with `div_x` from
    `Config.div`. A plain call has div 1 and leading dims 1 or B; vmap changes the divisors instead
    of expanding the operands that it does not map over.

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
        (_, t, n, h), (_, s, k, _) = ops.q.shape, ops.k.shape
    else:
        (_, n, t, h), (_, k, s, _) = ops.q.shape, ops.k.shape
    return t, n, s, k, h
