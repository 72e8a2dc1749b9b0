"""Attention whose keys are spread over several calls or devices.

Of bounded logits partial results add: each part is weighted by its own sum of exponentials, and the
weights need no maximum. The backward of a part needs no more than lse and out of the whole row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_cosine_attn import _primitive
from jax_cosine_attn._api import operands_of
from jax_cosine_attn._blockwise import log_of_sum
from jax_cosine_attn._config import Config, Operands
from jax_cosine_attn._validate import Static, validate
from jax_cosine_attn._vjp import Engine, attention

# Of |logits|. Beyond it exp(-2 * bound + 40) of float32 is 0, and sums need a maximum.
_MAX_CONSTANT_SHIFT = 63.0

AxisName = str | tuple[str, ...] | None


def merge_partials(
    outs: Sequence[jax.Array] | jax.Array, lses: Sequence[jax.Array] | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Attention over the union of disjoint key sets, from attention over each of them.

    Exact and associative: a result can be merged again. Where no part attends a key, lse is -inf,
    out is 0 and gradients are 0.

    Args:
      outs: float outputs, each [B, T, N, H] (or [T, N, H]), or one array of them stacked on axis 0.
      lses: their log-sum-exps in natural units, each [B, T, N] (or [T, N]), stacked likewise.

    Returns:
      (out, lse): out in the dtype of outs, lse float32 (float64 for float64 outs).

    Raises:
      ValueError: no parts, as many outs as lses are not given, or shapes do not match.
      TypeError: an array is not floating point.
    """
    if len(outs) != len(lses) or len(outs) == 0:
        raise ValueError(
            f"merge_partials needs as many outs as lses; got {len(outs)} and {len(lses)}"
        )
    for out, lse in zip(outs, lses, strict=True):
        if out.shape[:-1] != lse.shape or out.shape != outs[0].shape:
            raise ValueError(
                "every out must be [B, T, N, H] and its lse [B, T, N]; got "
                f"outs {[x.shape for x in outs]}, lses {[x.shape for x in lses]}"
            )
    dtypes = [x.dtype for x in (*outs, *lses)]
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        raise TypeError(f"outs and lses must be floating point; got {[str(x) for x in dtypes]}")
    dtype = jnp.result_type(*outs)
    accumulated = jnp.promote_types(dtype, jnp.float32)
    out = jnp.stack([x.astype(accumulated) for x in outs])
    lse = jnp.stack([x.astype(accumulated) for x in lses])

    # Each `where` guards one quotient or exponential at -inf; the values it replaces and their
    # gradients are finite, so no NaN is multiplied by zero on the way back.
    live = lse > -jnp.inf
    any_live = live.any(axis=0)
    shift = jax.lax.stop_gradient(jnp.where(any_live, lse.max(axis=0), 0))
    weight = jnp.where(live, jnp.exp(jnp.where(live, lse - shift, 0)), 0)
    total = jnp.where(any_live, weight.sum(axis=0), 1)
    merged = (weight[..., None] * jnp.where(live[..., None], out, 0)).sum(axis=0) / total[..., None]
    merged = jnp.where(any_live[..., None], merged, 0)
    return merged.astype(dtype), jnp.where(any_live, shift + jnp.log(total), -jnp.inf)


def zigzag_indices(length: int, devices: int) -> np.ndarray:
    """The order of positions that gives every device of a causal ring the same work.

    The sequence is cut into 2 * devices chunks, and device r has chunks r and 2 * devices - 1 - r:
    `x[:, zigzag_indices(T, devices)]` is the sequence to be sharded, the indices themselves are its
    positions, and `numpy.argsort` of them is the way back.

    Args:
      length: of the whole sequence.
      devices: size of the mesh axis over which it is sharded.

    Returns:
      int32 [length].

    Raises:
      ValueError: length is not a multiple of 2 * devices.
    """
    if devices < 1 or length % (2 * devices):
        raise ValueError(
            f"length must be a multiple of 2 * devices; got length={length}, devices={devices}"
        )
    chunks = np.arange(length, dtype=np.int32).reshape(2 * devices, -1)
    pairs = [(chunk, 2 * devices - 1 - chunk) for chunk in range(devices)]
    return chunks[np.array(pairs).reshape(-1)].reshape(-1)


