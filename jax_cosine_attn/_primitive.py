"""The two primitives: what JAX is told about a call, whatever computes it.

Operands are the fields of `Operands` that are present, in order; the backward adds out, lse,
lse_low, dout and, with `has_dlse`, dlse. The parameter `fields` names those present; `sizes` are
those of the axes that vmap put after the batch, in operands and results alike. An implementation is
chosen when the call is lowered for a platform, so one traced function serves all of them. The
parameter `body` is the same call once more, as XLA's partitioner may cut it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from jax_cosine_attn import _ffi
from jax_cosine_attn._blockwise import blockwise_bwd, blockwise_fwd
from jax_cosine_attn._config import FIELDS, Config, Operands, merged, shapes
from jax_cosine_attn._partition import NO_MESH, mesh_axes_of, partitioned

cosine_attn_fwd_p = Primitive("cosine_attn_fwd")
cosine_attn_fwd_p.multiple_results = True
cosine_attn_bwd_p = Primitive("cosine_attn_bwd")
cosine_attn_bwd_p.multiple_results = True


def fwd(ops: Operands, config: Config) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(out, lse, lse_low): out in q's layout and dtype, lse [B, N, T], and what rounding took from
    it, 0 in dead rows."""
    fields, operands = _present(ops)
    out, lse, lse_low = _bind(cosine_attn_fwd_p, *operands, config=config, fields=fields, sizes=())
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
            sizes=(),
            wanted=wanted,
            grad_batch=tuple(getattr(ops, name).shape[0] for name in wanted),
            has_dlse=dlse is not None,
        )
    )


def vary_alike(arrays: Iterable[jax.Array]) -> list[jax.Array]:
    """Under shard_map, all arrays varying over the mesh axes that any of them varies over.

    The transpose of the cast sums the gradient of an array that all devices share.
    """
    arrays = list(arrays)
    varying = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    axes = frozenset().union(*varying)
    return [
        jax.lax.pcast(x, tuple(sorted(axes - own, key=str)), to="varying")
        for x, own in zip(arrays, varying, strict=True)
    ]


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


_register_impl(cosine_attn_fwd_p, ("config", "fields", "sizes"))
_register_impl(cosine_attn_bwd_p, ("config", "fields", "sizes", "wanted", "grad_batch", "has_dlse"))


# Abstract evaluation: results derive from the operands' avals, which carry the mesh axes that a
# value varies over under shard_map and the sharding under an explicit mesh.


def _aval(like: Any, axes: Sequence[int], lead: tuple[int, ...], dtype: Any, specs: Any) -> Any:
    """The aval of a result with leading dims `lead` and the other axes of `like` in the order
    `axes`: sharded like it, and where it has no such dim as the call is, if the axes are free."""
    own = like.sharding.spec
    rest = [len(lead) + axis for axis in axes]
    spec = [entry if like.shape[i] == lead[i] else None for i, entry in enumerate(own[: len(lead)])]
    spec += [own[i] for i in rest]
    for i, entry in enumerate(specs):
        used = {name for other in spec for name in mesh_axes_of(other)}
        if like.shape[i] != lead[i] and used.isdisjoint(mesh_axes_of(entry)):
            spec[i] = entry
    return like.update(
        shape=(*lead, *(like.shape[i] for i in rest)),
        dtype=dtype,
        weak_type=False,
        sharding=NamedSharding(like.sharding.mesh, PartitionSpec(*spec)),
    )


def _lead_specs(avals: Sequence[Any], lead: tuple[int, ...]) -> list[Any]:
    """How the batch and the mapped axes of a call are sharded: as in the first operand that has
    them so, cotangents included, which may be all that is mapped."""
    return [
        next((x.sharding.spec[i] for x in avals if x.shape[i] == size and x.sharding.spec[i]), None)
        for i, size in enumerate(lead)
    ]


def _fwd_abstract_eval(
    *avals: Any,
    config: Config,
    fields: tuple[str, ...],
    sizes: tuple[int, ...],
    body: ClosedJaxpr | None,
) -> tuple[ShapedArray, ...]:
    del body
    ops = Operands(**dict(zip(fields, avals, strict=True)))
    lse_axes = (1, 0) if config.layout == "BTNH" else (0, 1)
    lead = (config.batch, *sizes)
    specs = _lead_specs(avals, lead)
    lse = _aval(ops.q, lse_axes, lead, ops.scale.dtype, specs)
    return _aval(ops.q, range(3), lead, ops.q.dtype, specs), lse, lse


