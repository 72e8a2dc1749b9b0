"""Times this library's attention beside others', forward and backward.

Two measures of each, softmax attention over cosine similarity at scale 10 in both:

  kernel   every implementation is given the same rows, already normalised
  all-in   raw q, k, v to out (or dq, dk, dv): this library normalises inside, and around a peer
           XLA does, in float32

Peers take turns within one run. On a GPU the times are device spans from the profiler's trace,
elsewhere wall-clock times; every row says which.
"""

import argparse
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from shapes import PRESETS, TARGETS, Preset, Shape, Target
from timing import launch_as_graphs, measure

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


def _jax_nn(implementation: Any, case: Case) -> Attend:
    return functools.partial(
        jax.nn.dot_product_attention,
        mask=case.mask,
        scale=SCALE,
        is_causal=case.is_causal,
        implementation=implementation,
    )


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
    "cudnn": functools.partial(_jax_nn, "cudnn"),
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


def prepare(attend: Attend, direction: str, inputs: Sequence[Array]) -> Callable[[], Any]:
    """A compiled and warm call without arguments. Backward leaves the forward pass out."""
    *qkv, dout = inputs
    if direction == "fwd":
        call = functools.partial(jax.jit(attend), *qkv)
    else:
        pullback = jax.jit(lambda *qkv: jax.vjp(attend, *qkv)[1])(*qkv)
        call = functools.partial(jax.jit(lambda pullback, dout: pullback(dout)), pullback, dout)
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


def expected_family(direction: str, dtype: str, head_dim: int, bounded: bool = True) -> str:
    """What `family` is to find for calls of more queries than decode takes; bounded: logits are, by
    |scale| * l2norm_groups alone, and the call is not deterministic."""
    if jax.default_backend() != "gpu":
        return "xla"
    hopper = jax.devices()[0].compute_capability == "9.0"
    largest = {"fwd": 256, "bwd": 128}[direction]
    takes = bounded and dtype != "float32" and head_dim % 8 == 0 and head_dim <= largest
    return "cuda-sm90" if hopper and takes else "cuda-sm80"


def run_case(
    case: Case, direction: str, mode: str, peers: Sequence[str], num_times: int
) -> list[dict[str, Any]]:
    """One row an implementation."""
    shape = case.shape
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

    attends, calls, problems = {}, {}, {}
    for name in (OURS, *peers):
        try:
            attends[name] = ours(case, mode) if name == OURS else peer(name, case, mode)
            calls[name] = prepare(attends[name], direction, inputs)
        except Exception as error:
            problems[name] = problem_of(name, error)
    timings = measure(calls, num_times) if calls else {}

    rows = []
    for name in (OURS, *peers):
        row: dict[str, Any] = {
            "direction": direction,
            "mode": mode,
            "dtype": case.dtype,
            **shape._asdict(),
            "is_causal": case.is_causal,
            "masked": case.mask is not None,
            "implementation": name,
        }
        if name in problems:
            row["problem"] = problems[name]
        else:
            timing = timings[name]
            row |= {
                "family": family(name, attends[name], inputs, timing.kernels),
                "ms": timing.ms,
                "tflops": shape.flops(direction, case.is_causal) / timing.ms * 1e-9,
                "clock": timing.clock,
                "kernels": timing.kernels,
            }
            if OURS in timings:
                row["ms_over_ours"] = timing.ms / timings[OURS].ms
        rows.append(row)
    return rows


COLUMNS = (
    "{direction:<4}{mode:<7}{dtype:<9}{batch:>4}{seq_len:>6}{num_heads:>4}{num_heads_kv:>4}"
    "{head_dim:>4} {options:<12} {implementation:<16}"
)
RESULT = "{family:<16}{ms:>10}{tflops:>9}{ms_over_ours:>7}  {clock}"


def print_header() -> None:
    titles = {
        "direction": "", "mode": "mode", "dtype": "dtype", "batch": "B", "seq_len": "T=S",
        "num_heads": "N", "num_heads_kv": "K", "head_dim": "H", "options": "options",
        "implementation": "implementation", "family": "kernels", "ms": "ms",
        "tflops": "TFLOP/s", "ms_over_ours": "/ours", "clock": "clock",
    }  # fmt: skip
    print(COLUMNS.format(**titles) + RESULT.format(**titles))


def print_row(row: dict[str, Any]) -> None:
    options = " ".join(
        word for word, on in (("causal", row["is_causal"]), ("mask", row["masked"])) if on
    )
    left = COLUMNS.format(**row, options=options)
    if "problem" in row:
        print(left + row["problem"], flush=True)
        return
    ratio = f"{row['ms_over_ours']:.2f}" if "ms_over_ours" in row else ""
    numbers = {"ms": f"{row['ms']:.4g}", "tflops": f"{row['tflops']:.4g}", "ms_over_ours": ratio}
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


