"""The two primitives: what JAX is told about a call, whatever computes it.

Operands are the fields of `Operands` that are present, in order; the backward adds out, lse,
lse_low, dout and, with `has_dlse`, dlse. The parameter `fields` names those present. An
implementation is chosen when the call is lowered for a platform, so one traced function serves all
of them. The parameter `body` is the same call once more, as XLA's partitioner may cut it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from jax_cosine_attn import _ffi
from jax_cosine_attn._blockwise import blockwise_bwd, blockwise_fwd
from jax_cosine_attn._config import FIELDS, Config, Operands, shapes
from jax_cosine_attn._partition import NO_MESH, partitioned

cosine_attn_fwd_p = Primitive("cosine_attn_fwd")
cosine_attn_fwd_p.multiple_results = True
cosine_attn_bwd_p = Primitive("cosine_attn_bwd")
cosine_attn_bwd_p.multiple_results = True


def fwd(ops: Operands, config: Config) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(out, lse, lse_low): out in q's layout and dtype, lse [B, N, T], and what rounding took from
    it, 0 in dead rows."""
    fields, operands = _present(ops)
    out, lse, lse_low = _bind(cosine_attn_fwd_p, *operands, config=config, fields=fields)
    return out, lse, lse_low


def bwd(
    ops: Operands,
    out: jax.Array,
    lse: jax.Array,
    lse_low: jax.Array,
    dout: jax.Array,
    dlse: jax.Array | None,
    config: Config,
    wanted: tuple[str, ...],
) -> tuple[jax.Array, ...]:
    """(dq, dk, dv, and the gradient of each operand named in wanted, in that operand's shape)."""
    fields, operands = _present(ops)
    return tuple(
        _bind(
            cosine_attn_bwd_p,
            *operands,
            out,
            lse,
            lse_low,
            dout,
            *(() if dlse is None else (dlse,)),
            config=config,
            fields=fields,
            wanted=wanted,
            grad_batch=tuple(getattr(ops, name).shape[0] for name in wanted),
            has_dlse=dlse is not None,
        )
    )


def _present(ops: Operands) -> tuple[tuple[str, ...], list[jax.Array]]:
    fields = tuple(name for name in FIELDS if getattr(ops, name) is not None)
    return fields, [getattr(ops, name) for name in fields]


def _bind(primitive: Primitive, *operands: jax.Array, **params: Any) -> list[jax.Array]:
    body = None
    if not jax.sharding.get_abstract_mesh().manual_axes:  # inside shard_map the cut is made
        avals = tuple(ShapedArray(jnp.shape(x), jax.typeof(x).dtype) for x in operands)
        body = _body(primitive, avals, tuple(params.items()))
    return primitive.bind(*operands, body=body, **params)


@functools.lru_cache(maxsize=1024)
def _body(
    primitive: Primitive, avals: tuple[ShapedArray, ...], params: tuple[tuple[str, Any], ...]
) -> ClosedJaxpr:
    ops = Operands(**dict(zip(dict(params)["fields"], avals, strict=False)))
    bind = functools.partial(primitive.bind, body=None)
    # A parameter and no primitive of its own: neither vmap nor grad know a custom_partitioning.
    with jax.sharding.use_abstract_mesh(NO_MESH):
        return jax.make_jaxpr(partitioned(bind, ops, **dict(params)))(*avals)


# Evaluation outside jit: a compiled program per static description, with jit disabled too.


def _register_impl(primitive: Primitive, static: tuple[str, ...]) -> None:
    @functools.partial(jax.jit, static_argnames=static)
    def compiled(*operands: jax.Array, **params: Any) -> Sequence[jax.Array]:
        return _bind(primitive, *operands, **params)

    def impl(*operands: jax.Array, body: Any, **params: Any) -> Sequence[jax.Array]:
        del body
        with jax.disable_jit(False):
            return compiled(*operands, **params)

    primitive.def_impl(impl)


_register_impl(cosine_attn_fwd_p, ("config", "fields"))
_register_impl(cosine_attn_bwd_p, ("config", "fields", "wanted", "grad_batch", "has_dlse"))


# Abstract evaluation: results derive from the operands' avals, which carry the mesh axes that a
# value varies over under shard_map and the sharding under an explicit mesh.


def _aval(like: Any, axes: Sequence[int], batch: int, dtype: Any, batch_spec: Any) -> Any:
    """The aval of `batch` entries whose axes are those of `like`, sharded like them."""
    shape = (batch, *(like.shape[axis] for axis in axes[1:]))
    spec = [like.sharding.spec[axis] for axis in axes]
    if batch != like.shape[0]:
        spec[0] = batch_spec
    sharding = NamedSharding(like.sharding.mesh, PartitionSpec(*spec))
    return like.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding)