def ring_cosine_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    *,
    axis_name: str,
    mesh: Mesh | AbstractMesh | None = None,
    batch_axis: AxisName = None,
    head_axis: AxisName = None,
    scale: float | jax.Array = 8.0,
    scale_bound: float | None = None,
    l2norm_qk: bool = True,
    l2norm_groups: int = 1,
    is_causal: bool = False,
    seq_lengths: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    precision: Any = None,
    deterministic: bool = False,
    implementation: str | Sequence[str] | None = None,
    return_residual: bool = False,
) -> Any:
    """`cosine_attention` of a sequence that is sharded over a mesh axis, in O(T / devices) memory.

    Keys and values travel around the axis while each device attends to what it has; so do their
    gradients in the backward pass, in float32, which recomputes no forward. To be called inside
    `jax.shard_map` with the device's shard, or outside with `mesh` and whole arrays. T and S below
    are lengths of a shard.

    Args:
      query: [B, T, N, H].
      key, value: [B, S, K, H].
      bias: [1|B, 1|N, 1|T, S of all shards]: rows of the shard, columns of all keys in the order in
        which they are sharded.
      axis_name: the mesh axis of the sequence.
      mesh: makes it a call on whole arrays, cut over axis_name, batch_axis and head_axis.
      batch_axis, head_axis: mesh axes, or tuples of them, that cut B, and N and K unless K is 1;
        with mesh only.
      is_causal: query and key are one sequence, in the order of `zigzag_indices`.
      seq_lengths: int32 [B], real lengths of the whole sequences, of queries and keys alike; or,
        unless is_causal, a pair of them.
      segment_ids: int32 [B, T], of the shard; or a pair ([B, T], [B, S]).
      scale, scale_bound, l2norm_qk, l2norm_groups, precision, deterministic, return_residual: as in
        `cosine_attention`. An array scale is the same on all devices of axis_name.
      implementation: as in `cosine_attention`, but not "reference".

    Returns:
      As `cosine_attention`, sharded like query.

    Raises:
      ValueError, TypeError: as `cosine_attention`; T is odd, or differs from S, with is_causal.
    """
    given = dict(
        scale_bound=scale_bound,
        l2norm_qk=l2norm_qk,
        l2norm_groups=l2norm_groups,
        is_causal=is_causal,
        precision=precision,
        deterministic=deterministic,
        implementation=implementation,
        return_residual=return_residual,
    )
    if mesh is not None:
        rows = P(batch_axis, axis_name)
        return _over_mesh(
            functools.partial(ring_cosine_attention, axis_name=axis_name, **given),
            mesh,
            P(batch_axis, axis_name, head_axis),
            return_residual,
            query=(query, P(batch_axis, axis_name, head_axis)),
            key=(key, _key_spec(key, batch_axis, axis_name, head_axis)),
            value=(value, _key_spec(value, batch_axis, axis_name, head_axis)),
            bias=(bias, _bias_spec("bias", bias, batch_axis, head_axis, axis_name, None)),
            scale=(scale, P(head_axis)),
            seq_lengths=(seq_lengths, P(batch_axis)),
            segment_ids=(segment_ids, rows),
        )
    _check_alone(batch_axis, head_axis)
    if is_causal and isinstance(seq_lengths, tuple):
        raise ValueError("is_causal: queries and keys have one length; got a pair of seq_lengths")
    q_lengths, kv_lengths = seq_lengths if isinstance(seq_lengths, tuple) else (seq_lengths,) * 2
    lengths = dict(query_seq_lengths=q_lengths, key_value_seq_lengths=kv_lengths)
    raw, static = _validate(
        query, key, value, **given, **lengths, scale=scale, segment_ids=segment_ids
    )
    t, s = query.shape[1], key.shape[1]
    if is_causal and (t != s or t % 2):
        raise ValueError(
            "is_causal needs shards of two chunks, of queries and keys alike; "
            f"got T={t}, S={s}: query {query.shape}, key {key.shape}"
        )
    if bias is not None:
        whole = (key.shape[0], s * lax.axis_size(axis_name), *key.shape[2:])
        columns = jax.ShapeDtypeStruct(whole, key.dtype)
        _validate(query, columns, columns, bias=bias, scale=scale, **given)
        _check_rank(bias=bias)
        raw = raw._replace(bias=bias)
    return _attend(raw, static, _Ring(axis_name, lax.axis_size(axis_name)))


