"""The "xla" implementation: attention over blocks of queries and keys in O(T + S) memory.

One `lax.scan` walks the list of (batch chunk, query block, key block) that may hold an allowed
pair. The list is static: what causal and window rule out is not in it, and blocks in which every
pair is allowed by position stand in a list of their own, whose body has no positional mask. With
lengths the alignment is data, so every block is listed and dead ones are skipped by `lax.cond`.
The backward pass recomputes the weights from lse. Blocks reach the accumulators, carried by the
scan and updated in place, in any order.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_cosine_attn._config import FIELDS, Config, Operands, shapes
from jax_cosine_attn._l2norm import accumulation_dtype, normalize
from jax_cosine_attn._reference import PRECISION

# Measured on 2 CPU cores, float32, H 64: 512 x 512 beats 256 x 256 by 1.5x (each block is a pass
# over the accumulators), and larger blocks leave the cache.
BLOCK = 512
# Blocks of logits held at once, as a number of (batch entry, head) pairs of BLOCK x BLOCK: enough
# work for one step on a GPU, 64 MiB of float32.
HEADS_PER_STEP = 64
# The constant shift is the bound itself, so weights lie in [exp(-2 bound), 1]. At most 20 keeps
# them above 4e-18: weight * value neither overflows nor vanishes for values from 1e-20 to 1e34.
MAX_CONSTANT_SHIFT = 20.0


class Block(NamedTuple):
    """One step of the scan: int32 scalars.

    The last block of an axis ends where the axis ends and so overlaps the one before it; `new_i`
    and `new_j` are the first row and key that it does not share.
    """

    b: Any  # first batch entry
    i: Any  # first query row
    j: Any  # first key
    new_i: Any
    new_j: Any


class _Call:
    """One call: sizes, the list of blocks, and how to read a block of each operand."""

    def __init__(self, ops: Operands, config: Config, grad_batch: tuple[int, ...] = ()):
        self.ops, self.config, self.batch = ops, config, config.batch
        self.t, self.n, self.s, self.k_heads, self.h = shapes(ops, config)
        self.group = self.n // self.k_heads
        self.dtype = accumulation_dtype(ops.q.dtype)
        # 16-bit inputs are multiplied as float32 at the backend's fastest setting, which keeps at
        # least the digits of float16 (TF32 on a GPU) and needs no care for the range of float16.
        self.precision = PRECISION[config.precision if ops.q.dtype == jnp.float32 else "default"]
        self.div = dict(zip(FIELDS, config.div, strict=True))
        self.q_axes, self.k_axes = ("btnh", "bskh") if config.layout == "BTNH" else ("bnth", "bksh")
        self.left, self.right = config.window or (None, None)
        if config.is_causal:
            self.right = 0 if self.right is None else min(self.right, 0)

        # Where one axis is short, the other's blocks are longer, but not so long that lengths and
        # causal have nothing left to skip.
        area = BLOCK * BLOCK
        self.block_q, self.block_k = (
            _block_size(length, min(max(BLOCK, area // other), 4 * BLOCK))
            for length, other in ((self.t, self.s), (self.s, self.t))
        )
        heads = max(1, HEADS_PER_STEP * area // (self.n * self.block_q * self.block_k))
        # Chunks must tile the batch, and each gradient's batch or be tiled by it (entry b of the
        # call goes to entry b % grad_batch).
        self.chunk = max(
            c
            for c in range(1, min(heads, self.batch) + 1)
            if self.batch % c == 0 and all(g % c == 0 or c % g == 0 for g in grad_batch)
        )

        # Per-entry data is small: expanded to the batch once.
        self.scale = self.expanded(ops.scale, "scale")
        self.has_lengths = ops.q_lengths is not None or ops.kv_lengths is not None
        if self.has_lengths:
            self.t_b, self.s_b = (
                jnp.full(self.batch, size, jnp.int32) if x is None else self.expanded(x, field)
                for x, field, size in (
                    (ops.q_lengths, "q_lengths", self.t),
                    (ops.kv_lengths, "kv_lengths", self.s),
                )
            )
        self.relative_bias, self.relative_div = ops.relative_bias, self.div["relative_bias"]
        if ops.relative_bias is not None and self.has_lengths:
            self.relative_bias = self.rolled(self.expanded(ops.relative_bias, "relative_bias"), -1)
            self.relative_div = 1

    def expanded(self, x: jax.Array, field: str) -> jax.Array:
        """Operand `field` with the full batch."""
        if x.shape[0] == self.batch and self.div[field] == 1:
            return x
        return x[(np.arange(self.batch) // self.div[field]) % x.shape[0]]

    def rolled(self, x: jax.Array, sign: int) -> jax.Array:
        """[B, ., T + S - 1] shifted between the entries of `Operands` and i - j + (S - 1), which
        does not depend on lengths. What wraps around belongs to dead pairs only."""
        shift = sign * (self.s_b - jnp.minimum(self.t_b, self.t) - self.s + self.t)
        return jax.vmap(functools.partial(jnp.roll, axis=-1))(x, shift)

    # The list of blocks.

    def blocks(self, edge: bool) -> Block | None:
        """Blocks whose pairs need the positional mask (edge) or do not, None if there are none."""
        i, new_i = _starts(self.t, self.block_q)
        j, new_j = _starts(self.s, self.block_k)
        # j - i - (S - T) over the pairs of each block.
        least = j - (i + self.block_q - 1)[:, None] - (self.s - self.t)
        most = (j + self.block_k - 1) - i[:, None] - (self.s - self.t)
        alive, inner = np.ones(least.shape, bool), (new_i == i)[:, None] & (new_j == j)
        if self.has_lengths:
            inner = np.zeros_like(inner)
        else:
            if self.left is not None:
                alive &= most >= -self.left
                inner &= least >= -self.left
            if self.right is not None:
                alive &= least <= self.right
                inner &= most <= self.right
        row, col = np.nonzero(alive & (inner != edge))
        if not row.size:
            return None
        b = np.arange(0, self.batch, self.chunk)
        columns = (i[row], j[col], new_i[row], new_j[col])
        return Block(
            *(
                x.astype(np.int32)
                for x in (b.repeat(row.size), *(np.tile(c, b.size) for c in columns))
            )
        )

    def is_live(self, block: Block) -> jax.Array:
        """Whether lengths, causal and window leave any pair of the block in any of its entries."""
        t_b, s_b = (lax.dynamic_slice(x, (block.b,), (self.chunk,)) for x in (self.t_b, self.s_b))
        live = (block.i < t_b) & (block.j < s_b)
        last_i = jnp.minimum(block.i + self.block_q, t_b) - 1
        last_j = jnp.minimum(block.j + self.block_k, s_b) - 1
        if self.left is not None:
            live &= last_j - block.i - (s_b - t_b) >= -self.left
        if self.right is not None:
            live &= block.j - last_i - (s_b - t_b) <= self.right
        return live.any()

    # Reading and writing blocks. `axes` names the axes of an array: b batch, t queries, s keys,
    # d diagonals i - j + (S - 1); the others are taken whole, as are broadcast axes of size 1.

    def place(self, axes: str, shape: tuple[int, ...], block: Block) -> tuple[list, list[int]]:
        """(starts, sizes) of the block of an array, batch axis included where it is contiguous."""
        spans = {
            "b": (block.b % shape[0], min(self.chunk, shape[0])),
            "t": (block.i, self.block_q),
            "s": (block.j, self.block_k),
            "d": (block.i - block.j + (self.s - self.block_k), self.block_q + self.block_k - 1),
        }
        pairs = [
            spans[axis] if axis in spans and size > 1 else (np.int32(0), size)
            for axis, size in zip(axes, shape, strict=True)
        ]
        return [jnp.int32(start) for start, _ in pairs], [size for _, size in pairs]

    def read(self, x: jax.Array, axes: str, block: Block, div: int = 1) -> jax.Array:
        """The block of x for the entries of the chunk: leading dim `chunk`, or 1 if they share."""
        starts, sizes = self.place(axes, x.shape, block)
        if x.shape[0] == 1 or (div == 1 and x.shape[0] == self.batch):
            return lax.dynamic_slice(x, starts, sizes)
        entries = ((block.b + jnp.arange(self.chunk, dtype=jnp.int32)) // div) % x.shape[0]
        return jax.vmap(lambda b: lax.dynamic_slice(x, [b, *starts[1:]], [1, *sizes[1:]])[0])(
            entries
        )

    def read_heads(self, x: jax.Array, axes: str, block: Block, div: int = 1) -> jax.Array:
        """The block of a q-, k- or v-like tensor as [chunk, heads, rows, H] for products."""
        y = self.read(x, axes, block, div)
        y = y.swapaxes(1, 2) if self.config.layout == "BTNH" else y
        return jnp.broadcast_to(y, (self.chunk, *y.shape[1:])).astype(self.dtype)

    def folded(self, x: jax.Array, batch: int) -> jax.Array:
        """Sum of the entries b of x, per b % batch."""
        size = min(batch, x.shape[0])
        return x.reshape(x.shape[0] // size, size, *x.shape[1:]).sum(axis=0)

    def product(self, formula: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """einsum of blocks over their last two axes.

        r are the rows of q's side, the N // K heads that share a kv head laid end to end, so k and
        v are not repeated and every product is one matrix per kv head.
        """

        def matrices(x: jax.Array, axes: str) -> jax.Array:
            rows = self.group * self.block_q if axes[0] == "r" else x.shape[2]
            return x.reshape(self.chunk * self.k_heads, rows, x.shape[3])

        left, right, out = formula.replace("->", ",").split(",")
        x, y = matrices(x, left), matrices(y, right)
        if left[0] == "r" and out[0] != "r":
            # Contracting the rows of both sides is 1.7x slower on a CPU (measured) than
            # transposing the narrow side first; the barrier keeps XLA from folding it back.
            x, left = lax.optimization_barrier(x.swapaxes(1, 2)), left[::-1]
        z = jnp.einsum(f"n{left},n{right}->n{out}", x, y, precision=self.precision)
        if out == "rs":
            # Rounded once: of one row XLA makes a sum that it computes anew in every fusion that
            # reads it, each in another order, and then weights do not add up to their total.
            z = lax.optimization_barrier(z)
        heads, rows = (self.n, self.block_q) if out[0] == "r" else (self.k_heads, z.shape[1])
        return z.reshape(self.chunk, heads, rows, z.shape[2])

    # The mathematics of one block.

    def allowed(self, block: Block, edge: bool, bias: jax.Array | None) -> jax.Array | None:
        """bool [chunk|1, N|1, block_q|1, block_k|1]; None when every pair is allowed."""
        ops, terms = self.ops, []
        if ops.mask is not None:
            terms.append(self.read(ops.mask, "bnts", block, self.div["mask"]))
        if bias is not None:
            terms.append(bias != -jnp.inf)
        if ops.q_segments is not None and ops.kv_segments is not None:
            q_ids = self.read(ops.q_segments, "bt", block, self.div["q_segments"])
            kv_ids = self.read(ops.kv_segments, "bs", block, self.div["kv_segments"])
            terms.append(q_ids[:, None, :, None] == kv_ids[:, None, None, :])
        if edge:
            i = (block.i + jnp.arange(self.block_q))[None, None, :, None]
            j = (block.j + jnp.arange(self.block_k))[None, None, None]
            shift: Any = self.s - self.t
            if self.t % self.block_q:
                terms.append(i >= block.new_i)
            if self.s % self.block_k:
                terms.append(j >= block.new_j)
            if self.has_lengths:
                t_b, s_b = (
                    lax.dynamic_slice(x, (block.b,), (self.chunk,))[:, None, None, None]
                    for x in (self.t_b, self.s_b)
                )
                terms += [i < t_b, j < s_b]
                shift = s_b - t_b
            distance = j - i - shift
            if self.left is not None:
                terms.append(distance >= -self.left)
            if self.right is not None:
                terms.append(distance <= self.right)
        return functools.reduce(operator.and_, terms) if terms else None

    def bias(self, block: Block) -> jax.Array | None:
        """bias + relative_bias of the block, None without either."""
        total = None
        if self.ops.bias is not None:
            total = self.read(self.ops.bias, "bnts", block, self.div["bias"]).astype(self.dtype)
        if self.relative_bias is not None:
            row = self.read(self.relative_bias, "bnd", block, self.relative_div)
            relative = _from_diagonals(row.astype(self.dtype), self.block_q, self.block_k)
            total = relative if total is None else total + relative
        return total

    def logits(self, qk: jax.Array, bias: jax.Array | None, allowed: jax.Array | None) -> jax.Array:
        """[chunk, N, block_q, block_k], -inf where not allowed; qk: products of scaled q and k."""
        x = qk if bias is None else qk + bias
        return x if allowed is None else jnp.where(allowed, x, -jnp.inf)

    def unit(self, x: jax.Array) -> jax.Array:
        return normalize(x, self.config.groups) if self.config.l2norm_qk else x

    def unit_k(self, block: Block) -> jax.Array:
        return self.unit(self.read_heads(self.ops.k, self.k_axes, block, self.div["k"]))

    def scaled_q(self, block: Block) -> jax.Array:
        q = self.unit(self.read_heads(self.ops.q, self.q_axes, block, self.div["q"]))
        return q * self.read(self.scale, "bn", block)[..., None, None]

    def live_keys(self, x: jax.Array, allowed: jax.Array | None) -> jax.Array:
        """x [chunk, K, block_k, H] with zeros in keys that no row of the block may attend: what a
        dead key holds, NaN included, meets weights of zero and must not turn them into NaN."""
        if allowed is None:
            return x
        live = allowed.any(axis=2)
        if live.shape[1] == self.n:
            live = live.reshape(-1, self.k_heads, self.group, live.shape[-1]).any(axis=2)
        return jnp.where(live[..., None], x, 0)

    def scan(
        self, step: Callable[..., tuple], accumulators: tuple[tuple[str, jax.Array], ...]
    ) -> tuple[jax.Array, ...]:
        """The accumulators, pairs of axes and initial value, after `step` has seen all blocks.

        `step(block, edge, *their blocks)` returns the new values of their blocks.
        """
        axes = [a for a, _ in accumulators]

        def body(edge: bool, carry: tuple, block: Block) -> tuple[tuple, None]:
            places = [self.place(a, x.shape, block) for a, x in zip(axes, carry, strict=True)]
            old = [lax.dynamic_slice(x, *place) for x, place in zip(carry, places, strict=True)]
            compute = functools.partial(step, block, edge)
            if self.has_lengths:
                new = lax.cond(self.is_live(block), compute, lambda *xs: xs, *old)
            else:
                new = compute(*old)
            return tuple(
                lax.dynamic_update_slice(x, y, starts)
                for x, y, (starts, _) in zip(carry, new, places, strict=True)
            ), None

        carry = tuple(x for _, x in accumulators)
        for edge in (False, True):
            blocks = self.blocks(edge)
            if blocks is not None:
                carry, _ = lax.scan(functools.partial(body, edge), carry, blocks)
        return carry


def blockwise_fwd(ops: Operands, config: Config) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Forward pass.

    Args:
      ops: operands under the batch rule of `Operands`; no axis is empty.
      config: static description of the call.
    Returns:
      out, layout of q, full batch, dtype of v; lse [B, N, T], float32 (float64 for float64 inputs),
      and lse_low, what rounding took from it: exp(logit - lse) is off by half an ulp of lse, in all
      of a row, and a factor of S where a bias of -1e9 covers it.
    """
    call = _Call(ops, config)
    rows = (call.batch, call.n, call.t)
    needs_max = _bound(ops, config) > MAX_CONSTANT_SHIFT
    # Of each head, not the static one: the shift's last digit is what rounding a logit costs, and a
    # learned scale may lie far below its bound.
    bound = jnp.abs(call.scale) * config.groups

    def step(
        block: Block, edge: bool, pv: jax.Array, row_sum: jax.Array, *row_max: jax.Array
    ) -> tuple[jax.Array, ...]:
        bias = call.bias(block)
        allowed = call.allowed(block, edge, bias)
        k = call.unit_k(block)
        v = call.live_keys(call.read_heads(ops.v, call.k_axes, block, call.div["v"]), allowed)
        logits = call.logits(call.product("rh,sh->rs", call.scaled_q(block), k), bias, allowed)
        if needs_max:
            (old_max,) = row_max
            new_max = jnp.maximum(old_max, logits.max(axis=-1))
            shift = jnp.where(new_max == -jnp.inf, 0, new_max)
            decay = jnp.exp(old_max - shift)
            pv, row_sum, row_max = pv * decay[..., None], row_sum * decay, (new_max,)
            weights = jnp.exp(logits - shift[..., None])
        else:
            weights = jnp.exp(logits - call.read(bound, "bn", block)[..., None, None])
        pv = pv + call.product("rs,sh->rh", weights, v)
        return pv, row_sum + weights.sum(axis=-1), *row_max

    accumulators: tuple[tuple[str, jax.Array], ...] = (
        ("bnth", jnp.zeros((*rows, call.h), call.dtype)),
        ("bnt", jnp.zeros(rows, call.dtype)),
    )
    if needs_max:
        accumulators += (("bnt", jnp.full(rows, -jnp.inf, call.dtype)),)
    pv, row_sum, *row_max = call.scan(step, accumulators)
    is_dead = row_sum == 0
    row_sum = jnp.where(is_dead, 1, row_sum)
    shift = row_max[0] if needs_max else bound[..., None]
    out = _layout((pv / row_sum[..., None]).astype(ops.v.dtype), config)
    lse, lse_low = log_of_sum(shift, row_sum)
    return out, jnp.where(is_dead, -jnp.inf, lse), jnp.where(is_dead, 0, lse_low)


