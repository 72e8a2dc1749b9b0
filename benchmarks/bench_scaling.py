"""Times attention over 1, 2, 4, ... devices: what a device does less, and what it moves instead.

  dp      batch over devices, one sequence each: nothing is moved
  tp      heads over devices: nothing is moved
  ring    one causal sequence over devices: keys and values travel, and their gradients backward
  decode  one query against keys over devices: an all-reduce of what it found

bfloat16, N 32, K 8, H 128. Forward and backward together, decode forward alone. Efficiency is
the time on the first number of devices over that on n, but for dp times the devices. Bytes are
those that each device sends; collectives are counted in the compiled program, where the hops of a
ring stand in a loop.
"""

import argparse
import collections
import functools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from bench_attention import SCALE, write_results
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from shapes import Shape
from timing import measure

from jax_cosine_attn import cosine_attention
from jax_cosine_attn.parallel import kv_sharded_cosine_attention, ring_cosine_attention

AXIS = "devices"
_COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


class Case(NamedTuple):
    name: str
    attend: Callable[..., jax.Array]
    query_length: int
    shape: Shape
    query: P
    keys: P
    backward: bool
    grows: bool  # with the number of devices


def cases(devices: int, lengths: dict[str, Sequence[int]], shape: Shape, mesh: Any) -> list[Case]:
    """What is timed; lengths by name."""
    over = {"axis_name": AXIS, "mesh": mesh, "scale": SCALE}
    causal = functools.partial(cosine_attention, scale=SCALE, is_causal=True)
    ring = functools.partial(ring_cosine_attention, is_causal=True, **over)
    decode = functools.partial(kv_sharded_cosine_attention, l2norm_qk=False, **over)
    found = []
    for name, attend, query, keys in (
        ("dp", causal, P(AXIS), P(AXIS)),
        ("tp", causal, P(None, None, AXIS), P(None, None, AXIS)),
        ("ring", ring, P(None, AXIS), P(None, AXIS)),
        ("decode", decode, P(), P(None, AXIS)),
    ):
        for length in lengths[name]:
            batch = devices if name == "dp" else 1
            rows = 1 if name == "decode" else length
            sized = shape._replace(batch=batch, seq_len=length)
            backward, grows = name != "decode", name == "dp"
            found.append(Case(name, attend, rows, sized, query, keys, backward, grows))
    return found


def bytes_sent(case: Case, devices: int) -> int:
    """By each device."""
    b, s, n, k, h = case.shape
    if case.name == "ring":
        entries = 2 * b * s // devices * k * h  # of keys and values
        if devices == 1:
            return 0
        # bfloat16 keys in both passes, which share the first hop, and float32 gradients to their
        # home.
        return (2 * devices - 3) * entries * 2 + devices * entries * 4
    if case.name == "decode":  # an all-reduce in two rounds
        return 2 * (devices - 1) * b * case.query_length * n * (h + 1) * 4 // devices
    return 0


def prepare(case: Case, mesh: Any) -> tuple[Callable[[], Any], dict[str, int]]:
    """(a warm call, collectives in its program)."""
    b, s, n, k, h = case.shape

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def rows(seed: jax.Array, size: tuple[int, ...], spec: P) -> jax.Array:
        x = jax.random.normal(seed, size, jnp.bfloat16)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    seeds = jax.random.split(jax.random.key(0), 3)
    q = rows(seeds[0], (b, case.query_length, n, h), case.query)
    keys, values = (rows(seed, (b, s, k, h), case.keys) for seed in seeds[1:])
    if not case.backward:  # a cache holds unit rows
        q, keys = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, keys))
        f = case.attend
    else:
        f = jax.grad(
            lambda q, k, v: case.attend(q, k, v).astype(jnp.float32).sum(), argnums=(0, 1, 2)
        )
    compiled = jax.jit(f).lower(q, keys, values).compile()
    call = functools.partial(compiled, q, keys, values)
    jax.block_until_ready(call())
    found = re.findall(rf"= .*? ({_COLLECTIVES})(?:-start)?\(", compiled.as_text() or "")
    return call, dict(collections.Counter(found))


def main(argv: Sequence[str] | None = None) -> None:
    on_gpu = jax.default_backend() == "gpu"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = functools.partial(parser.add_argument, type=int, metavar="T")
    add("--dp-length", default=16_384 if on_gpu else 256)
    add("--tp-length", default=16_384 if on_gpu else 256)
    add("--ring-lengths", nargs="+", default=(65_536, 262_144) if on_gpu else (512,))
    add("--decode-lengths", nargs="+", default=(262_144, 1_048_576) if on_gpu else (2048,))
    parser.add_argument("--heads", type=int, nargs=3, default=(32, 8, 128), metavar=("N", "K", "H"))
    parser.add_argument("--devices", type=int, nargs="+", help="default: 1, 2, 4, ... of all")
    parser.add_argument("--num-times", type=int, default=10)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--commit", default=None, help="recorded in the JSON; default: git's")
    options = parser.parse_args(argv)
    lengths = {
        "dp": [options.dp_length],
        "tp": [options.tp_length],
        "ring": options.ring_lengths,
        "decode": options.decode_lengths,
    }
    shape = Shape(1, 0, *options.heads)
    most = int(math.log2(len(jax.devices())))
    counts = options.devices or [2**i for i in range(most + 1)]
    rows: list[dict[str, Any]] = []
    heads = dict(zip(("num_heads", "num_heads_kv", "head_dim"), options.heads, strict=True))
    alone: dict[tuple[str, int], float] = {}  # ms, times devices unless the work grows with them
    print(f"{'':<8}{'S':>9}{'devices':>9}{'ms':>11}{'efficiency':>12}{'MB sent':>10}  collectives")
    for devices in counts:
        mesh = jax.make_mesh(
            (devices,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
        )
        for case in cases(devices, lengths, shape, mesh):
            if case.name == "tp" and shape.num_heads_kv % devices:
                continue
            call, collectives = prepare(case, mesh)
            timing = measure({case.name: call}, options.num_times)[case.name]
            cost = timing.ms * (1 if case.grows else devices)
            first = alone.setdefault((case.name, case.shape.seq_len), cost)
            row = {
                "case": case.name,
                "seq_len": case.shape.seq_len,
                "devices": devices,
                "ms": timing.ms,
                "clock": timing.clock,
                "efficiency": first / cost,
                "bytes_sent": bytes_sent(case, devices),
                "collectives": collectives,
            }
            rows.append(row)
            print(
                f"{case.name:<8}{row['seq_len']:>9}{devices:>9}{timing.ms:>11.3f}"
                f"{row['efficiency']:>12.2f}{1e-6 * row['bytes_sent']:>10.3f}"
                f"  {collectives or 'none'}",
                flush=True,
            )
            write_results(options.json, options.commit, heads | {"rows": rows})


if __name__ == "__main__":
    main()
