"""examples/train_sharded.py: the same losses on any mesh, in one process and in two."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = ["--steps", "2", "--layers", "1", "--width", "32", "--seq-len", "32", "--batch-size", "4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text"
    path.write_bytes(b"".join(b"%d bottles, %d bottles.\n" % (i, i * i) for i in range(500)))
    return path


def start(data, mesh, devices, hosts=()):
    """The example with CPU devices, whatever this machine has."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "examples/train_sharded.py", f"--data={data}", *OPTIONS]
    command += ["--mesh", *map(str, mesh), *(["--hosts", *map(str, hosts)] if hosts else [])]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def losses(process):
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return [float(x) for x in re.findall(r"step \d+: ([\d.]+) bits", output)]


@pytest.fixture(scope="module")
def on_one_device(data):
    result = losses(start(data, (1, 1, 1), 1))
    assert len(result) == 2
    return result


def test_mesh_of_eight(data, on_one_device):
    assert losses(start(data, (2, 2, 2), 8)) == pytest.approx(on_one_device, rel=1e-5)


def test_two_processes(data, on_one_device):
    """Each has four devices; the ring passes from one to the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(data, (1, 2, 4), 4, (f"127.0.0.1:{port}", 2, place)) for place in range(2)]
    try:
        first, second = map(losses, processes)
    finally:
        for process in processes:
            process.kill()
    assert first == pytest.approx(on_one_device, rel=1e-5)
    assert second == []  # one process speaks
