"""The CUDA kernels as traceable JAX functions.

Loads the extension, registers its FFI targets and says what it cannot do. Importing this module
never fails: whatever keeps the kernels away is kept as the text of `build_problem`.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np

from jax_cosine_attn._config import Config, Operands, shapes

_MAX_HEAD_DIM = 256
_LEAST_COMPUTE_CAPABILITY = (8, 0)  # mma.sync of bfloat16 and tf32, cp.async
_LONGEST_QUERY_BLOCK = 128  # per-row numbers are padded to a multiple of every block
_DQ_TILE_ROWS = 16  # of the dq accumulator: DqTiles in cuda/kernels/params.h
_ROW_STATS = 3  # RowStat there
# A side of a window that rules nothing out, and the cells that masks and segments are condensed
# into: kUnlimited, kCellRows and kCellCols there.
_UNLIMITED = 1 << 30
_CELL_ROWS, _CELL_COLS = 64, 32
# Sums in a fixed order: the least rows of a partial sum of dscale, and the rows and keys of a block
# of the gradient of a bias; kLeastRowsPerBlock and kBiasBlock there.
_DSCALE_ROWS, _BIAS_BLOCK = 8, 64
_CTAS = 264  # fill a GPU: two on each of the 132 SMs of an H100
# The decode kernel: what it takes (kMaxPackedRows in cuda/), the least keys of a split and those
# that splits are whole numbers of (kMinSplitKeys and kShareKeys there).
_DECODE_QUERIES, _PACKED_ROWS = 16, 64
_SHORTEST_SPLIT, _SHARE_KEYS = 128, 64
# Counters of the forward's persistent kernel: kCounters and kCountedKeys in cuda/kernels/params.h.
_COUNTERS, _COUNTED_KEYS = 2, 64
_NEXT_TILE = jax.ShapeDtypeStruct((1,), jnp.int32)  # scratch: that of the backward's
# Operands with a gradient beside q, k and v, in the handler's order.
_OPTIONS = ("scale", "bias", "relative_bias")


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    """The extension with its targets registered, or None and the reason."""
    try:
        extension = importlib.import_module("jax_cosine_attn._cuda")
        built_against = extension.build_info()["jaxlib"]
        # A runtime older than the headers refuses the whole CUDA backend at the first JAX call,
        # where it can no longer be caught.
        if _release(jaxlib.version.__version__) < _release(built_against):
            return None, (
                f"the CUDA kernels were built against jaxlib {built_against} and cannot run on the "
                f"older jaxlib {jaxlib.version.__version__}; upgrade jax or rebuild"
            )
        for name, capsule in extension.registrations().items():
            jax.ffi.register_ffi_target(name, capsule, platform="CUDA")
    except Exception as error:
        return None, f"the CUDA kernels are not available: {type(error).__name__}: {error}"
    return extension, None


def build_problem() -> str | None:
    """Why the kernels are unavailable in this installation, or None."""
    return _load()[1]


@functools.cache
def _device_problem() -> str | None:
    """Why the kernels cannot run on this process's GPUs; None without one: lowering needs none."""
    if jax.default_backend() != "gpu":
        return None
    lowest = min((d.compute_capability for d in jax.local_devices()), key=_release)
    if _release(lowest) >= _LEAST_COMPUTE_CAPABILITY:
        return None
    least = ".".join(map(str, _LEAST_COMPUTE_CAPABILITY))
    return f"the CUDA kernels need compute capability {least}, the GPU has {lowest}"


def has_cuda_kernels() -> bool:
    """Whether this installation has CUDA kernels. A GPU is not asked for."""
    return build_problem() is None


def show_config() -> dict[str, dict[str, Any]]:
    """Prints, and returns, what the kernels were built for and what they would run on."""
    extension, problem = _load()
    config: dict[str, dict[str, Any]] = {
        "build": {"cuda_kernels": problem or "available"},
        "runtime": {
            "jax": jax.__version__,
            "jaxlib": jaxlib.version.__version__,
            "devices": [str(device.device_kind) for device in jax.devices()],
        },
    }
    if extension is not None:
        config["build"] |= extension.build_info()
    for section, entries in config.items():
        print(f"{section}:")
        for name, value in entries.items():
            print(f"  {name}: {value}")
    return config


