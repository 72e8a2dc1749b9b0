"""examples/train_sharded.py: the same losses on another mesh and in two processes."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = ["--steps=2", "--layers=1", "--width=32", "--seq-len=32", "--batch-size=4"]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"".join(b"%d bottles, %d bottles.\n" % (i, i * i) for i in range(500)))
    return path


def start(data, mesh, devices, hosts=(), platform="cpu"):
    """The example with so many CPU devices, whatever this machine has, or with its one GPU."""
    environment = os.environ | {
        "JAX_PLATFORMS": platform,
        "PYTHONPATH": str(ROOT),
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


@pytest.fixture
def in_one_process(data):
    return losses(start(data, (2, 2, 2), 8))


def test_two_processes_train_like_one(data, in_one_process):
    """Each has four devices; the ring passes from one to the other."""
    assert len(in_one_process) == 2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(data, (1, 1, 8), 4, (f"127.0.0.1:{port}", 2, place)) for place in range(2)]
    try:
        first, second = map(losses, processes)
    finally:
        for process in processes:
            process.kill()
    assert first == pytest.approx(in_one_process, rel=1e-5)
    assert second == []  # one process speaks


@pytest.mark.gpu
def test_one_gpu_trains_like_a_cpu(data):
    """But for its float32 products, TF32 by default."""
    expected = losses(start(data, (1, 1, 1), 1))
    assert losses(start(data, (1, 1, 1), 1, platform="cuda")) == pytest.approx(expected, rel=1e-2)