def kv_sharded_cosine_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    axis_name: str,
    mesh: Mesh | AbstractMesh | None = None,
    batch_axis: AxisName = None,
    head_axis: AxisName = None,
    scale: float | jax.Array = 8.0,
    scale_bound: float | None = None,
    l2norm_qk: bool = True,
    l2norm_groups: int = 1,
    is_causal: bool = False,
    key_value_seq_lengths: jax.Array | None = None,
    precision: Any = None,
    deterministic: bool = False,
    implementation: str | Sequence[str] | None = None,
    return_residual: bool = False,
) -> Any:
    """`cosine_attention` to keys that are sharded over a mesh axis, with queries on every device.

    For few queries against a long cache: one all-reduce of what the queries found on each device,
    two where the logits have no bound. To be called inside `jax.shard_map`, or outside with `mesh`
    and whole arrays. S below is the length of a shard.

    Args:
      query: [B, T, N, H], the same on all devices of axis_name.
      key, value: [B, S, K, H].
      bias, mask: [1|B, 1|N, 1|T, 1|S], columns of the shard.
      axis_name: the mesh axis of the keys.
      mesh: makes it a call on whole arrays, cut over axis_name, batch_axis and head_axis.
      batch_axis, head_axis: mesh axes, or tuples of them, that cut B, and N and K unless K is 1;
        with mesh only.
      is_causal: the last query stands at the last key of all: as in `cosine_attention`. For more
        than one query it takes a mask [B, 1, T, S].
      key_value_seq_lengths: int32 [B], of all shards together.
      scale, scale_bound, l2norm_qk, l2norm_groups, precision, deterministic, return_residual: as in
        `cosine_attention`. An array scale is the same on all devices of axis_name.
      implementation: as in `cosine_attention`, but not "reference".

    Returns:
      As `cosine_attention`, the same on all devices of axis_name.

    Raises:
      ValueError, TypeError: as `cosine_attention`.
    """
    given = dict(
        scale_bound=scale_bound,
        l2norm_qk=l2norm_qk,
        l2norm_groups=l2norm_groups,
        precision=precision,
        deterministic=deterministic,
        implementation=implementation,
        return_residual=return_residual,
    )
    if mesh is not None:
        return _over_mesh(
            functools.partial(
                kv_sharded_cosine_attention, axis_name=axis_name, is_causal=is_causal, **given
            ),
            mesh,
            P(batch_axis, None, head_axis),
            return_residual,
            query=(query, P(batch_axis, None, head_axis)),
            key=(key, _key_spec(key, batch_axis, axis_name, head_axis)),
            value=(value, _key_spec(value, batch_axis, axis_name, head_axis)),
            bias=(bias, _bias_spec("bias", bias, batch_axis, head_axis, None, axis_name)),
            mask=(mask, _bias_spec("mask", mask, batch_axis, head_axis, None, axis_name)),
            scale=(scale, P(head_axis)),
            key_value_seq_lengths=(key_value_seq_lengths, P(batch_axis)),
        )
    _check_alone(batch_axis, head_axis)
    _check_rank(bias=bias, mask=mask)
    b, s = key.shape[:2]
    first = lax.axis_index(axis_name) * s
    raw, static = _validate(
        query,
        key,
        value,
        bias=bias,
        mask=mask,
        scale=scale,
        **given,
        is_causal=is_causal,
        key_value_seq_lengths=key_value_seq_lengths,
    )
    static = static._replace(config=dataclasses.replace(static.config, is_causal=False))
    s_b = raw.kv_lengths
    if is_causal and query.shape[1] > 1:
        last = s * lax.axis_size(axis_name) if s_b is None else s_b[:, None, None, None]
        i, j = jnp.arange(query.shape[1])[:, None], first + jnp.arange(s)
        seen = jnp.broadcast_to(j <= i + (last - query.shape[1]), (b, 1, query.shape[1], s))
        raw = raw._replace(mask=seen if mask is None else seen & mask)
    if s_b is not None:
        raw = raw._replace(kv_lengths=jnp.clip(s_b - first, 0, s))
    return _attend(raw, static, _KeysApart(axis_name))