def why_not_cuda(ops: Operands, config: Config) -> str | None:
    """Why the kernels cannot do this call, or None; reads shapes and dtypes only."""
    head_dim = shapes(ops, config)[-1]
    problem = build_problem() or _device_problem()
    if problem is not None:
        return problem
    if ops.q.dtype == jnp.float64:
        return "the CUDA kernels do not support float64"
    if head_dim > _MAX_HEAD_DIM:
        return f"the CUDA kernels support head dims up to {_MAX_HEAD_DIM}, got H={head_dim}"
    return None


def _has_bias(ops: Operands) -> bool:
    return ops.bias is not None or ops.relative_bias is not None


def _constant_shift(ops: Operands, bound: float | None) -> float | None:
    """c of exp(logit - c) that loses no row and overflows nowhere; None: the kernels need a running
    maximum, because logits have a bias or |scale| * groups <= bound is too weak.

    float16 weights: exp(-11) is the last to keep some digits, exp(11.09) the largest. Others:
    exp(-2 * 63 + 40) is still a normal number of float32.
    """
    largest = 11.0 if ops.q.dtype == jnp.float16 else 63.0
    if bound is None or bound > largest or _has_bias(ops):
        return None
    return max(0.0, bound - 40.0)


def _unit_row_dtype(ops: Operands, bound: float | None) -> Any:
    """dtype of q^ and k^ in the forward. Unit vectors need no range: for bfloat16 inputs float16
    keeps three bits more of them, while logits are small enough not to show that the backward has
    rounded them to bfloat16."""
    dtype = ops.q.dtype
    small = bound is not None and bound <= 16.0 and not _has_bias(ops)
    return np.dtype(jnp.float16) if dtype == jnp.bfloat16 and small else dtype


