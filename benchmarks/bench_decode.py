"""Times one query against a cache of keys that are already normalised, beside jax.nn's attention.

bfloat16, T 1, N 32, K 8, H 128. A call is bound by reading the cache, so a row gives the rate at
which its keys and values were read, and a copy in the same run says what the device can do: bytes
read and written over time. Device spans on a GPU. Before each call something else is read: a model
has read its weights since this layer's last token, and no implementation finds more of the keys and
values in the GPU's L2 cache than another.
"""

import argparse
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from bench_attention import (
    OURS,
    SCALE,
    Case,
    available_peers,
    family,
    normalise,
    peer,
    prepare,
    problem_of,
    write_results,
)
from shapes import Shape
from timing import launch_as_graphs, measure

import jax_cosine_attn

NUM_HEADS, NUM_HEADS_KV, HEAD_DIM = 32, 8, 128
COPY = "copy"
# Asked for: of the copy's rate, with as many keys in all; and to be the fastest everywhere.
OF_COPY, FROM_KEYS = 0.85, 65_536


def cache(shape: Shape) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q [B, 1, N, H], k and v [B, S, K, H]; q and k of unit norm."""
    b, s, n, k, h = shape
    keys = jax.random.split(jax.random.key(0), 3)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def rows(key: jax.Array, size: tuple[int, ...], unit: bool) -> jax.Array:
        x = jax.random.normal(key, size, jnp.bfloat16)
        return normalise(x) if unit else x

    return (
        rows(keys[0], (b, 1, n, h), True),
        rows(keys[1], (b, s, k, h), True),
        rows(keys[2], (b, s, k, h), False),
    )


def run(shape: Shape, peers: Sequence[str], num_times: int, copied: jax.Array) -> dict[str, Any]:
    """One row: per implementation its time, the rate of its reads and the kernels it ran."""
    cache_bytes = 2 * 2 * math.prod((shape.batch, shape.seq_len, NUM_HEADS_KV, HEAD_DIM))
    row: dict[str, Any] = {"batch": shape.batch, "seq_len": shape.seq_len, "bytes": cache_bytes}
    ours = functools.partial(jax_cosine_attn.cosine_attention, scale=SCALE, l2norm_qk=False)
    case = Case(shape, "bfloat16", is_causal=False, mask=None)
    try:
        inputs = cache(shape)
    except Exception as error:
        return row | {"problems": {"inputs": problem_of("inputs", error)}}
    calls: dict[str, Callable[[], Any]] = {
        COPY: functools.partial(jax.jit(lambda x: -x), copied),
    }
    problems = {}
    for name in (OURS, *peers):
        try:
            attend = ours if name == OURS else peer(name, case, "kernel")
            # The backward's cotangent is not used forward.
            calls[name] = prepare(attend, "fwd", (*inputs, inputs[0]))
        except Exception as error:
            problems[name] = problem_of(name, error)
    jax.block_until_ready(calls[COPY]())
    read = functools.partial(jax.jit(jnp.max), copied)
    jax.block_until_ready(read())
    timings = measure(calls, num_times, before=read)
    implementations: dict[str, dict[str, Any]] = {}
    for name, timing in timings.items():
        moved = 2 * copied.nbytes if name == COPY else cache_bytes
        implementations[name] = {
            "ms": timing.ms,
            "gb_per_s": 1e-6 * moved / timing.ms,
            "clock": timing.clock,
            "kernels": timing.kernels,
        }
    copy_rate = implementations[COPY]["gb_per_s"]
    for result in implementations.values():
        result["of_copy"] = result["gb_per_s"] / copy_rate
    if OURS in timings:
        kernels = timings[OURS].kernels
        row["family"] = family(OURS, ours, inputs, kernels)
        if jax.default_backend() == "gpu":
            assert any("cosine_attn_decode" in kernel for kernel in kernels), (row, kernels)
        mine = implementations[OURS]
        slower = (
            name
            for name, result in implementations.items()
            if name not in (COPY, OURS) and result["ms"] <= mine["ms"]
        )
        row["missed"] = [f"faster than {name}" for name in slower]
        if shape.batch * shape.seq_len >= FROM_KEYS and mine["of_copy"] < OF_COPY:
            row["missed"].append(f"{OF_COPY} of the copy")
    return row | {"implementations": implementations, "problems": problems}


def print_row(row: dict[str, Any]) -> None:
    where = f"{row['batch']:>4}{row['seq_len']:>8} "
    for name, result in row.get("implementations", {}).items():
        ran = row["family"] if name == OURS else name
        print(
            f"{where}{name:<17}{ran:<12}{result['ms']:>10.4f}{result['gb_per_s']:>9.0f}"
            f"{result['of_copy']:>9.2f}  {result['clock']}"
        )
    for name, problem in row["problems"].items():
        print(f"{where}{name:<17}{problem}")
    if row.get("missed"):
        print(f"{where}missed: {', '.join(row['missed'])}")
    print(end="", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    launch_as_graphs()
    on_gpu = jax.default_backend() == "gpu"
    parser.add_argument(
        "--batches", type=int, nargs="+", default=(1, 8, 64) if on_gpu else (1,), metavar="B"
    )
    parser.add_argument(
        "--seq-lens",
        type=int,
        nargs="+",
        default=(4096, 32_768, 131_072) if on_gpu else (4096,),
        metavar="S",
    )
    parser.add_argument("--peers", nargs="*", default=None, help="default: those of jax.nn here")
    parser.add_argument("--copy-mib", type=int, default=1024 if on_gpu else 16)
    parser.add_argument("--num-times", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--commit", default=None, help="recorded in the JSON; default: git's")
    arguments = parser.parse_args(argv)
    peers = arguments.peers
    if peers is None:
        peers = [name for name in available_peers() if name in ("xla", "cudnn")]
    copied = jnp.ones(arguments.copy_mib * 2**19, jnp.bfloat16)
    rows = []
    of_all = {"num_heads": NUM_HEADS, "num_heads_kv": NUM_HEADS_KV, "head_dim": HEAD_DIM}
    print(f"{'B':>4}{'S':>8} {'':<17}{'kernels':<12}{'ms':>10}{'GB/s':>9}{'/copy':>9}  clock")
    for batch, seq_len in itertools.product(arguments.batches, arguments.seq_lens):
        shape = Shape(batch, seq_len, NUM_HEADS, NUM_HEADS_KV, HEAD_DIM)
        rows.append(run(shape, peers, arguments.num_times, copied))
        print_row(rows[-1])
        write_results(arguments.json, arguments.commit, of_all | {"rows": rows})


if __name__ == "__main__":
    main()
