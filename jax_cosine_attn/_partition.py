"""How XLA's SPMD partitioner may cut a call: over batch, heads and queries, never over keys.

Shards are independent calls. What they share is on every one of them (keys and values under sharded
queries, for example), and the gradients of it are added up.
"""

from __future__ import annotations

import dataclasses
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

from jax_cosine_attn._config import FIELDS, Config, Operands, shapes

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
    div: int


class _Cut:
    """What a call may be cut into, and how its operands and results are cut then."""

    def __init__(
        self,
        ops: Operands,
        config: Config,
        fields: Sequence[str],
        wanted: Sequence[str] | None,
        grad_batch: Sequence[int],
        has_dlse: bool,
    ):
        self.config = config
        t, n, _, k, _ = shapes(ops, config)
        div = dict(zip(FIELDS, config.div, strict=True))

        def like(name: str, batch: int) -> _Tensor:
            return _Tensor(name, (batch, *getattr(ops, name).shape[1:]), 1)

        lse = _Tensor("lse", (config.batch, n, t), 1)
        full = {name: like(name, config.batch) for name in "qkv"}
        self.operands = [_Tensor(name, getattr(ops, name).shape, div[name]) for name in fields]
        if wanted is None:
            self.results = [full["q"], lse, lse]
        else:
            self.operands += [full["q"], lse, lse, full["q"], *([lse] if has_dlse else [])]
            self.results = [*full.values(), *map(like, wanted, grad_batch)]

        # Entry b reads row (b // div) % rows of an operand. A cut of the batch into c equal parts
        # leaves that rule as it is where c divides the rows, or the times that they repeat.
        batch = config.batch
        for tensor in (*self.operands, *self.results):
            rows = tensor.shape[0]
            if rows > 1 and tensor.div > 0:  # vmap over nothing divides by 0
                times = config.batch // (tensor.div * rows)
                batch = math.gcd(batch, rows if times == 1 else times)
        # Where a row stands among the keys is known to a shard only as far as lengths can tell it.
        by_lengths = config.is_causal or config.window is None
        queries = t if by_lengths and ops.relative_bias is None else 1
        # The most equal parts of batch, heads and queries.
        self.parts = {"b": batch, "n": n if k == 1 else k, "t": queries}

    def dims(self, tensor: _Tensor) -> str:
        dims = _DIMS[tensor.name]
        if len(dims) == 4 and dims[1] in "ts" and self.config.layout == "BNTH":
            dims = dims[0] + dims[2] + dims[1] + dims[3]
        return dims

    def factor(self, dim: str, size: int, tensor: _Tensor) -> str | None:
        """What cuts this dim of a tensor: b, n, t or None."""
        factor = "n" if dim == "k" else dim
        if size <= 1 or self.parts.get(factor, 1) <= 1:
            return None
        if dim == "b" and tensor.div * size != self.config.batch:
            return None
        return factor

    def rule(self) -> tuple[str, dict[str, Any]]:
        """Shardy's rule for the call, as text and keywords of `def_partition`."""
        sizes: dict[str, int] = {}
        whole: list[str] = []

        def label(dim: str, size: int, tensor: _Tensor) -> str:
            factor = self.factor(dim, size, tensor)
            if factor is None:
                whole.append(f"whole{len(whole)}")
                return whole[-1]
            parts = self.parts[factor]
            if size == parts:
                return factor
            # The first part of the dim is cut; heads of a group and mapped instances stay together.
            minor = f"{factor}{size // parts}"
            sizes.update({factor: parts, minor: size // parts})
            return f"({factor} {minor})"

        def side(tensors: Sequence[_Tensor]) -> list[str]:
            return [
                " ".join(
                    label(*pair, tensor)
                    for pair in zip(self.dims(tensor), tensor.shape, strict=True)
                )
                for tensor in tensors
            ]

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
        dims = zip(self.dims(tensor), tensor.shape, strict=True)
        factors = [self.factor(dim, size, tensor) for dim, size in dims]
        return PartitionSpec(*((axes.get(f) or None) if f else None for f in factors))


def partitioned(
    bind: Callable[..., Sequence[jax.Array]],
    ops: Operands,
    config: Config,
    fields: tuple[str, ...],
    wanted: tuple[str, ...] | None = None,
    grad_batch: tuple[int, ...] = (),
    has_dlse: bool = False,
) -> Callable[..., Sequence[jax.Array]]:
    """The call `bind(*operands, config, fields, ...)`, cut into shards under a mesh.

    Args:
      bind: a primitive's, without the parameters below.
      ops: avals of the operands of the whole call.
      config, fields: the parameters of the primitives.
      wanted, grad_batch, has_dlse: those of the backward; wanted None is the forward.
    """
    cut = _Cut(ops, config, fields, wanted, grad_batch, has_dlse)

    def call(*operands: jax.Array) -> Sequence[jax.Array]:
        return bind(*operands, **params(config, fields, grad_batch))

    def params(config: Config, fields: tuple[str, ...], grad_batch: Any) -> dict[str, Any]:
        backward = dict(wanted=wanted, grad_batch=grad_batch, has_dlse=has_dlse)
        return dict(config=config, fields=fields, **({} if wanted is None else backward))

    def partition(mesh: Mesh, operands: Any, results: Any) -> Any:
        axes = cut.axes(mesh, results[0].sharding)
        operand_specs, result_specs = (
            [cut.spec(tensor, axes) for tensor in tensors]
            for tensors in (cut.operands, cut.results)
        )
        parts = math.prod(mesh.shape[name] for name in axes["b"])

        def shard(*operands: jax.Array) -> list[jax.Array]:
            # Inside, no mesh is left to speak of.
            with jax.sharding.use_abstract_mesh(NO_MESH):
                local = Operands(**dict(zip(fields, operands, strict=False)))
                local_config = dataclasses.replace(config, batch=config.batch // parts)
                if axes["t"]:
                    local, local_config = _placed(local, local_config, cut.parts["t"], axes["t"])
                present = tuple(name for name in FIELDS if getattr(local, name) is not None)
                batches = tuple(n // parts if n == config.batch else n for n in grad_batch)
                outputs = bind(
                    *(getattr(local, name) for name in present),
                    *operands[len(fields) :],
                    **params(local_config, present, batches),
                )
                used = {name for names in axes.values() for name in names}
                return [
                    _added(x, used.difference(*map(_names, spec)))
                    for x, spec in zip(outputs, result_specs, strict=True)
                ]

        def shardings(specs: Sequence[PartitionSpec]) -> list[NamedSharding]:
            return [NamedSharding(mesh, spec) for spec in specs]

        return mesh, shard, shardings(result_specs), tuple(shardings(operand_specs))

    wrapped = custom_partitioning(call)
    rule, options = cut.rule()
    # Undecoded: JAX cannot decode a sharding by a part of a mesh axis, which the partitioner
    # comes to where heads of queries divide by the axis and heads of keys do not.
    wrapped.def_partition(partition, decode_shardings=False, sharding_rule=rule, **options)
    return wrapped


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


def _names(entry: Any) -> tuple[str, ...]:
    """Mesh axes in one entry of a PartitionSpec."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def _added(x: jax.Array, axes: set[str]) -> jax.Array:
    return lax.psum(x, tuple(sorted(axes))) if axes else x


def _placed(
    ops: Operands, config: Config, t: int, axes: tuple[str, ...]
) -> tuple[Operands, Config]:
    """A shard of the queries, of T in all, as a call of its own: lengths say where it stands.

    Rows [start, end) of a causal call see no key beyond the last one that row end - 1 sees, so
    that keys can end there, and then the last row of the shard stands at the last key.
    """
    local_t, _, s, _, _ = shapes(ops, config)
    end = (lax.axis_index(axes) + 1) * local_t

    def lengths(name: str, full: int) -> jax.Array:
        x = getattr(ops, name)
        if x is None:
            return jnp.full(config.batch, full, jnp.int32)
        entries = jnp.arange(config.batch) // config.div[FIELDS.index(name)]
        return x[entries % x.shape[0]]

    t_b, s_b = lengths("q_lengths", t), lengths("kv_lengths", s)
    if config.is_causal:
        s_b = jnp.clip(s_b - jnp.maximum(t_b - end, 0), 0, s)
    t_b = jnp.clip(t_b - (end - local_t), 0, local_t)
    div = list(config.div)
    for name in ("q_lengths", "kv_lengths"):
        div[FIELDS.index(name)] = 1
    ops = ops._replace(q_lengths=t_b.astype(jnp.int32), kv_lengths=s_b.astype(jnp.int32))
    return ops, dataclasses.replace(config, div=tuple(div))
