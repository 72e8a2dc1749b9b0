"""Times the tiles that a build for tuning has beside the shipped ones, and says which is best.

For each head dim, dtype and direction of the kernels for Hopper: 16,384 tokens, N * H = 2048, full
and causal, short and long sequences, candidates in turns within one run. The best has the least
geometric mean of its times over the shipped tile's. Results of a candidate are compared with those
of the shipped tile first: a wrong one does not take part.

    make tune    # installs a build with JAX_COSINE_ATTN_TUNE=ON, which compiles for longer
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from bench_attention import SCALE, prepare, write_results
from shapes import Shape
from timing import Timing, launch_as_graphs, measure

import jax_cosine_attn

TOKENS, WIDTH = 16_384, 2048
# dtype of q, k and v, and the scale that selects an arithmetic of the launch table.
ARITHMETIC = {
    "float16": ("float16", SCALE),
    "float16-bfloat16": ("bfloat16", SCALE),
    "bfloat16": ("bfloat16", 40.0),
}
# Up to so many keys the forward may take their norms itself, in tiles that have no candidates:
# find_raw_instance in cuda/launch/attention.cu.
RAW_KEYS = 1024
TOLERANCE = 2e-2  # of the largest result: several roundings to bfloat16


class Key(NamedTuple):
    direction: str
    arithmetic: str
    head_dim: int


class Case(NamedTuple):
    seq_len: int
    is_causal: bool


def candidates(instances: Sequence[Mapping[str, Any]], smem_bytes: int) -> dict[Key, list[dict]]:
    """Rows of the launch table of the kernels for Hopper that fit, the shipped one first; keys with
    no other are left out."""
    found: dict[Key, list[dict]] = {}
    for row in instances:
        if row["family"] == "sm90" and row["direction"] in ("fwd", "bwd") and not row["raw"]:
            key = Key(row["direction"], row["arithmetic"], row["head_dim"])
            if row["candidate"] == 0 or row["smem_bytes"] <= smem_bytes:
                found.setdefault(key, []).append(dict(row))
    ordered = {key: sorted(rows, key=lambda r: r["candidate"]) for key, rows in found.items()}
    return {key: rows for key, rows in ordered.items() if len(rows) > 1}


def cases_of(direction: str, seq_lens: Sequence[int]) -> list[Case]:
    """Full and causal, of those lengths at which calls take the tiles that are tried."""
    lengths = [t for t in seq_lens if direction == "bwd" or t > RAW_KEYS]
    return [Case(t, is_causal) for t in lengths for is_causal in (False, True)]


def described(row: Mapping[str, Any]) -> str:
    keys = f", {row['key_stages']} of keys" if row["key_stages"] else ""
    return f"{row['block_m']}x{row['block_n']}, {row['stages']} stages{keys}"


def calls_of(
    key: Key,
    case: Case,
    numbers: Sequence[int],
    select: Callable[[int], None],
    tokens: int = TOKENS,
) -> dict[str, Callable[[], Any]]:
    """A compiled and warm call for each candidate, by its number."""
    dtype, scale = ARITHMETIC[key.arithmetic]
    n = max(WIDTH // key.head_dim, 1)
    shape = Shape(max(tokens // case.seq_len, 1), case.seq_len, n, n, key.head_dim)
    size = (shape.batch, shape.seq_len, shape.num_heads, shape.head_dim)
    inputs = [
        jax.random.normal(seed, size, jnp.dtype(dtype))
        for seed in jax.random.split(jax.random.key(0), 4)
    ]

    def chosen(number: int, call: Callable[[], Any]) -> Any:
        select(number)  # at every call: graphs are recorded again where buffers move
        return call()

    calls: dict[str, Callable[[], Any]] = {}
    for number in numbers:
        select(number)
        attend = functools.partial(
            jax_cosine_attn.cosine_attention, scale=scale, is_causal=case.is_causal
        )
        # A function of its own for each, so that no graph serves two of them.
        call = prepare(lambda *x, attend=attend: attend(*x), key.direction, inputs)
        calls[str(number)] = functools.partial(chosen, number, call)
    select(0)
    return calls


def right(calls: Mapping[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """Those calls whose results are as the shipped tile's, the first's."""

    def results(call: Callable[[], Any]) -> list[np.ndarray]:
        return [np.asarray(x, np.float32) for x in jax.tree.leaves(call())]

    names = list(calls)
    wanted = results(calls[names[0]])
    return {
        name: calls[name]
        for name in names
        if all(
            np.abs(x - y).max() <= TOLERANCE * np.abs(y).max()
            for x, y in zip(results(calls[name]), wanted, strict=True)
        )
    }


def check_kernels(timings: Mapping[str, Timing]) -> None:
    """Every candidate ran a kernel that no other ran: their names hold the tile."""
    names = {
        name: tuple(kernel for kernel in timing.kernels if "cosine_attn" in kernel)
        for name, timing in timings.items()
    }
    if any(names.values()):
        assert len(set(names.values())) == len(names), names


def ranked(ms: Mapping[Case, Mapping[str, float]]) -> list[tuple[str, float]]:
    """(candidate, geometric mean of its times over the shipped tile's), the best first; those that
    have a time in every case."""
    everywhere = set.intersection(*(set(times) for times in ms.values()))
    means = {
        name: math.exp(sum(math.log(t[name] / t["0"]) for t in ms.values()) / len(ms))
        for name in everywhere
    }
    return sorted(means.items(), key=lambda item: item[1])


def tune(
    key: Key,
    rows: Sequence[Mapping[str, Any]],
    cases: Sequence[Case],
    select: Callable[[int], None],
    num_times: int,
    tokens: int = TOKENS,
) -> dict[str, Any]:
    """One entry of the results: the candidates of a key, their times, the best."""
    numbers = [row["candidate"] for row in rows]
    ms: dict[Case, dict[str, float]] = {}
    for case in cases:
        timings = measure(right(calls_of(key, case, numbers, select, tokens)), num_times)
        check_kernels(timings)
        ms[case] = {name: timing.ms for name, timing in timings.items()}
    order = ranked(ms)
    tiles = {str(row["candidate"]): described(row) for row in rows}
    return {
        **key._asdict(),
        "tiles": tiles,
        "shipped": tiles["0"],
        "best": tiles[order[0][0]],
        "over_shipped": dict(order),
        "wrong": sorted(set(tiles) - dict(order).keys()),
        "ms": [{**case._asdict(), **times} for case, times in ms.items()],
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seq-lens", type=int, nargs="+", default=(512, 2048, 8192), metavar="T")
    parser.add_argument("--head-dims", type=int, nargs="+", metavar="H", help="default: all")
    parser.add_argument("--directions", nargs="+", choices=("fwd", "bwd"), default=("fwd", "bwd"))
    parser.add_argument("--num-times", type=int, default=10)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--commit", default=None, help="recorded in the JSON; default: git's")
    arguments = parser.parse_args(argv)
    launch_as_graphs()
    if jax.default_backend() != "gpu" or jax.devices()[0].compute_capability != "9.0":
        raise SystemExit("tiles are tuned on a GPU of compute capability 9.0")
    from jax_cosine_attn import _cuda

    found = candidates(_cuda.instances(), smem_bytes=227 * 1024)
    if not found:
        raise SystemExit(
            "this build has the shipped tiles alone: install with JAX_COSINE_ATTN_TUNE=ON"
        )
    rows = []
    for key, of_key in found.items():
        cases = cases_of(key.direction, arguments.seq_lens)
        if key.direction not in arguments.directions or not cases:
            continue
        if arguments.head_dims and key.head_dim not in arguments.head_dims:
            continue
        row = tune(key, of_key, cases, _cuda.select_candidate, arguments.num_times)
        rows.append(row)
        print(f"{key.direction} {key.arithmetic} H={key.head_dim}: best {row['best']}", flush=True)
        for name, ratio in row["over_shipped"].items():
            mark = " (shipped)" if name == "0" else ""
            print(f"  {row['tiles'][name]:<24}{ratio:>7.3f}{mark}", flush=True)
        for name in row["wrong"]:
            print(f"  {row['tiles'][name]:<24}  wrong results", flush=True)
        write_results(arguments.json, arguments.commit, {"rows": rows})


if __name__ == "__main__":
    main()
