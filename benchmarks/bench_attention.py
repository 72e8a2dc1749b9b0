"""Times this library's attention beside others', forward and backward.

Two measures of each, softmax attention over cosine similarity at scale 10 in both:

  kernel   every implementation is given the same rows, already normalised
  all-in   raw q, k, v to out (or dq, dk, dv): this library normalises inside, and around a peer
           XLA does, in float32

Peers take turns within one run. On a GPU the times are device spans from the profiler's trace,
elsewhere wall-clock times; every row says which. The JSON is written after every case. One that is
there already, of the same commit, device and versions, keeps its rows of other cases.
"""

import argparse
import datetime
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import verdicts
from shapes import PRESETS, TARGETS, Preset, Shape, Target
from timing import launch_as_graphs, measure
from verdicts import Key, Row, Verdict

import jax_cosine_attn

SCALE = 10.0  # as the original's benchmark
OURS = "jax_cosine_attn"
MODES = ("kernel", "all-in")
PACKAGES = (
    "jax_cosine_attn", "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin",
    "nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "flash-attn3-jax", "tokamax",
)  # fmt: skip

Array = jax.Array
Attend = Callable[[Array, Array, Array], Array]


class Case(NamedTuple):
    shape: Shape
    dtype: str
    is_causal: bool
    mask: Array | None  # bool [B, 1, 1, S], True = may attend


class Unsupported(Exception):
    """The peer cannot do this case; the text says why."""


def normalise(x: Array) -> Array:
    """What a user of a peer writes around it: float32 inside, the input's dtype outside."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.maximum((y * y).sum(-1, keepdims=True), 1e-12))).astype(x.dtype)


def ours(case: Case, mode: str) -> Attend:
    return functools.partial(
        jax_cosine_attn.cosine_attention,
        mask=case.mask,
        scale=SCALE,
        l2norm_qk=mode == "all-in",
        is_causal=case.is_causal,
    )


def exact(q: Array, k: Array, v: Array) -> np.ndarray:
    """The full forward of raw rows, in float64."""
    rows = [np.asarray(x).astype(np.float64).swapaxes(1, 2) for x in (q, k, v)]
    unit_q, unit_k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in rows[:2])
    p = np.exp(SCALE * (unit_q @ unit_k.swapaxes(-1, -2)))
    return (p / p.sum(-1, keepdims=True) @ rows[2]).swapaxes(1, 2)


def _jax_nn(implementation: Any, case: Case) -> Attend:
    return functools.partial(
        jax.nn.dot_product_attention,
        mask=case.mask,
        scale=SCALE,
        is_causal=case.is_causal,
        implementation=implementation,
    )


def _cudnn(case: Case) -> Attend:
    """A mask is a bias to it, which has to have a row for each query."""
    mask, shape = case.mask, case.shape
    if mask is None:
        return _jax_nn("cudnn", case)

    def attend(q: Array, k: Array, v: Array) -> Array:
        of_rows = jnp.broadcast_to(mask, (shape.batch, 1, shape.seq_len, shape.seq_len))
        return _jax_nn("cudnn", case._replace(mask=of_rows))(q, k, v)

    return attend


def _flash_attn3_jax(case: Case) -> Attend:
    from flash_attn3_jax import flash_mha

    if case.mask is not None:
        raise Unsupported("no mask argument")
    return functools.partial(flash_mha, softmax_scale=SCALE, is_causal=case.is_causal)


def _tokamax(case: Case) -> Attend:
    import tokamax

    return functools.partial(
        tokamax.dot_product_attention, mask=case.mask, scale=SCALE, is_causal=case.is_causal
    )


PEERS: dict[str, Callable[[Case], Attend]] = {
    "xla": functools.partial(_jax_nn, "xla"),
    "cudnn": _cudnn,
    "flash_attn3_jax": _flash_attn3_jax,
    "tokamax": _tokamax,
}


def available_peers() -> list[str]:
    """The peers that can run here: what comes with JAX, and what is installed."""
    if jax.default_backend() != "gpu":
        return ["xla"]
    optional = ("flash_attn3_jax", "tokamax")
    return ["xla", "cudnn"] + [name for name in optional if importlib.util.find_spec(name)]


def peer(name: str, case: Case, mode: str) -> Attend:
    attend = PEERS[name](case)
    if mode == "kernel":
        return attend
    return lambda q, k, v: attend(normalise(q), normalise(k), v)


def _with_residuals(attend: Attend, *qkv: Array) -> tuple[Array, list[Array]]:
    """out, and what the pullback needs beside it and the inputs, which a jit would copy."""
    out, pullback = jax.vjp(attend, *qkv)
    there = (*qkv, out)
    return out, [x for x in jax.tree.leaves(pullback) if not any(x is y for y in there)]


def _both(attend: Attend, *inputs: Array) -> tuple[Array, ...]:
    """out, which every loss reads, dq, dk and dv."""
    *qkv, dout = inputs
    out, pullback = jax.vjp(attend, *qkv)
    return out, *pullback(dout)


def prepare(attend: Attend, direction: str, inputs: Sequence[Array]) -> functools.partial[Any]:
    """A warm call without arguments, of a `jax.stages.Compiled`. The backward alone, "bwd", leaves
    the forward pass out."""
    *qkv, dout = inputs
    program: Callable[..., Any] = attend
    operands: Sequence[Any] = qkv
    if direction == "fwd+res":
        program = functools.partial(_with_residuals, attend)
    elif direction == "bwd":
        pullback = jax.jit(lambda *qkv: jax.vjp(attend, *qkv)[1])(*qkv)
        program, operands = lambda pullback, dout: pullback(dout), (pullback, dout)
    elif direction == "both":
        program, operands = functools.partial(_both, attend), inputs
    call = functools.partial(jax.jit(program).lower(*operands).compile(), *operands)
    for _ in range(3):
        jax.block_until_ready(call())
    return call


def problem_of(name: str, error: Exception) -> str:
    """The text of the row whose call failed; errors of this library are not rows but failures."""
    text = str(error).strip()
    if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        return "out of memory"
    if name == OURS:
        raise error
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:160]


def family(name: str, attend: Attend, inputs: Sequence[Array], kernels: Sequence[str]) -> str:
    """Which kernels ran: for this library, its CUDA family by its kernels' names, or xla."""
    if name != OURS:
        return name
    options = attend.keywords  # type: ignore[attr-defined]  # a functools.partial
    if jax.default_backend() != "gpu" or jax_cosine_attn.why_not("cuda", *inputs[:3], **options):
        return "xla"
    found = sorted({arch for kernel in kernels for arch in re.findall(r"sm\d+", kernel)})
    return "-".join(["cuda", *found])


