"""XLA flags and the compilation cache, set before JAX starts; the `gpu` and `full` markers."""

import functools
import importlib.util
import itertools
import os
from pathlib import Path

import pytest

# Eight host devices for the sharding tests; one thread per operation, because the suite runs in
# several processes. Subprocesses of the tests inherit all of it.
_XLA_FLAGS = ("--xla_force_host_platform_device_count=8", "--xla_cpu_multi_thread_eigen=false")
_given = os.environ.get("XLA_FLAGS", "").split()
_has_gpu = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
if not _has_gpu and not any("xla_backend_optimization_level" in flag for flag in _given):
    # Most of the suite on a CPU is compilation of small calls. The smoke set compiles as users do.
    _XLA_FLAGS += ("--xla_backend_optimization_level=0",)
os.environ["XLA_FLAGS"] = " ".join(_given + [flag for flag in _XLA_FLAGS if flag not in _given])
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's, for the oracle
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Several test processes share one GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run the full grids")


@functools.cache
def _why_no_gpu() -> str | None:
    import jax

    from jax_cosine_attn._ffi import build_problem

    if jax.default_backend() != "gpu":
        return f"needs a CUDA device; JAX runs on {jax.default_backend()}"
    return build_problem()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        full = [item for item in items if item.get_closest_marker("full")]
        if full:
            config.hook.pytest_deselected(items=full)
            items[:] = [item for item in items if item not in full]
    for item in items:
        if item.get_closest_marker("gpu") and (reason := _why_no_gpu()):
            item.add_marker(pytest.mark.skip(reason=reason))


_tests_ended = itertools.count(1)


def pytest_runtest_teardown() -> None:
    """A test of all gradients leaves 250 memory maps of compiled code behind (measured, CPU), and
    Linux allows a process 65530: beyond that, loading a program crashes."""
    import jax

    if next(_tests_ended) % 100 == 0:
        jax.clear_caches()


@pytest.fixture
def exact_products():
    """float32 products in full: a GPU's default is TF32, which no test of a few ulp survives."""
    import jax

    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def eight_devices():
    """The host's own on a CPU, see above. A single GPU has nobody to send anything to."""
    import jax

    if len(jax.devices()) < 8:
        pytest.skip(f"what 8 devices send and hold; this machine has {len(jax.devices())}")
