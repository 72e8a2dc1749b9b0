"""What masks, segments, windows, biases and determinism cost, each beside the call that it is
measured against.

bfloat16, N 16, H 64, forward and backward; device spans on a GPU. A row says the time of the call,
of its yardstick, their ratio, and the ratio that was asked for where there is one.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from bench_attention import OURS, SCALE, expected_family, family, prepare, write_results
from timing import launch_as_graphs, measure

import jax_cosine_attn

NUM_HEADS, HEAD_DIM = 16, 64


class Call(NamedTuple):
    batch: int
    seq_len: int  # T = S
    options: dict[str, Any]
    learned: tuple[str, ...] = ()  # options whose gradient is taken too

    def bounded(self, direction: str) -> bool:
        """As in `expected_family`."""
        biases = {"bias", "relative_bias"} & self.options.keys()
        scale = self.options.get("scale", SCALE)
        in_order = direction == "bwd" and self.options.get("deterministic", False)
        return not biases and isinstance(scale, float) and scale <= 63 and not in_order


class Comparison(NamedTuple):
    name: str
    call: Call
    against: Call
    at_most: float | None = None  # of the ratio of their times


def comparisons(tokens: int) -> list[Comparison]:
    """`tokens` is the longest sequence but for the window's, which is twice as long."""
    rng = np.random.default_rng(0)
    batch, t = 4, tokens // 4
    plain = Call(batch, t, {})
    random_padding = rng.random((batch, 1, 1, t)) >= 0.25
    suffix = np.arange(t) < 3 * t // 4
    documents = 16
    packed = np.repeat(np.arange(documents, dtype=np.int32), tokens // documents)[None]
    distances = np.abs(np.arange(2 * t - 1) - (t - 1)).astype(np.float32)
    slopes = 2.0 ** -np.linspace(0.5, 8, NUM_HEADS, dtype=np.float32)
    bias = rng.standard_normal((NUM_HEADS, t, t)).astype(jnp.bfloat16)
    window = tokens // 16
    relative = {"relative_bias": -slopes[:, None] * distances}
    scale = {"scale": np.full(NUM_HEADS, SCALE, np.float32)}
    deterministic = {"deterministic": True}
    dense, diagonals = ("scale", "bias"), ("scale", "relative_bias")
    return [
        Comparison("random key padding", Call(batch, t, {"mask": random_padding}), plain, 1.03),
        Comparison("suffix key padding", Call(batch, t, {"mask": suffix}), plain, 0.8),
        Comparison(
            "key lengths",
            Call(batch, t, {"key_value_seq_lengths": np.full(batch, 3 * t // 4, np.int32)}),
            plain,
            0.8,
        ),
        Comparison("full mask", Call(batch, t, {"mask": rng.random((1, 1, t, t)) < 0.75}), plain),
        Comparison(
            "packed documents",
            Call(1, tokens, {"segment_ids": packed}),
            Call(documents, tokens // documents, {}),
            1.15,
        ),
        Comparison(
            "causal window",
            Call(1, 2 * tokens, {"is_causal": True, "local_window_size": (window, 0)}),
            Call(1, 2 * tokens, {"is_causal": True}),
            1 / 12,
        ),
        Comparison("running maximum", Call(batch, t, {"scale": 100.0}), plain),
        Comparison("bias of all batch entries", Call(batch, t, {"bias": bias}), plain),
        Comparison("relative bias", Call(batch, t, relative), plain),
        Comparison("deterministic", Call(batch, t, deterministic), plain),
        Comparison(
            "deterministic dscale, dbias",
            Call(batch, t, scale | {"bias": bias} | deterministic, dense),
            Call(batch, t, scale | {"bias": bias}, dense),
        ),
        Comparison(
            "deterministic drelative_bias",
            Call(batch, t, scale | relative | deterministic, diagonals),
            Call(batch, t, scale | relative, diagonals),
        ),
    ]


def compiled(call: Call, direction: str) -> tuple[Callable[[], Any], Callable[..., Any], Sequence]:
    shape = (call.batch, call.seq_len, NUM_HEADS, HEAD_DIM)
    q, k, v, dout = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key in jax.random.split(jax.random.key(0), 4)
    )
    options: dict[str, Any] = {"scale": SCALE} | {
        name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in call.options.items()
    }
    inputs = [q, k, v, *(options.pop(name) for name in call.learned), dout]

    def attention(q: Any, k: Any, v: Any, *learned: Any, **options: Any) -> jax.Array:
        options |= zip(call.learned, learned, strict=True)
        return jax_cosine_attn.cosine_attention(q, k, v, **options)

    attend = functools.partial(attention, **options)
    return prepare(attend, direction, inputs), attend, inputs


def run(comparison: Comparison, direction: str, num_times: int) -> dict[str, Any]:
    calls, families = {}, {}
    for name, call in (("call", comparison.call), ("against", comparison.against)):
        calls[name], attend, inputs = compiled(call, direction)
        families[name] = attend, inputs
    timings = measure(calls, num_times)
    ran = {name: family(OURS, *families[name], timings[name].kernels) for name in calls}
    for name, call in (("call", comparison.call), ("against", comparison.against)):
        wanted = expected_family("bfloat16", HEAD_DIM, call.bounded(direction))
        assert ran[name] == wanted, (comparison.name, name, ran[name], timings[name].kernels)
    ratio = timings["call"].ms / timings["against"].ms
    return {
        "name": comparison.name,
        "direction": direction,
        "batch": comparison.call.batch,
        "seq_len": comparison.call.seq_len,
        "family": ran["call"],
        "against_family": ran["against"],
        "ms": timings["call"].ms,
        "against_ms": timings["against"].ms,
        "ratio": ratio,
        "at_most": comparison.at_most,
        "clock": timings["call"].clock,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    launch_as_graphs()
    on_gpu = jax.default_backend() == "gpu"
    parser.add_argument("--tokens", type=int, default=16_384 if on_gpu else 1024)
    parser.add_argument("--num-times", type=int, default=10)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--commit", default=None, help="recorded in the JSON; default: git's")
    arguments = parser.parse_args(argv)
    rows = []
    of_all = {"num_heads": NUM_HEADS, "head_dim": HEAD_DIM}
    print(f"{'':<30}{'':<5}{'ms':>9}{'against':>9}{'ratio':>8}{'at most':>9}  family")
    for comparison in comparisons(arguments.tokens):
        for direction in ("fwd", "bwd"):
            row = run(comparison, direction, arguments.num_times)
            rows.append(row)
            wanted, missed = "", False
            if row["at_most"] is not None:
                wanted, missed = f"{row['at_most']:.3f}", row["ratio"] > row["at_most"]
            families = dict.fromkeys((row["family"], row["against_family"]))
            print(
                f"{row['name']:<30}{direction:<5}{row['ms']:>9.3f}{row['against_ms']:>9.3f}"
                f"{row['ratio']:>8.3f}{wanted:>9}  {' against '.join(families)}"
                f"{', missed' if missed else ''}",
                flush=True,
            )
            write_results(arguments.json, arguments.commit, of_all | {"rows": rows})


if __name__ == "__main__":
    main()