def expected_family(dtype: str, head_dim: int, bounded: bool = True) -> str:
    """What `family` is to find for calls of more queries than decode takes; bounded: logits are, by
    |scale| * l2norm_groups alone, and the call is not deterministic."""
    if jax.default_backend() != "gpu":
        return "xla"
    hopper = jax.devices()[0].compute_capability == "9.0"
    takes = hopper and bounded and dtype != "float32" and head_dim % 8 == 0
    return "cuda-sm90" if takes else "cuda-sm80"


def run_case(target: Target, num_times: int, runs: int) -> list[Row]:
    """One row an implementation, ours first: of the latest of the runs, with the spread of all."""
    direction, mode, shape = target.direction, target.mode, target.shape
    case = Case(shape, target.dtype, target.is_causal, random_mask(shape, target.mask_prob))
    q_shape = (shape.batch, shape.seq_len, shape.num_heads, shape.head_dim)
    k_shape = (shape.batch, shape.seq_len, shape.num_heads_kv, shape.head_dim)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, dout = (
        jax.random.normal(key, s, jnp.float32).astype(case.dtype)
        for key, s in zip(keys, (q_shape, k_shape, k_shape, q_shape), strict=True)
    )
    if mode == "kernel":
        q, k = normalise(q), normalise(k)
    inputs = (q, k, v, dout)

    names = (OURS, *target.peers)
    attends, calls, problems = {}, {}, {}
    for name in names:
        try:
            attends[name] = ours(case, mode) if name == OURS else peer(name, case, mode)
            with jax.default_matmul_precision(target.precision):
                calls[name] = prepare(attends[name], direction, inputs)
        except Exception as error:
            problems[name] = problem_of(name, error)
    rounds = [measure(calls, num_times) for _ in range(runs)] if calls else [{}]
    timings = rounds[-1]
    expected = exact(q, k, v) if target.accuracy else None

    rows = []
    for name in names:
        row: Row = target.columns() | {"implementation": name}
        if name in problems:
            row["problem"] = problems[name]
        else:
            timing = timings[name]
            compiled: Any = calls[name].func
            times = [some[name].ms for some in rounds if some[name].clock == timing.clock]
            row |= {
                "family": family(name, attends[name], inputs, timing.kernels),
                "ms": timing.ms,
                "spread": [min(times), max(times)],
                "tflops": shape.flops(direction, case.is_causal) / timing.ms * 1e-9,
                "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
                "clock": timing.clock,
                "kernels": timing.kernels,
            }
            if OURS in timings:
                row["ms_over_ours"] = timing.ms / timings[OURS].ms
            if expected is not None:
                off = np.asarray(calls[name]()).astype(np.float64) - expected
                row["error"] = float(np.linalg.norm(off) / np.linalg.norm(expected))
        rows.append(row)
    ratios = [row["ms_over_ours"] for row in rows[1:] if "ms_over_ours" in row]
    if ratios:
        rows[0]["best_peer_over_ours"] = min(ratios)
    return rows


