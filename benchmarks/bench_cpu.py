"""The "xla" implementation against jax.nn.dot_product_attention on a CPU, both compiled, float32.

Prints one row per case: median times of calls interleaved in one run, their ratio, and whether the
ratio reaches what the project asks for. Exits with 1 if one does not.

    python benchmarks/bench_cpu.py [--length 2048] [--heads 8] [--head-dim 64] [--json FILE]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from jax_cosine_attn import cosine_attention, l2norm_tensors

LEAST_RATIO = {False: 1.4, True: 2.0}  # by is_causal, forward and gradient alike
SCALE = 8.0


def cases(length: int, heads: int, head_dim: int) -> dict[tuple[str, bool], dict[str, Callable]]:
    """{(pass, is_causal): {implementation: compiled call without arguments}}."""
    shape = (1, length, heads, head_dim)
    q, k, v, dout = (
        jax.random.normal(key, shape, jnp.float32) for key in jax.random.split(jax.random.key(0), 4)
    )
    q, k = l2norm_tensors(q, k)

    def ours(q: jax.Array, k: jax.Array, v: jax.Array, is_causal: bool) -> jax.Array:
        return cosine_attention(
            q, k, v, scale=SCALE, l2norm_qk=False, is_causal=is_causal, implementation="xla"
        )

    def jax_nn(q: jax.Array, k: jax.Array, v: jax.Array, is_causal: bool) -> jax.Array:
        return jax.nn.dot_product_attention(
            q, k, v, scale=SCALE, is_causal=is_causal, implementation="xla"
        )

    def compiled(attention: Callable, backward: bool, is_causal: bool) -> Callable:
        def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return attention(q, k, v, is_causal)

        def gradient(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
            # With out, which every loss reads: XLA would leave out its product with v otherwise.
            out, pullback = jax.vjp(forward, q, k, v)
            return out, *pullback(dout)

        call = jax.jit(gradient if backward else forward).lower(q, k, v).compile()
        return lambda: jax.block_until_ready(call(q, k, v))

    return {
        (name, is_causal): {
            "ours": compiled(ours, backward, is_causal),
            "jax.nn": compiled(jax_nn, backward, is_causal),
        }
        for name, backward in (("forward", False), ("gradient", True))
        for is_causal in (False, True)
    }


def interleaved_medians(calls: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median seconds of each call; one call of each per round, after a warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=2048, help="T = S")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args(argv)

    rows = []
    print(f"{'':20}{'ours':>10}{'jax.nn':>10}{'ratio':>8}{'asked':>8}")
    for (name, is_causal), calls in cases(args.length, args.heads, args.head_dim).items():
        medians = interleaved_medians(calls, args.repeats)
        ratio = medians["jax.nn"] / medians["ours"]
        rows.append(
            {
                "pass": name,
                "is_causal": is_causal,
                "ours_ms": 1e3 * medians["ours"],
                "jax_nn_ms": 1e3 * medians["jax.nn"],
                "ratio": ratio,
                "least_ratio": LEAST_RATIO[is_causal],
                "met": ratio >= LEAST_RATIO[is_causal],
            }
        )
        row = rows[-1]
        print(
            f"{name + (', causal' if is_causal else ''):20}{row['ours_ms']:>7.1f} ms"
            f"{row['jax_nn_ms']:>7.1f} ms{ratio:>7.2f}x{row['least_ratio']:>7.1f}x"
            f"  {'met' if row['met'] else 'NOT MET'}"
        )
    if args.json:
        record = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "jax": jax.__version__,
            "cpus": os.cpu_count(),
            "shape": {"B": 1, "T": args.length, "S": args.length, "N": args.heads}
            | {"H": args.head_dim, "dtype": "float32"},
            "rows": rows,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
