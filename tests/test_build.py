"""What was built and installed: version, extension, the compiler's log, the GPU record's tools."""

import ast
import importlib.metadata
import json
import re
from pathlib import Path

import gpu_record
import pytest

import jax_cosine_attn
from jax_cosine_attn._ffi import build_problem

ROOT = Path(__file__).resolve().parents[1]
needs_kernels = pytest.mark.skipif(build_problem() is not None, reason=str(build_problem()))


def test_version_is_the_distributions():
    assert jax_cosine_attn.__version__ == importlib.metadata.version("jax-cosine-attn")


def test_package_is_typed():
    assert (Path(jax_cosine_attn.__file__).parent / "py.typed").exists()


@needs_kernels
def test_targets_are_capsules():
    from jax_cosine_attn import _cuda

    registrations = _cuda.registrations()
    assert {"jax_cosine_attn_fwd", "jax_cosine_attn_bwd"} <= registrations.keys()
    assert {type(capsule).__name__ for capsule in registrations.values()} == {"PyCapsule"}


@needs_kernels
def test_stub_is_of_the_extension():
    """Names and numbers of parameters, as pybind11 states them."""
    from jax_cosine_attn import _cuda

    stub = ast.parse((ROOT / "jax_cosine_attn" / "_cuda.pyi").read_text())
    functions = {x.name: x for x in stub.body if isinstance(x, ast.FunctionDef)}
    assert functions.keys() == {name for name in dir(_cuda) if not name.startswith("_")}
    for name, function in functions.items():
        signature = (getattr(_cuda, name).__doc__ or "").splitlines()[0]
        count = len(function.args.posonlyargs) + len(function.args.args)
        assert signature.startswith(f"{name}(") and signature.count(": ") == count, signature


def ptxas_log() -> str:
    from jax_cosine_attn import _cuda

    return (Path(_cuda.__file__).parent / "ptxas.log").read_text()


def spilling_kernels(log: str) -> dict[str, int]:
    """Bytes of spill stores and loads by the mangled names of the kernels that have any."""
    spills: dict[str, int] = {}
    pattern = (
        r"Function properties for (\S+)\s+"
        r"\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    )
    for name, stores, loads in re.findall(pattern, log):
        if bytes_spilled := int(stores) + int(loads):
            spills[name] = max(bytes_spilled, spills.get(name, 0))
    return spills


def test_spills_are_read_from_the_log():
    log = """
ptxas info    : Function properties for _Zclean
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for _Zspills
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
"""
    assert spilling_kernels(log) == {"_Zspills": 20}


@needs_kernels
def test_every_instance_is_in_the_compilers_log():
    from jax_cosine_attn import _cuda

    compiled = set(re.findall(r"Compiling entry function '(\S*cosine_attn_\S*)'", ptxas_log()))
    assert len(compiled) >= len(_cuda.instances()) > 0


STATIC_SMEM = 384  # bytes that kernels declare themselves: kStatic in cuda/launch/instances.cc


@needs_kernels
def test_sanitizers_see_every_instance():
    """`make sanitize` limits the shared memory so that its calls take the instance that they are
    for, by the rule of find_instance in cuda/launch/instances.cc, here on a Hopper."""
    import sanitize

    from jax_cosine_attn import _cuda

    def taken(like: dict, head_dim: int, packed_rows: int, smem_bytes: int) -> dict:
        same = ("direction", "arithmetic", "unbounded", "fused", "candidate")
        return next(
            i
            for i in _cuda.instances()
            if all(i[x] == like[x] for x in same)
            and i["head_dim"] >= head_dim
            and i["block_m"] >= packed_rows
            and i["smem_bytes"] + STATIC_SMEM <= smem_bytes
            and (i["family"] == "sm80" or head_dim % 8 == 0)
        )

    for instance in _cuda.instances():
        limit = sanitize.shared_memory(instance) or 227 * 1024
        for name, size, *_ in sanitize.calls(instance):
            rows = size["n"] // size["k"] * size["t"] if instance["direction"] == "decode" else 0
            assert taken(instance, size["h"], rows, limit) == instance, (instance, name)


@needs_kernels
def test_every_call_has_a_kernel_in_99_kb():
    """Of shared memory, which is what GPUs of compute capability 8.6 and 8.9 have. Small kernels
    are unbounded, and take bounded calls too."""
    from jax_cosine_attn import _cuda

    fitting = [i for i in _cuda.instances() if i["smem_bytes"] + STATIC_SMEM <= 99 * 1024]
    keys = {(i["direction"], i["arithmetic"]) for i in _cuda.instances()}
    for direction, arithmetic in sorted(keys):
        mine = [i for i in fitting if (i["direction"], i["arithmetic"]) == (direction, arithmetic)]
        for unbounded in (False, True):
            if unbounded and (direction == "decode" or arithmetic == "float16-bfloat16"):
                continue  # they are for bounded calls
            largest = max(i["head_dim"] for i in mine if i["unbounded"] >= unbounded)
            assert largest == 256, (direction, arithmetic, unbounded)


@needs_kernels
def test_no_spills_but_those_that_the_notes_explain():
    notes = (ROOT / "cuda" / "kernels" / "NOTES.md").read_text()
    explained = re.findall(r"^- spill: (\S+): \S", notes, re.MULTILINE)
    spills = spilling_kernels(ptxas_log())
    unexplained = {
        name: spilled
        for name, spilled in spills.items()
        if not any(fragment in name for fragment in explained)
    }
    assert not unexplained
    stale = [fragment for fragment in explained if not any(fragment in name for name in spills)]
    assert not stale, "the notes explain spills that no kernel has"


@needs_kernels
def test_no_serialised_wgmma():
    # C7510 to C7519: ptxas says that it serialised wgmma, or could not keep its registers.
    assert not re.findall(r".*\bC75\d\d\b.*", ptxas_log())


def junit_file(path: Path, outcomes: dict[str, str]) -> Path:
    cases = (
        f'<testcase classname="tests.test_x" name="{name}"><{outcome}/></testcase>'
        for name, outcome in outcomes.items()
    )
    path.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    return path


def test_gpu_record_counts_and_checks(tmp_path, monkeypatch, capsys):
    first = {"a": "failure", "b": "error", "c": "skipped", "d": "properties", "e": "failure"}
    junit = junit_file(tmp_path / "first.xml", first)
    again = junit_file(tmp_path / "again.xml", {"a": "properties"})
    record = tmp_path / "record.json"
    monkeypatch.setattr(gpu_record, "RECORD", record)
    gpu_record.check()
    assert "no tests/gpu_record.json" in capsys.readouterr().out

    gpu_record.write([junit], "c0ffee", record)
    content = json.loads(record.read_text())
    assert (content["passed"], content["failed"], content["skipped"]) == (1, 3, 1)
    gpu_record.write([junit, again], "c0ffee", record)
    content = json.loads(record.read_text())
    assert (content["passed"], content["failed"], content["skipped"]) == (2, 2, 1)
    assert content["commit"] == "c0ffee"
    gpu_record.check()
    assert "2 tests" in capsys.readouterr().out

    record.write_text(json.dumps(content | {"failed": 0}))
    gpu_record.check()
    assert "same kernels" in capsys.readouterr().out
    record.write_text(json.dumps(content | {"failed": 0, "kernel_hash": "other"}))
    gpu_record.check()
    assert "the kernels have changed" in capsys.readouterr().out