def _bwd_abstract_eval(
    *avals: Any,
    config: Config,
    fields: tuple[str, ...],
    sizes: tuple[int, ...],
    wanted: tuple[str, ...],
    grad_batch: tuple[int, ...],
    has_dlse: bool,
    body: ClosedJaxpr | None,
) -> tuple[ShapedArray, ...]:
    del has_dlse, body
    ops = Operands(**dict(zip(fields, avals, strict=False)))
    specs = _lead_specs(avals, (config.batch, *sizes))
    return tuple(
        _aval(x, range(x.ndim - 1 - len(sizes)), (batch, *sizes), x.dtype, specs)
        for x, batch in _gradients(ops, config, wanted, grad_batch)
    )


def _gradients(
    ops: Operands, config: Config, wanted: tuple[str, ...], grad_batch: tuple[int, ...]
) -> list[tuple[Any, int]]:
    """Operands that have a gradient, and the leading dims of the gradients."""
    primals = [getattr(ops, name) for name in ("q", "k", "v", *wanted)]
    return list(zip(primals, (config.batch,) * 3 + grad_batch, strict=True))


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
    *operands: jax.Array,
    platform: str | None,
    config: Config,
    fields: tuple[str, ...],
    sizes: tuple[int, ...],
) -> list[jax.Array]:
    lead = (config.batch, *sizes)
    ops, _, config = merged(operands, config, fields, sizes)
    use_cuda = _use_cuda(ops, config, platform)
    if _is_empty(ops, config):
        t, n, *_ = shapes(ops, config)
        out = jnp.zeros((config.batch, *ops.q.shape[1:]), ops.q.dtype)
        lse = jnp.full((config.batch, n, t), -jnp.inf, ops.scale.dtype)
        results = out, lse, jnp.zeros_like(lse)
    else:
        results = (_ffi.cuda_fwd if use_cuda else blockwise_fwd)(ops, config)
    return [x.reshape(*lead, *x.shape[1:]) for x in results]


def _lowered_bwd(
    *operands: jax.Array,
    platform: str | None,
    config: Config,
    fields: tuple[str, ...],
    sizes: tuple[int, ...],
    wanted: tuple[str, ...],
    grad_batch: tuple[int, ...],
    has_dlse: bool,
) -> list[jax.Array]:
    leads = [(batch, *sizes) for batch in (config.batch,) * 3 + grad_batch]
    ops, rows, config = merged(operands, config, fields, sizes)
    grad_batch = tuple(math.prod(lead) for lead in leads[3:])
    use_cuda = _use_cuda(ops, config, platform)
    results: Sequence[jax.Array]
    if _is_empty(ops, config):
        gradients = _gradients(ops, config, wanted, grad_batch)
        results = [jnp.zeros((batch, *x.shape[1:]), x.dtype) for x, batch in gradients]
    else:
        out, lse, lse_low, dout, *dlse = rows
        rule = _ffi.cuda_bwd if use_cuda else blockwise_bwd
        cotangents = dout, dlse[0] if has_dlse else None
        results = rule(ops, out, lse, lse_low, *cotangents, config, wanted, grad_batch)
    return [x.reshape(*lead, *x.shape[1:]) for x, lead in zip(results, leads, strict=True)]


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


# Batching: the mapped axis moves behind the batch and those mapped before. It stays an axis of its
# own until the call is lowered, so that it may be sharded as the batch may.


def _batching_rule(
    primitive: Primitive,
    operands: Sequence[jax.Array],
    dims: Sequence[int | None],
    body: ClosedJaxpr | None,
    **params: Any,
) -> tuple[list[jax.Array], list[int]]:
    del body
    size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)
    axis = 1 + len(params["sizes"])
    mapped = [
        jnp.expand_dims(x, axis) if dim is None else jnp.moveaxis(x, dim, axis)
        for x, dim in zip(operands, dims, strict=True)
    ]
    # Operands may be shared along the axis; out, lse and their cotangents have it.
    for i in range(len(params["fields"]), len(mapped)):
        x = mapped[i]
        mapped[i] = jnp.broadcast_to(x, (*x.shape[:axis], size, *x.shape[axis + 1 :]))
    # A vmap of shard_map may spread the mapped axis over devices, which then vary in it alone.
    mapped = vary_alike(mapped)
    results = _bind(primitive, *mapped, **params | {"sizes": (*params["sizes"], size)})
    return results, [axis] * len(results)


for _primitive in (cosine_attn_fwd_p, cosine_attn_bwd_p):
    batching.primitive_batchers[_primitive] = functools.partial(_batching_rule, _primitive)


# Differentiation: the first derivative is the custom_vjp's; there is no rule beyond it.


def _no_derivative(primals: Any, tangents: Any, **params: Any) -> Any:
    raise NotImplementedError(
        "forward-mode and higher-order derivatives need implementation='reference'"
    )


for _primitive in (cosine_attn_fwd_p, cosine_attn_bwd_p):
    ad.primitive_jvps[_primitive] = _no_derivative