# One call over a mesh.


def _over_mesh(
    f: Callable[..., Any], mesh: Any, spec: P, return_residual: bool, **arrays: tuple[Any, P]
) -> Any:
    """f under shard_map: arrays are cut by their specs, numbers passed on."""
    spec_of = {
        name: jax.tree.map(lambda x, spec=spec: P(*spec[: x.ndim]), x)
        for name, (x, spec) in arrays.items()
        if hasattr(x, "shape") or isinstance(x, tuple)
    }
    static = {name: x for name, (x, _) in arrays.items() if name not in spec_of}
    given = {name: arrays[name][0] for name in spec_of}
    if AxisType.Explicit in mesh.axis_types:  # where nothing is cut unasked
        given = jax.tree.map(
            lambda x, spec: jax.sharding.reshard(x, NamedSharding(mesh, spec)), given, spec_of
        )
    mapped = jax.shard_map(
        lambda given: f(**given, **static),
        mesh=mesh,
        in_specs=(spec_of,),
        out_specs=(spec, spec) if return_residual else spec,
    )
    # Outside of jit shard_map runs no custom_vjp.
    return jax.jit(mapped, inline=True)(given)


def _key_spec(x: Any, batch_axis: AxisName, axis_name: AxisName, head_axis: AxisName) -> P:
    """Of [B, S, K, H]: one head serves all devices."""
    return P(batch_axis, axis_name, None if x.shape[2:3] == (1,) else head_axis)


def _bias_spec(name: str, x: Any, *axes: AxisName) -> P:
    """Of [1|B, 1|N, 1|T, 1|S]: what is shared is not cut."""
    _check_rank(**{name: x})
    sizes = () if x is None else x.shape
    return P(*(None if size == 1 else axis for size, axis in zip(sizes, axes, strict=False)))


def _check_rank(**arrays: Any) -> None:
    for name, x in arrays.items():
        if x is not None and len(x.shape) != 4:
            raise ValueError(f"{name} must have the four axes [1|B, 1|N, 1|T, 1|S], got {x.shape}")


def _check_alone(batch_axis: AxisName, head_axis: AxisName) -> None:
    if batch_axis is not None or head_axis is not None:
        raise ValueError(
            f"batch_axis={batch_axis!r} and head_axis={head_axis!r} go with mesh; inside shard_map "
            "its specs cut batch and heads"
        )


def _validate(query: Any, key: Any, value: Any, **given: Any) -> tuple[Operands, Static]:
    absent = dict.fromkeys(
        (
            "bias",
            "mask",
            "local_window_size",
            "query_seq_lengths",
            "key_value_seq_lengths",
            "segment_ids",
            "relative_bias",
        )
    )
    if len(query.shape) != 4:
        raise ValueError(f"query must be [B, T, N, H]; got query {query.shape}, key {key.shape}")
    defaults: dict[str, Any] = absent | {"is_causal": False}
    raw, static = validate(layout="BTNH", query=query, key=key, value=value, **(defaults | given))
    if "reference" in static.candidates:
        raise ValueError(
            "implementation must be None, 'cuda' or 'xla' where keys are on several devices, got "
            f"{given['implementation']!r}"
        )
    return raw, static


def _attend(raw: Operands, static: Static, engine: Engine) -> Any:
    # Lengths of sequences are not clamped to those of shards.
    lengths: dict[str, Any] = dict(q_lengths=raw.q_lengths, kv_lengths=raw.kv_lengths)
    ops = operands_of(raw._replace(q_lengths=None, kv_lengths=None), static)._replace(**lengths)
    out, lse = attention(ops, static.config, engine)
    return (out, lse.swapaxes(1, 2)) if static.return_residual else out


