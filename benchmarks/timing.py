"""Times of jitted calls: the device span from the JAX profiler's trace, or the wall clock.

The span of a call runs from the start of its first kernel to the end of its last, so that
overlapping kernels are not counted twice and gaps between them are not left out.

Calls are launched as CUDA graphs. By itself XLA makes none of fewer than 5 operations, and none
under the profiler: then the host launches kernels one by one, and its pace, some 20 us a kernel,
is all that short calls would be measured by. In a model they are part of a larger graph.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

_MARK, _BEFORE = "timed call of ", "what comes before"
# Idle time before each call. Kernels are given to calls by their start times, and the clocks of
# the host and the device agree only to some microseconds.
_PAUSE_S = 1e-3
_TRACES = 3  # that are tried until one is whole
_GRAPHS = {
    "xla_gpu_graph_min_graph_size": "1",
    "xla_enable_command_buffers_during_profiling": "true",
}


class Timing(NamedTuple):
    ms: float  # median over the calls
    clock: str  # "device span", or "wall" and why
    kernels: tuple[str, ...]  # what one call ran, in order of start; empty for the wall clock


class Kernel(NamedTuple):
    start_ns: float
    end_ns: float
    name: str


class TraceError(Exception):
    """The trace does not say which kernels belong to which call."""


def launch_as_graphs() -> None:
    """Sets the XLA flags for it, but those that are given already. Before a backend starts."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    given = {flag.lstrip("-").partition("=")[0] for flag in flags}
    flags += [f"--{name}={value}" for name, value in _GRAPHS.items() if name not in given]
    os.environ["XLA_FLAGS"] = " ".join(flags)


def measure(
    calls: Mapping[str, Callable[[], Any]],
    num_times: int,
    before: Callable[[], Any] = lambda: None,
) -> dict[str, Timing]:
    """Times calls that are compiled and warm, `num_times` rounds of each in turn.

    Each finds what the one before left in the caches, unless `before`, called before every one and
    not timed, replaces that.
    """
    if jax.default_backend() != "gpu":
        return _wall_times(calls, num_times, before, f"wall ({jax.default_backend()})")
    problem = ""
    for _ in range(_TRACES):
        try:
            return _device_spans(calls, num_times, before)
        except TraceError as error:
            problem = str(error)
    return _wall_times(calls, num_times, before, f"wall ({problem})")


def _wall_times(
    calls: Mapping[str, Callable[[], Any]],
    num_times: int,
    before: Callable[[], Any],
    clock: str,
) -> dict[str, Timing]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(num_times):
        for name, call in calls.items():
            jax.block_until_ready(before())
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
    return {name: Timing(1e3 * statistics.median(t), clock, ()) for name, t in times.items()}


def _device_spans(
    calls: Mapping[str, Callable[[], Any]], num_times: int, before: Callable[[], Any]
) -> dict[str, Timing]:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # slows the launches, and so the span of short calls
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(num_times):
                for name, call in calls.items():
                    time.sleep(_PAUSE_S)
                    with jax.profiler.TraceAnnotation(_MARK + _BEFORE):
                        jax.block_until_ready(before())
                    time.sleep(_PAUSE_S)
                    with jax.profiler.TraceAnnotation(_MARK + name):
                        jax.block_until_ready(call())
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    starts, kernels = [], []
    for plane in data.planes:
        on_device = plane.name.startswith("/device:GPU")
        for line in plane.lines:
            if on_device and line.name.startswith("Stream"):
                kernels += [
                    Kernel(event.start_ns, event.start_ns + event.duration_ns, event.name)
                    for event in line.events
                ]
            elif not on_device:
                starts += [
                    (event.start_ns, event.name.removeprefix(_MARK))
                    for event in line.events
                    if event.name.startswith(_MARK)
                ]
    return spans(sorted(starts), sorted(kernels))


def spans(starts: Sequence[tuple[float, str]], kernels: Sequence[Kernel]) -> dict[str, Timing]:
    """Median span of each name's calls.

    Args:
      starts: (start on the host in ns, name) of every call, ascending, idle time before each.
      kernels: every kernel and copy on the device, ascending by start.
    Raises:
      TraceError: a call without kernels, or calls of one name with different numbers of them.
    """
    by_call: list[list[Kernel]] = [[] for _ in starts]
    call = -1
    for kernel in kernels:
        while call + 1 < len(starts) and kernel.start_ns >= starts[call + 1][0] - 5e8 * _PAUSE_S:
            call += 1
        if call >= 0:
            by_call[call].append(kernel)
    grouped: dict[str, list[list[Kernel]]] = {}
    for (_, name), ran in zip(starts, by_call, strict=True):
        if name != _BEFORE:
            grouped.setdefault(name, []).append(ran)
    timings = {}
    for name, ran_by_calls in grouped.items():
        counts = sorted({len(ran) for ran in ran_by_calls})
        if len(counts) != 1 or counts[0] == 0:
            raise TraceError(f"the trace gives {counts} kernels to calls of {name}")
        ns = [max(kernel.end_ns for kernel in ran) - ran[0].start_ns for ran in ran_by_calls]
        kernel_names = tuple(kernel.name for kernel in ran_by_calls[0])
        timings[name] = Timing(1e-6 * statistics.median(ns), "device span", kernel_names)
    return timings