def _batch_spec(ops: Operands, config: Config) -> Any:
    """How the batch of a call is sharded, vmap's instances merged after it: as q, k or v are."""
    rows: Sequence[Any] = ops[:3]
    specs = [
        x.sharding.spec[0]
        for x, div in zip(rows, config.div, strict=False)
        if x.shape[0] > 1 and x.shape[0] * div == config.batch
    ]
    return next((spec for spec in specs if spec is not None), None)


def _fwd_abstract_eval(
    *avals: Any, config: Config, fields: tuple[str, ...], body: ClosedJaxpr | None
) -> tuple[ShapedArray, ...]:
    del body
    ops = Operands(**dict(zip(fields, avals, strict=True)))
    lse_axes = (0, 2, 1) if config.layout == "BTNH" else (0, 1, 2)
    spec = _batch_spec(ops, config)
    lse = _aval(ops.q, lse_axes, config.batch, ops.scale.dtype, spec)
    return _aval(ops.q, range(4), config.batch, ops.q.dtype, spec), lse, lse


def _bwd_abstract_eval(
    *avals: Any,
    config: Config,
    fields: tuple[str, ...],
    wanted: tuple[str, ...],
    grad_batch: tuple[int, ...],
    has_dlse: bool,
    body: ClosedJaxpr | None,
) -> tuple[ShapedArray, ...]:
    del has_dlse, body
    ops = Operands(**dict(zip(fields, avals, strict=False)))
    primals, batches = _gradients(ops, config, wanted, grad_batch)
    spec = _batch_spec(ops, config)
    return tuple(
        _aval(x, range(x.ndim), batch, x.dtype, spec if batch == config.batch else None)
        for x, batch in zip(primals, batches, strict=True)
    )


def _gradients(
    ops: Operands, config: Config, wanted: tuple[str, ...], grad_batch: tuple[int, ...]
) -> tuple[list[Any], tuple[int, ...]]:
    """Operands that have a gradient, and the leading dims of the gradients."""
    primals = [getattr(ops, name) for name in ("q", "k", "v", *wanted)]
    return primals, (config.batch,) * 3 + grad_batch


cosine_attn_fwd_p.def_abstract_eval(_fwd_abstract_eval)
cosine_attn_bwd_p.def_abstract_eval(_bwd_abstract_eval)


# Lowering.


def _use_cuda(ops: Operands, config: Config, platform: str | None) -> bool:
    if config.implementation == "xla":
        return False
    if platform != "cuda":
        if config.implementation == "cuda":
            raise NotImplementedError(
                "implementation='cuda' can only be lowered for CUDA; implementation=None takes "
                "the best one of each platform"
            )
        return False
    problem = _ffi.why_not_cuda(ops, config)
    if problem is not None and config.implementation == "cuda":
        raise NotImplementedError(problem)
    return problem is None


def _is_empty(ops: Operands, config: Config) -> bool:
    """No result, or no key: nothing to compute, and every row that exists is dead."""
    t, n, s, *_ = shapes(ops, config)
    return 0 in (config.batch, t, n, s)


def _lowered_fwd(
    *operands: jax.Array, platform: str | None, config: Config, fields: tuple[str, ...]
) -> tuple[jax.Array, ...]:
    ops = Operands(**dict(zip(fields, operands, strict=True)))
    use_cuda = _use_cuda(ops, config, platform)
    if _is_empty(ops, config):
        t, n, *_ = shapes(ops, config)
        out = jnp.zeros((config.batch, *ops.q.shape[1:]), ops.q.dtype)
        lse = jnp.full((config.batch, n, t), -jnp.inf, ops.scale.dtype)
        return out, lse, jnp.zeros_like(lse)
    return (_ffi.cuda_fwd if use_cuda else blockwise_fwd)(ops, config)


def _lowered_bwd(
    *operands: jax.Array,
    platform: str | None,
    config: Config,
    fields: tuple[str, ...],
    wanted: tuple[str, ...],
    grad_batch: tuple[int, ...],
    has_dlse: bool,
) -> tuple[jax.Array, ...]:
    ops = Operands(**dict(zip(fields, operands, strict=False)))
    use_cuda = _use_cuda(ops, config, platform)
    if _is_empty(ops, config):
        primals, batches = _gradients(ops, config, wanted, grad_batch)
        return tuple(
            jnp.zeros((batch, *x.shape[1:]), x.dtype)
            for x, batch in zip(primals, batches, strict=True)
        )
    out, lse, lse_low, dout, *dlse = operands[len(fields) :]
    rule = _ffi.cuda_bwd if use_cuda else blockwise_bwd
    cotangents = dout, dlse[0] if has_dlse else None
    return rule(ops, out, lse, lse_low, *cotangents, config, wanted, grad_batch)


