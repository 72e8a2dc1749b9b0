"""How XLA's SPMD partitioner may cut a call: over batch and mapped axes, heads and queries, never
over keys.

Shards are independent calls. What they share is on every one of them (keys and values under sharded
queries, for example), and the gradients of it are added up. Lengths tell a shard of queries where
it stands, and of relative_bias it reads the entries that its rows can meet.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding

from jax_cosine_attn._config import FIELDS, Config, Operands, merged, shapes

NO_MESH = AbstractMesh((), ())
_DIMS = {
    "q": "btnh",
    "k": "bskh",
    "v": "bskh",
    "scale": "bn",
    "bias": "bnts",
    "relative_bias": "bnd",
    "mask": "bnts",
    "q_lengths": "b",
    "kv_lengths": "b",
    "q_segments": "bt",
    "kv_segments": "bs",
    "lse": "bnt",
}
_OUTSIDE = re.compile(r"\(.*?\)")  # what is not a dim of its own


class _Tensor(NamedTuple):
    name: str  # a key of _DIMS
    shape: tuple[int, ...]


class _Cut:
    """What a call may be cut into, and how its operands and results are cut then."""

    def __init__(
        self,
        ops: Operands,
        config: Config,
        fields: Sequence[str],
        sizes: Sequence[int],
        wanted: Sequence[str] | None,
        grad_batch: Sequence[int],
        has_dlse: bool,
    ):
        self.config = config
        t, n, _, k, _ = shapes(ops, config)
        self.mapped = [f"m{i}" for i in range(len(sizes))]

        def like(name: str, batch: int) -> _Tensor:
            return _Tensor(name, (batch, *sizes, *getattr(ops, name).shape[1 + len(sizes) :]))

        lse = _Tensor("lse", (config.batch, *sizes, n, t))
        full = {name: like(name, config.batch) for name in "qkv"}
        self.operands = [_Tensor(name, getattr(ops, name).shape) for name in fields]
        if wanted is None:
            self.results = [full["q"], lse, lse]
        else:
            self.operands += [full["q"], lse, lse, full["q"], *([lse] if has_dlse else [])]
            self.results = [*full.values(), *map(like, wanted, grad_batch)]
        # The most equal parts of batch, mapped axes, heads and queries.
        self.parts = {"b": config.batch, "n": n if k == 1 else k, "t": t}
        self.parts |= dict(zip(self.mapped, sizes, strict=True))

    def dims(self, tensor: _Tensor) -> list[str]:
        first, *rest = list(_DIMS[tensor.name])
        if len(rest) == 3 and rest[0] in "ts" and self.config.layout == "BNTH":
            rest[:2] = rest[1], rest[0]
        return [first, *self.mapped, *rest]

    def factor(self, dim: str, size: int) -> str | None:
        """What cuts this dim of a tensor: b, a mapped axis, n, t or None."""
        factor = "n" if dim == "k" else dim
        return None if size <= 1 or self.parts.get(factor, 1) <= 1 else factor

    def rule(self) -> tuple[str, dict[str, Any]]:
        """Shardy's rule for the call, as text and keywords of `def_partition`."""
        sizes: dict[str, int] = {}
        whole: list[str] = []

        def label(dim: str, size: int) -> str:
            factor = self.factor(dim, size)
            if factor is None:
                whole.append(f"whole{len(whole)}")
                return whole[-1]
            parts = self.parts[factor]
            if size == parts:
                return factor
            # The first part of the dim is cut; heads of a group stay together.
            minor = f"{factor}{size // parts}"
            sizes.update({factor: parts, minor: size // parts})
            return f"({factor} {minor})"

        def side(tensors: Sequence[_Tensor]) -> list[str]:
            return [" ".join(map(label, self.dims(tensor), tensor.shape)) for tensor in tensors]

        operands, results = side(self.operands), side(self.results)
        alone = {word for text in operands + results for word in _OUTSIDE.sub("", text).split()}
        sizes = {factor: size for factor, size in sizes.items() if factor not in alone}
        text = f"{', '.join(operands)} -> {', '.join(results)}"
        return text, {"need_replication_factors": tuple(whole), **sizes}

    def axes(self, mesh: Mesh, sharding: Sharding) -> dict[str, tuple[str, ...]]:
        """Mesh axes that cut each factor, given how the partitioner would cut q: as many of its
        axes as leave equal parts."""
        q = self.results[0]
        cut: dict[str, tuple[str, ...]] = {}
        for axis, dim in enumerate(self.dims(q)):
            names = _mesh_axes(mesh, sharding, q.shape, axis) if dim in self.parts else ()
            while self.parts.get(dim, 1) % math.prod(mesh.shape[name] for name in names):
                names = names[:-1]
            cut[dim] = names
        return cut

    def spec(self, tensor: _Tensor, axes: dict[str, tuple[str, ...]]) -> PartitionSpec:
        factors = map(self.factor, self.dims(tensor), tensor.shape)
        return PartitionSpec(*((axes.get(f) or None) if f else None for f in factors))


def partitioned(
    bind: Callable[..., Sequence[jax.Array]],
    ops: Operands,
    config: Config,
    fields: tuple[str, ...],
    sizes: tuple[int, ...],
    wanted: tuple[str, ...] | None = None,
    grad_batch: tuple[int, ...] = (),
    has_dlse: bool = False,
) -> Callable[..., Sequence[jax.Array]]:
    """The call `bind(*operands, config, fields, ...)`, cut into shards under a mesh.

    Args:
      bind: a primitive's, without the parameters below.
      ops: avals of the operands of the whole call.
      config, fields, sizes: the parameters of the primitives.
      wanted, grad_batch, has_dlse: those of the backward; wanted None is the forward.
    """
    cut = _Cut(ops, config, fields, sizes, wanted, grad_batch, has_dlse)

    def call(*operands: jax.Array) -> Sequence[jax.Array]:
        return bind(*operands, **params(config, fields, sizes, grad_batch))

    def params(config: Config, fields: Any, sizes: Any, grad_batch: Any) -> dict[str, Any]:
        backward = dict(wanted=wanted, grad_batch=grad_batch, has_dlse=has_dlse)
        forward = dict(config=config, fields=fields, sizes=sizes)
        return forward if wanted is None else forward | backward

    def partition(mesh: Mesh, operands: Any, results: Any) -> Any:
        if mesh.empty:  # JAX knows the meshes of a program's arguments and results only
            mesh = _mesh_of(results[0].sharding, results[0].shape)
        axes = cut.axes(mesh, results[0].sharding)
        operand_specs, result_specs = (
            [cut.spec(tensor, axes) for tensor in tensors]
            for tensors in (cut.operands, cut.results)
        )
        parts = {dim: math.prod(mesh.shape[name] for name in names) for dim, names in axes.items()}
        mapped = tuple(n // parts[dim] for n, dim in zip(sizes, cut.mapped, strict=True))

        def lead(batch: int) -> int:
            return batch // parts["b"] if batch == config.batch else batch

        def shard(*operands: jax.Array) -> list[jax.Array]:
            # Inside, no mesh is left to speak of.
            with jax.sharding.use_abstract_mesh(NO_MESH):
                local_config = dataclasses.replace(config, batch=lead(config.batch))
                local, rows, local_config = merged(operands, local_config, fields, mapped)
                batches = {
                    name: math.prod((lead(n), *mapped))
                    for name, n in zip(wanted or (), grad_batch, strict=True)
                }
                summed = dict(batches)  # by the call
                if axes["t"]:
                    total = cut.parts["t"]
                    local, local_config, first = _placed(local, local_config, total, axes["t"])
                    if first.ndim and "relative_bias" in summed:
                        summed["relative_bias"] = local_config.batch
                present = tuple(name for name in FIELDS if getattr(local, name) is not None)
                outputs = bind(
                    *(getattr(local, name) for name in present),
                    *rows,
                    **params(local_config, present, (), tuple(summed.values())),
                )
                added = []
                used = {name for names in axes.values() for name in names}
                for tensor, spec, x in zip(cut.results, result_specs, outputs, strict=True):
                    if axes["t"] and tensor.name == "relative_bias":
                        x = _put_back(x, first, batches["relative_bias"], tensor.shape[-1])
                    x = x.reshape(lead(tensor.shape[0]), *mapped, *x.shape[1:])
                    added.append(_added(x, used.difference(*map(mesh_axes_of, spec))))
                return added

        def shardings(specs: Sequence[PartitionSpec]) -> list[NamedSharding]:
            return [NamedSharding(mesh, spec) for spec in specs]

        return mesh, shard, shardings(result_specs), tuple(shardings(operand_specs))

    wrapped = custom_partitioning(call)
    rule, options = cut.rule()
    # Undecoded: JAX cannot decode a sharding by a part of a mesh axis, which the partitioner
    # comes to where heads of queries divide by the axis and heads of keys do not.
    wrapped.def_partition(partition, decode_shardings=False, sharding_rule=rule, **options)
    return wrapped


def _mesh_of(sharding: Sharding, shape: tuple[int, ...]) -> Mesh:
    """A mesh of the sharding's devices, in their order, with an axis for each prime factor: of the
    meshes whose axes are powers of two it can tell every sharding."""
    devices = np.array(list(sharding.devices_indices_map(shape)))
    factors, rest = [], devices.size
    while rest > 1:
        factors.append(next(n for n in range(2, rest + 1) if rest % n == 0))
        rest //= factors[-1]
    return Mesh(devices.reshape(factors), tuple(f"factor{i}" for i in range(len(factors))))


def _mesh_axes(
    mesh: Mesh, sharding: Sharding, shape: tuple[int, ...], axis: int
) -> tuple[str, ...]:
    """The mesh axes over which a sharding cuts one axis of an array, () if they are cut too."""
    indices = sharding.devices_indices_map(shape)
    starts = np.array([indices[device][axis].start or 0 for device in mesh.devices.flat])
    starts = starts.reshape(mesh.devices.shape)
    steps = {
        name: int(np.abs(np.diff(starts, axis=i)).max())
        for i, name in enumerate(mesh.axis_names)
        if mesh.shape[name] > 1
    }
    names = tuple(sorted((name for name in steps if steps[name]), key=lambda name: -steps[name]))
    spec = PartitionSpec(*(None,) * axis, names or None)
    if math.prod(mesh.shape[name] for name in names) > shape[axis]:
        return ()
    expected = NamedSharding(mesh, spec).devices_indices_map(shape)
    same = all(expected[device][axis] == indices[device][axis] for device in indices)
    return names if same else ()


def mesh_axes_of(entry: Any) -> tuple[str, ...]:
    """Mesh axes in one entry of a PartitionSpec."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def _added(x: jax.Array, axes: set[str]) -> jax.Array:
    return lax.psum(x, tuple(sorted(axes))) if axes else x


def _placed(
    ops: Operands, config: Config, total: int, axes: tuple[str, ...]
) -> tuple[Operands, Config, jax.Array]:
    """A shard of the queries, of `total` in all, as a call of its own: lengths say where it stands.

    Returns:
      Operands and config of that call, and which entry of the whole relative_bias is the first of
      the shard's: [], or [B] with lengths of queries.
    """
    t, _, s, _, _ = shapes(ops, config)
    start = first = lax.axis_index(axes) * t
    q_lengths, relative_bias = ops.q_lengths, ops.relative_bias
    div = dict(zip(FIELDS, config.div, strict=True))
    if q_lengths is not None:
        # Row i reads entry (start + i - j) + (S_b - T_b) + (total - 1) of the whole, and of its own
        # (i - j) + (S_b - min(T_b - start, t)) + (t - 1). They are start + total - T_b apart where
        # all rows of the shard are live, and else total - t: the lesser of the two.
        t_b = jnp.minimum(_expanded(ops, config, "q_lengths"), total)
        first = jnp.minimum(start + total - t_b, total - t)
        q_lengths = jnp.maximum(q_lengths - start, 0)
    elif config.is_causal or config.window is not None:
        q_lengths = jnp.full(1, total - start, jnp.int32)
    if relative_bias is not None:
        if first.ndim:
            relative_bias = _expanded(ops, config, "relative_bias")
            div["relative_bias"] = 1
        cut = functools.partial(lax.dynamic_slice_in_dim, slice_size=t + s - 1, axis=1)
        relative_bias = _per_entry(cut, relative_bias, first)
    ops = ops._replace(q_lengths=q_lengths, relative_bias=relative_bias)
    return ops, dataclasses.replace(config, div=tuple(div.values())), first


def _put_back(x: jax.Array, first: jax.Array, batch: int, length: int) -> jax.Array:
    """The gradient of the whole relative_bias from that of a shard's entries: entry b of the batch
    adds to b % batch."""

    def put(x: jax.Array, first: jax.Array) -> jax.Array:
        whole = jnp.zeros((x.shape[0], length), x.dtype)
        return lax.dynamic_update_slice_in_dim(whole, x, first, axis=1)

    x = _per_entry(put, x, first)
    return x.reshape(x.shape[0] // max(batch, 1), batch, *x.shape[1:]).sum(axis=0)


def _per_entry(f: Callable[..., jax.Array], x: jax.Array, first: jax.Array) -> jax.Array:
    return jax.vmap(f, (0, 0 if first.ndim else None))(x, first)


def _expanded(ops: Operands, config: Config, name: str) -> jax.Array:
    """Operand `name` with the full batch."""
    x = getattr(ops, name)
    entries = jnp.arange(config.batch) // config.div[FIELDS.index(name)]
    return x[entries % x.shape[0]]