def log_of_sum(shift: jax.Array, row_sum: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(shift + log(row_sum), what rounding took from it)."""
    # Two-sum (Knuth, TAOCP 2, 4.2.2), and what the logarithm itself rounded off, which is many
    # digits of lse where shift and logarithm nearly cancel: so both are added up once more. Without
    # the barriers XLA takes (shift + x) - shift for x where the shift is a constant.
    log_sum = jnp.log(row_sum)
    lse = lax.optimization_barrier(shift + log_sum)
    from_log = lse - shift
    lse_low = (shift - (lse - from_log)) + (log_sum - from_log)
    lse_low += row_sum * jnp.exp(-log_sum) - 1
    rounded = lax.optimization_barrier(lse + lse_low)
    return rounded, lse_low - (rounded - lse)


def blockwise_bwd(
    ops: Operands,
    out: jax.Array,
    lse: jax.Array,
    lse_low: jax.Array,
    dout: jax.Array,
    dlse: jax.Array | None,
    config: Config,
    wanted: tuple[str, ...],
    grad_batch: tuple[int, ...],
) -> tuple[jax.Array, ...]:
    """Gradients of `blockwise_fwd` from its results, without stored weights.

    Args:
      ops, config: as in the forward pass.
      out, lse, lse_low: its results.
      dout, dlse: their cotangents; dead rows are ignored; dlse None means 0.
      wanted: subsequence of ("scale", "bias", "relative_bias").
      grad_batch: leading dim of each wanted gradient; batch entry b adds to entry b % grad_batch.
    Returns:
      dq, dk, dv of the raw q, k, v, full batch, then the wanted gradients; dtypes of the operands.
    """
    batch_of = dict(zip(wanted, grad_batch, strict=True))
    lengths = ops.q_lengths is not None or ops.kv_lengths is not None
    if lengths and "relative_bias" in batch_of:
        # Entries have their own alignment: summed apart, rolled and folded at the end.
        batch_of["relative_bias"] = config.batch
    tiled = tuple(size for name, size in batch_of.items() if name != "scale")
    call = _Call(ops, config, tiled)
    is_dead = lse == -jnp.inf
    products = jnp.sum(dout.astype(call.dtype) * out.astype(call.dtype), axis=-1)
    products = jnp.where(is_dead, 0, _layout(products, config))
    dlse = jnp.zeros_like(lse) if dlse is None else jnp.where(is_dead, 0, dlse)
    tensor_grads = [name for name in wanted if name != "scale"]

    has_whole_rows = call.block_k == call.s and not config.partial
    is_centred = "scale" in wanted and not config.partial

    def weights(
        block: Block, edge: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """(weights, products of scaled q and k, scaled q, k, rows of dout, allowed), dead rows and
        keys zeroed."""
        bias = call.bias(block)
        allowed = call.allowed(block, edge, bias)
        q = call.scaled_q(block)
        k = call.live_keys(call.unit_k(block), allowed)
        g = call.read_heads(dout, call.q_axes, block)
        row_lse, row_low = (call.read(x, "bnt", block)[..., None] for x in (lse, lse_low))
        if allowed is not None:
            dead_row = row_lse == -jnp.inf
            q, g, row_lse = (jnp.where(dead_row, 0, x) for x in (q, g, row_lse))
        qk = call.product("rh,sh->rs", q, k)
        logits = call.logits(qk, bias, allowed)
        if not has_whole_rows:
            return jnp.exp(logits - row_lse - row_low), qk, q, k, g, allowed
        # Free of the rounding of lse. A GPU's exp rounds otherwise in one fusion than in another,
        # but 0 to 1 in all: the weight of an only key is 1 whatever computes it and the total.
        top = logits.max(axis=-1, keepdims=True)
        p = jnp.exp(logits - jnp.where(top == -jnp.inf, 0, top))
        total = p.sum(axis=-1, keepdims=True)
        return p / jnp.where(total == 0, 1, total), qk, q, k, g, allowed

    def step(
        block: Block, edge: bool, dq: jax.Array, dk: jax.Array, dv: jax.Array, *grads: jax.Array
    ) -> tuple[jax.Array, ...]:
        p, qk, q, k, g, allowed = weights(block, edge)
        v = call.live_keys(call.read_heads(ops.v, call.k_axes, block, call.div["v"]), allowed)
        dp = call.product("rh,sh->rs", g, v)
        row_products = call.read(products, "bnt", block)[..., None]
        if has_whole_rows:
            # Free of the rounding of out.
            row_products = (p * dp).sum(axis=-1, keepdims=True)
        ds = p * (dp - row_products + call.read(dlse, "bnt", block)[..., None])
        dq = dq + call.product("rs,sh->rh", ds, k)
        dk = dk + call.product("rh,rs->hs", q, ds)
        dv = dv + call.product("rh,rs->hs", g, p)
        row_sums: tuple[jax.Array, ...] = ()
        if is_centred:
            ds_sum, mean_qk, *tail = grads
            grads = tuple(tail)
            row_sums = ds_sum + _row_sums(ds), mean_qk + _row_sums(p * qk)
        new = []
        for name, old in zip(tensor_grads, grads, strict=True):
            x = call.folded(ds, old.shape[0])
            x = x.sum(axis=1, keepdims=True) if old.shape[1] == 1 else x
            if name == "bias":
                x = x.sum(axis=[a for a in (2, 3) if old.shape[a] == 1], keepdims=True)
            else:
                x = _to_diagonals(x)
            new.append((old + x).astype(old.dtype))
        return dq, dk, dv, *row_sums, *new

    def zeros(*shape: int) -> jax.Array:
        return jnp.zeros(shape, call.dtype)

    accumulators: tuple[tuple[str, jax.Array], ...] = (
        ("bnth", zeros(call.batch, call.n, call.t, call.h)),
        ("bkhs", zeros(call.batch, call.k_heads, call.h, call.s)),
        ("bkhs", zeros(call.batch, call.k_heads, call.h, call.s)),
    )
    if is_centred:
        accumulators += (("bnt", jnp.zeros_like(lse)), ("bnt", jnp.zeros_like(lse)))
    for name in tensor_grads:
        shape = (batch_of[name], *getattr(ops, name).shape[1:])
        dtype = call.dtype
        if shape[2:] == (call.t, call.s) and call.batch in (call.chunk, shape[0]):
            # Each entry receives one term, already summed over the batch and heads that share it:
            # a [., ., T, S] gradient needs no wider copy.
            dtype = getattr(ops, name).dtype
        accumulators += (("bnts" if name == "bias" else "bnd", jnp.zeros(shape, dtype)),)
    dq, dk, dv, *grads = call.scan(step, accumulators)
    dk, dv = dk.swapaxes(2, 3), dv.swapaxes(2, 3)

    # The products were taken with scale * q^ on one side and k^ on the other.
    unit_q, q_vjp = _unit_rows(call, ops.q, "q", dq)
    _, k_vjp = _unit_rows(call, ops.k, "k", dk)
    results = [
        _layout(q_vjp(call.scale[..., None, None] * dq).astype(ops.q.dtype), config),
        _layout(k_vjp(dk).astype(ops.k.dtype), config),
        _layout(dv.astype(ops.v.dtype), config),
    ]
    if "scale" in batch_of:
        # Each row of ds adds up to its dlse, but for the rounding of out. That moves the row's sum
        # of ds * cosine by as much times its mean cosine, which is taken off again. Where scale is
        # 0 the products do not tell the mean: nothing is taken off. Nor of a part of the keys,
        # whose sum nobody knows.
        rows = jnp.sum(unit_q * dq, axis=3)
        if is_centred:
            ds_sum, mean_qk, *grads = grads
            scale = call.scale[..., None]
            rows -= (ds_sum - dlse) * (mean_qk / jnp.where(scale == 0, 1, scale))
        dscale = call.folded(_sum_in_pairs(rows), batch_of["scale"])
        results.append(dscale.astype(ops.scale.dtype))
    sizes = dict(zip(wanted, grad_batch, strict=True))
    for name, x in zip(tensor_grads, grads, strict=True):
        if name == "relative_bias" and call.has_lengths:
            x = call.folded(call.rolled(x, 1), sizes[name])
        results.append(x.astype(getattr(ops, name).dtype))
    return tuple(results)


def _bound(ops: Operands, config: Config) -> float:
    """Bound of |logits|: known for rows normalised here, scaled within bounds and without bias."""
    is_known = config.l2norm_qk and ops.bias is None and ops.relative_bias is None
    return config.bound if is_known and config.bound is not None else math.inf


def _unit_rows(
    call: _Call, x: jax.Array, field: str, gradient: jax.Array
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """(x as it was multiplied, [B, heads, rows, H]; map from its gradient to that of raw x).

    Rows without gradient, dead ones among them, are replaced by zeros: they may hold NaN.
    """
    x = _layout(call.expanded(x, field), call.config).astype(call.dtype)
    x = jnp.where(jnp.all(gradient == 0, axis=-1, keepdims=True), 0, x)
    if not call.config.l2norm_qk:
        return x, lambda g: g
    unit, vjp = jax.vjp(lambda x: normalize(x, call.config.groups), x)
    return unit, lambda g: vjp(g)[0]


def _row_sums(x: jax.Array) -> jax.Array:
    """Sums over the last axis, as a product: a CPU takes 10 times longer (measured) for a sum that
    XLA fuses with what is summed."""
    ones = jnp.ones(x.shape[-1:], x.dtype)
    return jnp.einsum("bnts,s->bnt", x, ones, precision=lax.Precision.HIGHEST)


def _sum_in_pairs(x: jax.Array) -> jax.Array:
    """Sum over the last axis, by halves: one after the other, float32 terms that nearly cancel lose
    a digit."""
    size = 1 << (x.shape[-1] - 1).bit_length()
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])
    while size > 1:
        size //= 2
        x = x[..., :size] + x[..., size:]
    return x[..., 0]


def _layout(x: jax.Array, config: Config) -> jax.Array:
    """[B, heads, rows, ..] to the layout of the call, and back."""
    return x.swapaxes(1, 2) if config.layout == "BTNH" else x


def _block_size(length: int, most: int) -> int:
    """Equal blocks of at most `most` or so, of a multiple of 16 rows where there are several."""
    count = math.ceil(length / most)
    return min(length, 16 * math.ceil(length / count / 16))


def _starts(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(start of each block, moved back so that the last ends at `length`; its first new row)."""
    new = np.arange(0, length, size)
    return np.minimum(new, length - size), new


def _from_diagonals(x: jax.Array, rows: int, cols: int) -> jax.Array:
    """[.., rows + cols - 1] to [.., rows, cols] with entry (i, j) = x[i - j + cols - 1].

    Repeating x and cutting the repetition into rows one longer than x moves each row by one entry:
    a gather without indices.
    """
    length = rows + cols - 1
    lead = x.shape[:-1]
    flat = jnp.broadcast_to(x[..., None, :], (*lead, rows + 2, length)).reshape(*lead, -1)
    moved = flat[..., : rows * (length + 1)].reshape(*lead, rows, length + 1)
    return moved[..., :cols][..., ::-1]


def _to_diagonals(x: jax.Array) -> jax.Array:
    """Transpose of `_from_diagonals`: [.., rows, cols] to [.., rows + cols - 1], summed."""
    *lead, rows, cols = x.shape
    padded = jnp.pad(x[..., ::-1], [(0, 0)] * (len(lead) + 1) + [(0, rows)])
    flat = padded.reshape(*lead, -1)[..., : rows * (rows + cols - 1)]
    return flat.reshape(*lead, rows, rows + cols - 1).sum(axis=-2)