def check_family(target: Target, row: Row) -> None:
    """Cases with a time to beat run the kernels for Hopper where there are any."""
    if "family" in row:
        wanted = expected_family(target.dtype, target.shape.head_dim)
        assert row["family"] == wanted, (target, wanted, row["kernels"])


COLUMNS = (
    "{direction:<8}{mode:<7}{dtype:<9}{batch:>4}{seq_len:>7}{num_heads:>4}{num_heads_kv:>4}"
    "{head_dim:>4} {options:<15} {implementation:<16}"
)
RESULT = "{family:<16}{ms:>10}{spread:>18}{tflops:>9}{ms_over_ours:>7}{temporaries:>9}  {clock}"


def print_header() -> None:
    titles = {
        "direction": "", "mode": "mode", "dtype": "dtype", "batch": "B", "seq_len": "T=S",
        "num_heads": "N", "num_heads_kv": "K", "head_dim": "H", "options": "options",
        "implementation": "implementation", "family": "kernels", "ms": "ms", "spread": "of runs",
        "tflops": "TFLOP/s", "ms_over_ours": "/ours", "temporaries": "temp MB", "clock": "clock",
    }  # fmt: skip
    print(COLUMNS.format(**titles) + RESULT.format(**titles))


def print_row(target: Target, row: Row) -> None:
    left = COLUMNS.format(**row, options=target.options())
    if "problem" in row:
        print(left + row["problem"], flush=True)
        return
    least, most = row["spread"]
    numbers = {
        "ms": f"{row['ms']:.4g}",
        "spread": f"{least:.4g}-{most:.4g}" if least < most else "",
        "tflops": f"{row['tflops']:.4g}",
        "ms_over_ours": f"{row['ms_over_ours']:.2f}" if "ms_over_ours" in row else "",
        "temporaries": f"{1e-6 * row['temporary_bytes']:.4g}",
    }
    print(left + RESULT.format(**(row | numbers)), flush=True)


def random_mask(shape: Shape, probability: float) -> Array | None:
    """Key-padding mask that drops each key but the first with the probability; None for 0.

    The first key stays so that no row is dead, where implementations differ by design.
    """
    if probability == 0.0:
        return None
    draw = jax.random.uniform(jax.random.key(1), (shape.batch, 1, 1, shape.seq_len))
    return (draw >= probability).at[..., 0].set(True)