def _decode_splits(ops: Operands, config: Config) -> int:
    """CTAs that share out the keys of one kv head in the decode kernel; 0: the normal forward runs.

    The decode kernel is for few queries, and reads keys and values once and as they are. It takes
    what needs no pass over the keys before: 16-bit rows that its copies can read (H a multiple of
    8), bounded logits without biases, and one norm a key or none.
    """
    t, n, s, k, h = shapes(ops, config)
    if (
        ops.q.dtype.itemsize != 2
        or h % 8 != 0
        or _constant_shift(ops, config.bound) is None
        or (config.l2norm_qk and config.groups != 1)
        or t > _DECODE_QUERIES
        or n // k * t > _PACKED_ROWS
        or s < _SHORTEST_SPLIT
    ):
        return 0

    may_differ = (ops.kv_lengths, ops.mask, ops.q_segments) != (None,) * 3  # entries in their keys

    def cost(splits: int) -> float:
        # In the time that one of _CTAS takes to read a key. To start and to leave a result takes as
        # long as 96 keys (fitted to B 1-64, S 4k-128k on an H100).
        keys = _padded(-(-s // splits), _SHARE_KEYS)
        waves = config.batch * k * -(-s // keys) / _CTAS
        if may_differ:
            # CTAs do not end together: at the end some run on alone, by half of their time.
            return waves * (keys + 96) + keys / 2
        return math.ceil(waves) * (keys + 96)

    return min(range(1, -(-s // _SHORTEST_SPLIT) + 1), key=cost)


def _call(
    target: str,
    results: Sequence[jax.ShapeDtypeStruct],
    ops: Operands,
    extra: Sequence[jax.Array],
    config: Config,
    **attributes: Any,
) -> Sequence[jax.Array]:
    if ops.relative_bias is not None:
        ops = ops._replace(relative_bias=ops.relative_bias.astype(jnp.float32))
    if ops.bias is not None and ops.bias.dtype == jnp.float64:
        ops = ops._replace(bias=ops.bias.astype(jnp.float32))
    window = config.window or (None, None)
    left, right = (_UNLIMITED if side is None else min(side, _UNLIMITED) for side in window)
    if config.is_causal:
        right = 0
    # The handlers take every operand of the call, absent ones empty.
    operands = [jnp.zeros((0,), jnp.int32) if x is None else x for x in ops]
    return jax.ffi.ffi_call(target, results)(
        *operands,
        *extra,
        heads_first=config.layout == "BNTH",
        l2norm_qk=config.l2norm_qk,
        groups=np.int32(config.groups),
        left=np.int32(left),
        right=np.int32(right),
        three_passes=_three_passes(config),
        div=np.array(config.div, np.int64),
        **attributes,
    )


def _three_passes(config: Config) -> bool:
    """float32 products in three TF32 passes; attribute of every call, meaningful for float32. On a
    GPU jax.lax.Precision.HIGH is TF32 too."""
    return config.precision == "highest"


def _padded(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def _pre_pass(
    ops: Operands, config: Config, dtype: Any, decode: bool = False, backward: bool = False
) -> list[jax.ShapeDtypeStruct]:
    """Scratch of the pre-passes: q^ and k^ unless for decode, v in rows of a multiple of 8 where H
    is not one, the cells, bits and keys of mask, and the cells of segments. 16-bit kernels may copy
    the listed keys of each entry and their values. In the backward q^ stands in the place of dq,
    and k^ in that of dk, until those are known; not where the rows differ."""
    t, n, s, k, h = shapes(ops, config)
    row = _padded(h, 8)
    cells: tuple[int, ...] = (0,)
    bits: tuple[int, ...] = (0,)
    keys: tuple[int, ...] = (0,)
    if ops.mask is not None:
        batch, heads, rows, cols = ops.mask.shape
        words = -(-cols // _CELL_COLS)
        bits = (batch, heads, words, rows)
        # A mask over keys alone becomes a list of keys, as if there were no others. Biases and
        # segments are not looked up through it.
        if (heads, rows) == (1, 1) and cols == s and not _has_bias(ops) and ops.q_segments is None:
            keys = (batch, words + 1 + cols)
        cells = (batch, heads, -(-rows // _CELL_ROWS), words)
    ranges = [
        (0,) if ids is None else (ids.shape[0], -(-ids.shape[1] // size), 2)
        for ids, size in ((ops.q_segments, _CELL_ROWS), (ops.kv_segments, _CELL_COLS))
    ]
    listed = keys != (0,) and not decode and dtype.itemsize == 2
    # One list serves all entries, and copies need no more of them than there are.
    of_call = listed and ops.mask is not None and ops.mask.shape[0] > 1
    k_batch, v_batch = (config.batch if of_call else x.shape[0] for x in (ops.k, ops.v))
    copies_v = listed or row != h
    no_q = decode or (backward and row == h)
    no_k = decode or (backward and row == h and k_batch == config.batch and keys == (0,))
    return [
        jax.ShapeDtypeStruct((config.batch, n, 0 if no_q else t, row), dtype),
        jax.ShapeDtypeStruct((k_batch, k, 0 if no_k else s, row), dtype),
        jax.ShapeDtypeStruct((v_batch, k, s if copies_v else 0, row), ops.v.dtype),
        jax.ShapeDtypeStruct(cells, jnp.uint8),
        jax.ShapeDtypeStruct(bits, jnp.uint32),
        jax.ShapeDtypeStruct(keys, jnp.int32),
        *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ranges),
    ]


def cuda_fwd(ops: Operands, config: Config) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(out, lse, lse_low) from the kernels, the latter two float32 [B, N, T]."""
    t, n, _, _, h = shapes(ops, config)
    dtype = ops.q.dtype
    shift = _constant_shift(ops, config.bound)
    splits = _decode_splits(ops, config)
    hat = _unit_row_dtype(ops, config.bound)
    partials: tuple[int, ...] = (0,)
    if splits > 1:
        partials = (config.batch, n, t, splits, h + 4)  # out's sums, and l
    pre_pass = _pre_pass(ops, config, hat, decode=splits > 0)
    k_entries, k, keys, _ = pre_pass[1].shape
    counted = k_entries * k * -(-keys // _COUNTED_KEYS)
    rows = jax.ShapeDtypeStruct((config.batch, n, t), jnp.float32)
    results = [
        jax.ShapeDtypeStruct((config.batch, *ops.q.shape[1:]), dtype),
        rows,
        rows,
        *pre_pass,
        jax.ShapeDtypeStruct((_COUNTERS + counted,), jnp.int32),
        jax.ShapeDtypeStruct(partials, jnp.float32),
    ]
    out, lse, lse_low, *_ = _call(
        "jax_cosine_attn_fwd",
        results,
        ops,
        (),
        config,
        unbounded=shift is None,
        shift=np.float32(shift or 0),
        splits=np.int32(splits),
    )
    return out, lse, lse_low


def _dbias_slices(shape: tuple[int, ...], t: int, s: int, n: int, batch: int) -> int:
    """CTAs that share out the sum of a block of dbias, [., 1|N, 1|T, 1|S], in the deterministic
    backward: so many that a small gradient fills a GPU too, but none without a block of pairs."""
    lead, heads, rows, cols = shape
    row_blocks, col_blocks = -(-t // _BIAS_BLOCK), -(-s // _BIAS_BLOCK)
    blocks = lead * heads * -(-rows // _BIAS_BLOCK) * -(-cols // _BIAS_BLOCK)
    pairs = batch * n * row_blocks * col_blocks
    return max(1, min(_CTAS // blocks, pairs // blocks))


def cuda_bwd(
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
    """(dq, dk, dv, and the gradient of each operand in wanted) from the kernels."""
    t, n, s, k, h = shapes(ops, config)
    batch, dtype, row = config.batch, ops.q.dtype, _padded(h, 8)
    padded_t = _padded(t, _LONGEST_QUERY_BLOCK)
    # Three passes accumulate in float64: two float32 each, which needs no jax_enable_x64.
    accum = 2 * row if dtype == jnp.float32 and _three_passes(config) else row
    leads = dict(zip(wanted, grad_batch, strict=True))
    shape_of = {name: (leads[name], *getattr(ops, name).shape[1:]) for name in wanted}
    options = [jax.ShapeDtypeStruct(shape_of.get(name, (0,)), jnp.float32) for name in _OPTIONS]
    partials: dict[str, tuple[int, ...]] = {}
    if "scale" in wanted:
        partials["scale"] = (batch, n, -(-t // _DSCALE_ROWS))
    # Sums of thousands of parts in any order are taken in float64, two float32 each.
    if "bias" in wanted:
        shape = shape_of["bias"]
        if config.deterministic:
            slices = _dbias_slices(shape, t, s, n, batch)
            partials["bias"] = (slices, *shape) if slices > 1 else (0,)
        elif 1 in shape[2:]:
            partials["bias"] = (2 * math.prod(shape),)
    if "relative_bias" in wanted:
        diagonals = -(-t // _BIAS_BLOCK) + -(-s // _BIAS_BLOCK) - 1  # of blocks
        shape = batch, n, diagonals, 2 * _BIAS_BLOCK
        if not config.deterministic:
            shape = (2 * math.prod(shape_of["relative_bias"]),)
        partials["relative_bias"] = shape
    pre_pass = _pre_pass(ops, config, dtype, backward=True)
    results = [
        jax.ShapeDtypeStruct((batch, *ops.q.shape[1:]), dtype),
        jax.ShapeDtypeStruct((batch, *ops.k.shape[1:]), dtype),
        jax.ShapeDtypeStruct((batch, *ops.v.shape[1:]), dtype),
        *options,
        *pre_pass,
        _NEXT_TILE,
        jax.ShapeDtypeStruct((batch, n, 0 if row == h else t, row), dtype),  # dout, padded
        jax.ShapeDtypeStruct((batch, n, t, config.groups), jnp.float32),  # inverse norms of q
        jax.ShapeDtypeStruct((*pre_pass[1].shape[:2], s, config.groups), jnp.float32),  # and of k
        jax.ShapeDtypeStruct((batch, n, _ROW_STATS, padded_t), jnp.float32),
        jax.ShapeDtypeStruct(
            (batch, n, t if "scale" in wanted and not config.partial else 0, 2), jnp.float32
        ),  # sums over keys
        jax.ShapeDtypeStruct(
            (batch, n, _padded(t, _DQ_TILE_ROWS), accum), jnp.float32
        ),  # dq accumulator
        *(jax.ShapeDtypeStruct(partials.get(name, (0,)), jnp.float32) for name in _OPTIONS),
    ]
    extra = (out, lse, lse_low, dout, jnp.zeros((0,), jnp.float32) if dlse is None else dlse)
    gradients = _call(
        "jax_cosine_attn_bwd",
        results,
        ops,
        extra,
        config,
        unbounded=config.deterministic or _constant_shift(ops, config.bound) is None,
        deterministic=config.deterministic,
    )
    named = dict(zip(("q", "k", "v", *_OPTIONS), gradients, strict=False))
    return tuple(named[name].astype(getattr(ops, name).dtype) for name in ("q", "k", "v", *wanted))