def write_results(path: Path | None, commit: str | None, content: dict[str, Any]) -> None:
    """JSON of content and where it comes from; without a commit git's, without a path nothing."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(provenance(commit or git_commit()) | content, indent=1) + "\n")
    print(f"written to {path}")


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
        "--preset",
        choices=(*PRESETS, *TARGETS),
        help="shapes and dtype: original on a GPU, cpu elsewhere; or cases with a time to beat, "
        "which say themselves what the other options would",
    )
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--shape", type=int, nargs=4, metavar=("B", "N", "K", "H"))
    parser.add_argument("--seq-lens", type=int, nargs="+", metavar="T")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--peers", nargs="*", choices=PEERS, help="default: all available here")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--commit", default=None, help="recorded in the JSON; default: git's")
    arguments = parser.parse_args(argv)
    if not 0.0 <= arguments.mask_prob < 1.0:
        parser.error(f"--mask-prob must be in [0, 1), got {arguments.mask_prob}")
    if arguments.preset in TARGETS:
        own = {"preset", "num_times", "seq_lens", "peers", "json", "commit"}
        given = [x for x in vars(arguments) if vars(arguments)[x] != parser.get_default(x)]
        if others := sorted(set(given) - own):
            parser.error(
                f"{', '.join(others)}: the cases of {arguments.preset} say that themselves"
            )
    if arguments.num_times < 1:
        parser.error(f"--num-times must be at least 1, got {arguments.num_times}")
    return arguments


def chosen_shapes(arguments: argparse.Namespace, preset: Preset) -> list[Shape]:
    """The preset's shapes of the given lengths, or the given shape at them; all when not given."""
    lengths = arguments.seq_lens or sorted({shape.seq_len for shape in preset.shapes})
    if arguments.shape is None:
        return [shape for shape in preset.shapes if shape.seq_len in lengths]
    batch, num_heads, num_heads_kv, head_dim = arguments.shape
    return [Shape(batch, t, num_heads, num_heads_kv, head_dim) for t in lengths]


def run_targets(arguments: argparse.Namespace, peers: Sequence[str]) -> None:
    """Cases with a time to beat, on the kernels for Hopper where there are any."""
    rows, missed = [], 0
    for target in TARGETS[arguments.preset]:
        if arguments.seq_lens and target.shape.seq_len not in arguments.seq_lens:
            continue
        new_rows = run_target(target, peers, arguments.num_times)
        for row in new_rows:
            print_row(row)
        rows += new_rows
        ours_row, wanted = new_rows[0], target.at_least
        if "best_peer_over_ours" in ours_row and wanted is not None:
            reached = ours_row["best_peer_over_ours"]
            missed += reached < wanted
            verdict = "reached" if reached >= wanted else "missed"
            print(f"{verdict}: {reached:.2f} of {wanted:.2f}", flush=True)
    print(f"{missed} targets missed")
    write_results(arguments.json, arguments.commit, {"rows": rows})


def run_target(target: Target, peers: Sequence[str], num_times: int) -> list[dict[str, Any]]:
    """As `run_case`; the first row, ours, with what the target asks and what it got."""
    shape = target.shape
    case = Case(shape, target.dtype, target.is_causal, random_mask(shape, target.mask_prob))
    asked = peers if target.at_least is not None else []
    rows = run_case(case, target.direction, target.mode, asked, num_times)
    of_peers = [row["ms"] for row in rows[1:] if "ms" in row]
    rows[0]["at_least"] = target.at_least
    if of_peers and "ms" in rows[0]:
        rows[0]["best_peer_over_ours"] = min(of_peers) / rows[0]["ms"]
    if "family" in rows[0]:
        wanted = expected_family(target.direction, target.dtype, shape.head_dim)
        assert rows[0]["family"] == wanted, (target, wanted, rows[0]["kernels"])
    return rows


def run_preset(arguments: argparse.Namespace, peers: Sequence[str]) -> None:
    preset = PRESETS[arguments.preset or ("original" if jax.default_backend() == "gpu" else "cpu")]
    shapes = chosen_shapes(arguments, preset)
    if not shapes:
        raise SystemExit("the preset has no shape of these lengths; give one with --shape")
    dtype = arguments.dtype or preset.dtype
    directions = [
        direction
        for direction, left_out in (
            ("fwd", arguments.only_backwards),
            ("bwd", arguments.only_forwards),
        )
        if not left_out
    ]
    rows = []
    for shape in shapes:
        case = Case(shape, dtype, arguments.causal, random_mask(shape, arguments.mask_prob))
        for direction in directions:
            for mode in arguments.modes:
                new_rows = run_case(case, direction, mode, peers, arguments.num_times)
                for row in new_rows:
                    print_row(row)
                rows += new_rows
    write_results(arguments.json, arguments.commit, {"rows": rows})


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    launch_as_graphs()
    peers = available_peers() if arguments.peers is None else arguments.peers
    jax_cosine_attn.show_config()
    print_header()
    if arguments.preset in TARGETS:
        run_targets(arguments, peers)
    else:
        run_preset(arguments, peers)


if __name__ == "__main__":
    main()