def provenance(commit: str) -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "runtime": jax.devices()[0].client.platform_version.splitlines()[-1],
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "versions": versions,
        "scale": SCALE,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """In one step: a run that is cut leaves the whole of one or the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def write_results(path: Path | None, commit: str | None, content: dict[str, Any]) -> None:
    """JSON of content and where it comes from; without a commit git's, without a path nothing. For
    each row again: a run that is cut leaves what it has."""
    if path is None:
        return
    write_json(path, provenance(commit or git_commit()) | content)


def kept_rows(path: Path | None, source: dict[str, Any]) -> dict[Key, list[Row]]:
    """The rows of each case in the file, if what they come from differs in nothing but the date."""
    if path is None or not path.exists():
        return {}
    content = json.loads(path.read_text())
    if any(content.get(name) != value for name, value in source.items() if name != "date"):
        return {}
    return {key: list(rows) for key, rows in itertools.groupby(content["rows"], verdicts.key)}


@functools.cache  # results that are written may be part of the tree
def git_commit() -> str:
    command = ("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    try:
        run = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    one_way = parser.add_mutually_exclusive_group()
    one_way.add_argument("--only-forwards", action="store_true")
    one_way.add_argument("--only-backwards", action="store_true")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument(
        "--mask-prob", type=float, default=0.0, metavar="P", help="chance that a key is masked out"
    )
    parser.add_argument("--num-times", type=int, default=20, help="calls that the median is over")
    parser.add_argument(
        "--runs", type=int, default=1, help="medians taken of each: the latest counts, all spread"
    )
    parser.add_argument(
        "--preset",
        choices=(*PRESETS, *TARGETS),
        help="shapes and dtype: original on a GPU, cpu elsewhere; or cases with a time to beat, "
        "which say themselves what the other options would",
    )
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--shape", type=int, nargs=4, metavar=("B", "N", "K", "H"))
    parser.add_argument("--seq-lens", type=int, nargs="+", metavar="T")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=PEERS,
        help="default: all available here; where there is a time to beat, those that set it",
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--commit", default=None, help="recorded in the JSON; default: git's")
    arguments = parser.parse_args(argv)
    if not 0.0 <= arguments.mask_prob < 1.0:
        parser.error(f"--mask-prob must be in [0, 1), got {arguments.mask_prob}")
    if arguments.preset in TARGETS:
        own = {"preset", "num_times", "runs", "seq_lens", "peers", "json", "commit"}
        given = [x for x in vars(arguments) if vars(arguments)[x] != parser.get_default(x)]
        if others := sorted(set(given) - own):
            parser.error(
                f"{', '.join(others)}: the cases of {arguments.preset} say that themselves"
            )
    for name in ("num_times", "runs"):
        if getattr(arguments, name) < 1:
            option = name.replace("_", "-")
            parser.error(f"--{option} must be at least 1, got {getattr(arguments, name)}")
    return arguments


def chosen_shapes(arguments: argparse.Namespace, preset: Preset) -> list[Shape]:
    """The preset's shapes of the given lengths, or the given shape at them; all when not given."""
    lengths = arguments.seq_lens or sorted({shape.seq_len for shape in preset.shapes})
    if arguments.shape is None:
        return [shape for shape in preset.shapes if shape.seq_len in lengths]
    batch, num_heads, num_heads_kv, head_dim = arguments.shape
    return [Shape(batch, t, num_heads, num_heads_kv, head_dim) for t in lengths]


def with_a_time_to_beat(arguments: argparse.Namespace) -> list[Target]:
    here = available_peers()
    targets = []
    for target in TARGETS[arguments.preset]:
        if arguments.seq_lens and target.shape.seq_len not in arguments.seq_lens:
            continue
        peers = tuple(name for name in target.peers if name in here)
        if arguments.peers is not None and target.peers:
            peers = tuple(arguments.peers)
        targets.append(target._replace(peers=peers))
    return targets


def without(arguments: argparse.Namespace) -> list[Target]:
    preset = PRESETS[arguments.preset or ("original" if jax.default_backend() == "gpu" else "cpu")]
    dtype = arguments.dtype or preset.dtype
    peers = tuple(available_peers() if arguments.peers is None else arguments.peers)
    left_out = {"fwd": arguments.only_backwards, "bwd": arguments.only_forwards}
    return [
        Target(direction, mode, shape, dtype, arguments.causal, arguments.mask_prob, peers=peers)
        for shape in chosen_shapes(arguments, preset)
        for direction in ("fwd", "bwd")
        if not left_out[direction]
        for mode in arguments.modes
    ]


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    launch_as_graphs()
    asked = arguments.preset in TARGETS
    targets = with_a_time_to_beat(arguments) if asked else without(arguments)
    if not targets:
        raise SystemExit("the preset has no shape of these lengths; give one with --shape")
    jax_cosine_attn.show_config()
    source = provenance(arguments.commit or git_commit())
    table = kept_rows(arguments.json, source)
    print_header()
    found: list[Verdict] = []
    for target in targets:
        rows = run_case(target, arguments.num_times, arguments.runs)
        table[verdicts.key(target.columns())] = rows
        for row in rows:
            print_row(target, row)
        if asked:
            check_family(target, rows[0])
            for verdict in verdicts.of_case(target, table):
                print(verdict, flush=True)
            found = verdicts.of_table(table)
        if arguments.json is not None:
            content = {
                "rows": list(itertools.chain(*table.values())),
                "verdicts": [verdict._asdict() | {"met": verdict.met} for verdict in found],
            }
            write_json(arguments.json, source | content)
    if asked:
        for verdict in verdicts.of_all(table):
            print(f"{verdict.case}: {verdict}")
        print(f"{sum(not verdict.met for verdict in found)} of {len(found)} missed")
    if arguments.json is not None:
        print(f"written to {arguments.json}")


if __name__ == "__main__":
    main()
