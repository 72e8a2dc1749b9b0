"""Attention with its hand-written backward, on top of the primitives."""

from __future__ import annotations

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from jax_cosine_attn import _primitive
from jax_cosine_attn._config import Config, Operands

# Differentiable operands whose gradient costs something extra.
_OPTIONAL = ("scale", "bias", "relative_bias")


class Engine(Protocol):
    """What computes a call, hashable: the primitives, or several calls of them."""

    def fwd(self, ops: Operands, config: Config) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As `_primitive.fwd`."""

    def bwd(
        self,
        ops: Operands,
        out: jax.Array,
        lse: jax.Array,
        lse_low: jax.Array,
        dout: jax.Array,
        dlse: jax.Array | None,
        config: Config,
        wanted: tuple[str, ...],
    ) -> tuple[jax.Array, ...]:
        """As `_primitive.bwd`."""


_PRIMITIVES: Any = _primitive


def attention(
    ops: Operands, config: Config, engine: Engine = _PRIMITIVES
) -> tuple[jax.Array, jax.Array]:
    """(out, lse) of a call: out in q's layout and dtype, lse [B, N, T]."""
    arrays = _arrays(ops)
    alike = dict(zip(arrays, _primitive.vary_alike(arrays.values()), strict=True))
    return _attention(ops._replace(**alike), config, engine)


def _arrays(ops: Operands) -> dict[str, Any]:
    return {name: x for name, x in ops._asdict().items() if x is not None}


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _attention(ops: Operands, config: Config, engine: Engine) -> tuple[jax.Array, jax.Array]:
    out, lse, _ = engine.fwd(ops, config)
    return out, lse


def _forward(ops: Any, config: Config, engine: Engine) -> tuple[tuple[jax.Array, jax.Array], Any]:
    # With symbolic zeros each leaf comes as (value, perturbed). `wanted` must stay static, so it
    # travels as the keys of a dict: part of the residuals' structure, not one of their arrays.
    wanted = {name: None for name in _OPTIONAL if (x := getattr(ops, name)) and x.perturbed}
    values = Operands(**{name: x.value for name, x in _arrays(ops).items()})
    out, lse, lse_low = engine.fwd(values, config)
    # Names inside the rule, so that a checkpoint policy can keep exactly these residuals.
    out = checkpoint_name(out, "cosine_attn_out")
    lse, lse_low = (checkpoint_name(x, "cosine_attn_lse") for x in (lse, lse_low))
    return (out, lse), (values, out, lse, lse_low, wanted)


def _backward(
    config: Config, engine: Engine, residuals: Any, cotangents: Any
) -> tuple[Operands | None]:
    ops, out, lse, lse_low, wanted = residuals
    dout, dlse = (None if isinstance(x, SymbolicZero) else x for x in cotangents)
    if dout is None and dlse is None:
        return (None,)
    if dout is None:
        dout = jnp.zeros_like(out)
    names = tuple(name for name in _OPTIONAL if name in wanted)
    dq, dk, dv, *rest = engine.bwd(ops, out, lse, lse_low, dout, dlse, config, names)
    absent: Any = None  # no gradient: JAX reads None as zero
    grads = Operands(dq, dk, dv, absent)
    return (grads._replace(**dict(zip(names, rest, strict=True))),)


_attention.defvjp(_forward, _backward, symbolic_zeros=True)