# Sums of partial results.

Partial = tuple[jax.Array, jax.Array, jax.Array]  # out [B, T, N, H]; lse and lse_low [B, N, T]


def _constant_shift(ops: Operands, config: Config) -> float | None:
    """c of exp(lse - c) that loses no part and overflows nowhere; None: a maximum is needed."""
    if ops.bias is not None or config.bound is None or config.bound > _MAX_CONSTANT_SHIFT:
        return None
    return max(0.0, config.bound - 40.0)


class _Sum(NamedTuple):
    numerator: jax.Array  # [B, T, N, H]
    denominator: jax.Array  # [B, N, T]

    @classmethod
    def of(cls, part: Partial, shift: Any) -> _Sum:
        out, lse, low = part
        weight = jnp.exp(lse - shift + low)
        return cls(_rows(weight) * out.astype(lse.dtype), weight)

    def result(self, shift: Any, dtype: Any) -> Partial:
        dead = self.denominator == 0
        total = jnp.where(dead, 1, self.denominator)
        lse, low = log_of_sum(shift, total)
        out = (self.numerator / _rows(total)).astype(dtype)
        return out, jnp.where(dead, -jnp.inf, lse), jnp.where(dead, 0, low)


def _rows(x: jax.Array) -> jax.Array:
    """[B, N, T] beside [B, T, N, H]."""
    return x.swapaxes(1, 2)[..., None]


def _finite(lse: jax.Array) -> jax.Array:
    return jnp.where(lse == -jnp.inf, 0, lse)


class _KeysApart(NamedTuple):
    """Engine of keys sharded over an axis, queries and results on all of its devices."""

    axis: str

    def fwd(self, ops: Operands, config: Config) -> Partial:
        part = _primitive.fwd(ops, config)
        shift: Any = _constant_shift(ops, config)
        if shift is None:
            shift = _finite(lax.pmax(part[1], self.axis))
        sums = _Sum.of(part, shift)
        # One array, so that it is one all-reduce whatever XLA combines.
        both = jnp.concatenate([sums.numerator, _rows(sums.denominator)], axis=-1)
        both = lax.psum(both, self.axis)
        total = _Sum(both[..., :-1], both[..., -1].swapaxes(1, 2))
        return total.result(shift, ops.q.dtype)

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
        if self.axis not in jax.typeof(ops.k).manual_axis_type.varying:
            # With check_vma=False a cotangent is what one device reads of the result.
            dout, dlse = jax.tree.map(lambda x: lax.psum(x, self.axis), (dout, dlse))
        config = dataclasses.replace(config, partial=True)
        return _primitive.bwd(ops, out, lse, lse_low, dout, dlse, config, wanted)


# The ring.


class _Part(NamedTuple):
    """What of a device's queries meets what of a block of keys; halves only in a causal ring."""

    rows: Literal["all", "last"]
    keys: Literal["all", "first"]
    is_causal: bool


_WHOLE = _Part("all", "all", False)
_OWN = _Part("all", "all", True)
# Of chunks r and 2 R - 1 - r, keys of a device before this one are seen by all rows in the first
# chunk and by none in the last; those of a device after it by the last rows only, in both.
_FROM_BEFORE = _Part("all", "first", False)
_FROM_AFTER = _Part("last", "all", False)