def _register(primitive: Primitive, fun: Callable, platform: str | None) -> None:
    local = functools.partial(fun, platform=platform)

    def lower(ctx: Any, *operands: Any, body: ClosedJaxpr | None, **params: Any) -> Any:
        call = functools.partial(local, **params) if body is None else jaxpr_as_fun(body)
        # The body is local to a device. Traced with the caller's mesh it would have to declare how
        # each of its own arrays varies or is sharded; traced without one, it need not know.
        avals = [ShapedArray(aval.shape, aval.dtype) for aval in ctx.avals_in]
        with jax.sharding.use_abstract_mesh(NO_MESH):
            rule = mlir.lower_fun(call, multiple_results=True)
            return rule(ctx.replace(avals_in=avals), *operands)

    mlir.register_lowering(primitive, lower, platform=platform)


for _platform in (None, "cuda"):
    _register(cosine_attn_fwd_p, _lowered_fwd, _platform)
    _register(cosine_attn_bwd_p, _lowered_bwd, _platform)


# Batching: the mapped axis is merged after batch, entry b' = b * size + m. Operands that are not
# mapped are read again through their divisors instead of being repeated in memory.


def _merge(x: jax.Array, dim: int) -> jax.Array:
    x = jnp.moveaxis(x, dim, 1)
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _merge_operand(x: jax.Array, dim: int | None, div: int, size: int) -> tuple[jax.Array, int]:
    """(x, div) of a mapped call from those of one instance."""
    if dim is None:
        return x, div * size
    x = jnp.moveaxis(x, dim, 1)
    if div > 1 and x.shape[0] > 1:
        # Entry b reads x[b // div, m]: b % div lies between the two digits and must be spelled out.
        x = jnp.repeat(x, div, axis=0)
    return x.reshape(x.shape[0] * size, *x.shape[2:]), 1


def batch(
    size: int,
    dims: Sequence[int | None],
    operands: Sequence[jax.Array],
    params: dict[str, Any],
) -> tuple[list[jax.Array], dict[str, Any]]:
    """Operands and parameters of `size` mapped calls as one; dims are the operands' mapped axes.

    The results are those of the mapped calls with `size` merged after their leading axis.
    """
    config, fields = params["config"], params["fields"]
    merged, div = [], list(config.div)
    for name, x, dim in zip(fields, operands, dims, strict=False):
        i = FIELDS.index(name)
        x, div[i] = _merge_operand(x, dim, div[i], size)
        merged.append(x)
    for x, dim in zip(operands[len(fields) :], dims[len(fields) :], strict=True):
        merged.append(jnp.repeat(x, size, axis=0) if dim is None else _merge(x, dim))
    config = dataclasses.replace(config, batch=config.batch * size, div=tuple(div))
    params = params | {"config": config}
    if "grad_batch" in params:
        params["grad_batch"] = tuple(n * size for n in params["grad_batch"])
    return merged, params


def _batching_rule(
    primitive: Primitive,
    operands: Sequence[jax.Array],
    dims: Sequence[int | None],
    body: ClosedJaxpr | None,
    **params: Any,
) -> tuple[list[jax.Array], list[int]]:
    del body
    size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)
    merged, merged_params = batch(size, dims, operands, params)
    results = _bind(primitive, *merged, **merged_params)
    leads: tuple[int, ...] = params.get("grad_batch", ())
    leads = (params["config"].batch,) * (len(results) - len(leads)) + leads
    results = [x.reshape(lead, size, *x.shape[1:]) for x, lead in zip(results, leads, strict=True)]
    return results, [1] * len(results)


for _primitive in (cosine_attn_fwd_p, cosine_attn_bwd_p):
    batching.primitive_batchers[_primitive] = functools.partial(_batching_rule, _primitive)


# Differentiation: the first derivative is the custom_vjp's; there is no rule beyond it.


def _no_derivative(primals: Any, tangents: Any, **params: Any) -> Any:
    raise NotImplementedError(
        "forward-mode and higher-order derivatives need implementation='reference'"
    )


for _primitive in (cosine_attn_fwd_p, cosine_attn_bwd_p):
    ad.primitive_jvps[_primitive] = _no_derivative