class _Ring(NamedTuple):
    """Engine of queries and keys sharded over an axis of `size` devices."""

    axis: str
    size: int

    def fwd(self, ops: Operands, config: Config) -> Partial:
        constant = _constant_shift(ops, config)

        def step(hop: Any, keys: Operands, total: Any) -> tuple[Any, tuple]:
            part = self.on_parts(hop, config, functools.partial(self.part_fwd, ops, keys, config))
            if constant is not None:
                sums = _Sum.of(part, constant)
                return sums if total is None else jax.tree.map(jnp.add, total, sums), ()
            if total is None:
                return (_Sum.of(part, _finite(part[1])), part[1]), ()
            before, old = total
            new = jnp.maximum(old, part[1])
            decay = jnp.exp(old - _finite(new))
            after = _Sum.of(part, _finite(new))
            before = _Sum(_rows(decay) * before.numerator, decay * before.denominator)
            return (jax.tree.map(jnp.add, before, after), new), ()

        total, _ = self.around(_keys_of(ops), step)
        if constant is not None:
            return total.result(jnp.asarray(constant, total.denominator.dtype), ops.q.dtype)
        sums, largest = total
        return sums.result(_finite(largest), ops.q.dtype)

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
        results = out, lse, lse_low, dout, dlse

        def step(hop: Any, keys: Operands, total: Any) -> tuple[Any, Any]:
            compute = functools.partial(self.part_bwd, ops, keys, results, config, wanted)
            dq, dk, dv, *rest = self.on_parts(hop, config, compute)
            here = (dq, *rest)
            return here if total is None else jax.tree.map(jnp.add, total, here), (dk, dv)

        (dq, *rest), (dk, dv) = self.around(_keys_of(ops), step)
        gradients = zip(("q", "k", "v", *wanted), (dq, dk, dv, *rest), strict=True)
        return tuple(x.astype(getattr(ops, name).dtype) for name, x in gradients)

    def around(self, keys: Operands, step: Callable[[Any, Operands, Any], Any]) -> tuple[Any, Any]:
        """(total, what was added up for this device's keys) of all blocks.

        `step(hop, keys, total)` returns the new total and what it adds for keys, which travels
        with them. Transfers do not wait for the step that they stand beside.
        """
        pairs = [(i, (i + 1) % self.size) for i in range(self.size)]

        def move(tree: Any) -> Any:
            return jax.tree.map(lambda x: lax.ppermute(x, self.axis, pairs), tree)

        if self.size == 1:
            return step(0, keys, None)
        arriving = move(keys)
        total, passenger = step(0, keys, None)

        def hop_on(state: Any, hop: jax.Array) -> tuple[Any, None]:
            keys, total, passenger = state
            arriving, passenger = move((keys, passenger))
            total, more = step(hop, keys, total)
            return (arriving, total, jax.tree.map(jnp.add, passenger, more)), None

        state, _ = lax.scan(hop_on, (arriving, total, passenger), jnp.arange(1, self.size - 1))
        keys, total, passenger = state
        passenger = move(passenger)
        total, more = step(self.size - 1, keys, total)
        return total, move(jax.tree.map(jnp.add, passenger, more))

    def on_parts(self, hop: Any, config: Config, compute: Callable[[Any, _Part], Any]) -> Any:
        """compute(source device, part) of the part that keys of `hop` devices before meet."""
        me = lax.axis_index(self.axis)
        source = (me - hop) % self.size
        if not config.is_causal:
            return compute(source, _WHOLE)
        if isinstance(hop, int) and hop == 0:
            return compute(source, _OWN)
        return lax.cond(
            source < me,
            lambda source: compute(source, _FROM_BEFORE),
            lambda source: compute(source, _FROM_AFTER),
            source,
        )

    def part_fwd(
        self, ops: Operands, keys: Operands, config: Config, source: Any, part: _Part
    ) -> Partial:
        part_ops, part_config = self.part(ops, keys, config, source, part)
        out, lse, low = _primitive.fwd(part_ops, part_config)
        if part.rows == "all":
            return out, lse, low
        dead = jnp.full_like(lse, -jnp.inf)
        return (
            jnp.concatenate([jnp.zeros_like(out), out], 1),
            jnp.concatenate([dead, lse], 2),
            jnp.concatenate([jnp.zeros_like(low), low], 2),
        )

    def part_bwd(
        self,
        ops: Operands,
        keys: Operands,
        results: tuple,
        config: Config,
        wanted: tuple[str, ...],
        source: Any,
        part: _Part,
    ) -> tuple[jax.Array, ...]:
        """Gradients of what the device has, in float32; of bias of all columns."""
        part_ops, part_config = self.part(ops, keys, config, source, part)
        out, lse, low, dout, dlse = results
        if part.rows == "last":
            out, dout = (_half(x, 1, last=True) for x in (out, dout))
            lse, low, dlse = (
                None if x is None else _half(x, 2, last=True) for x in (lse, low, dlse)
            )
        gradients = _primitive.bwd(part_ops, out, lse, low, dout, dlse, part_config, wanted)
        named = dict(zip(("q", "k", "v", *wanted), gradients, strict=True))
        named = {name: x.astype(ops.scale.dtype) for name, x in named.items()}
        if part.rows == "last":
            named["q"] = jnp.concatenate([jnp.zeros_like(named["q"]), named["q"]], 1)
        if part.keys == "first":
            for name in "kv":
                named[name] = jnp.concatenate([named[name], jnp.zeros_like(named[name])], 1)
        if "bias" in wanted and ops.bias is not None:
            x = named["bias"]
            if part.rows == "last" and ops.bias.shape[2] > 1:
                x = jnp.concatenate([jnp.zeros_like(x), x], 2)
            if ops.bias.shape[3] > 1:
                # Zeros that vary over the mesh as x does.
                zeros = jnp.zeros_like(x, shape=ops.bias.shape) + 0 * source.astype(x.dtype)
                x = lax.dynamic_update_slice_in_dim(zeros, x, source * ops.k.shape[1], 3)
            named["bias"] = x
        return tuple(named.values())

    def part(
        self, ops: Operands, keys: Operands, config: Config, source: Any, part: _Part
    ) -> tuple[Operands, Config]:
        """The part as a call of its own."""
        t, s = ops.q.shape[1], ops.k.shape[1]
        bias = ops.bias
        if bias is not None and bias.shape[3] > 1:
            bias = lax.dynamic_slice_in_dim(bias, source * s, s, 3)
        q, q_segments = ops.q, ops.q_segments
        k, v, kv_segments = keys.k, keys.v, keys.kv_segments
        me = lax.axis_index(self.axis)
        q_lengths = self.lengths(ops.q_lengths, me, t, config.is_causal)
        kv_lengths = self.lengths(ops.kv_lengths, source, s, config.is_causal)
        if part.rows == "last":
            q = _half(q, 1, last=True)
            q_segments = None if q_segments is None else _half(q_segments, 1, last=True)
            q_lengths = None if q_lengths is None else jnp.maximum(q_lengths - t // 2, 0)
            if bias is not None and bias.shape[2] > 1:
                bias = _half(bias, 2, last=True)
        if part.keys == "first":
            k, v = _half(k, 1), _half(v, 1)
            kv_segments = None if kv_segments is None else _half(kv_segments, 1)
            kv_lengths = None if kv_lengths is None else jnp.minimum(kv_lengths, s // 2)
            if bias is not None and bias.shape[3] > 1:
                bias = _half(bias, 3)
        ops = Operands(
            q=q,
            k=k,
            v=v,
            scale=ops.scale,
            bias=bias,
            q_lengths=q_lengths,
            kv_lengths=kv_lengths,
            q_segments=q_segments,
            kv_segments=kv_segments,
        )
        partial = self.size > 1
        return ops, dataclasses.replace(config, is_causal=part.is_causal, partial=partial)

    def lengths(self, whole: Any, device: Any, length: int, is_zigzag: bool) -> Any:
        """Lengths of a device's shard: in its first rows, in a zigzag too."""
        if whole is None:
            return None
        if not is_zigzag:
            return jnp.clip(whole - device * length, 0, length)
        chunk = length // 2
        places = device, 2 * self.size - 1 - device
        first, last = (jnp.clip(whole - place * chunk, 0, chunk) for place in places)
        return first + last


def _keys_of(ops: Operands) -> Operands:
    """What travels."""
    empty = Operands(*(None,) * len(ops))  # type: ignore[arg-type]
    return empty._replace(k=ops.k, v=ops.v, kv_segments=ops.kv_segments)


def _half(x: jax.Array, axis: int, last: bool = False) -> jax.Array:
    half = x.shape[axis] // 2
    return lax.slice_in_dim(x, half if last else 0, 2 * half if last else half, axis=axis)
