"""Bytes to train on: any file, or the Python standard library's own source."""

from __future__ import annotations

import gzip
import hashlib
import sysconfig
import zipfile
from pathlib import Path

import numpy as np

VALIDATION_FRACTION = 0.05


def load(path: Path | None) -> np.ndarray:
    """The bytes of a plain, .gz or .zip file (its members one after the other), as uint8.

    None reads the .py files of the standard library of the running interpreter.
    """
    if path is None:
        content = _standard_library()
    elif path.suffix == ".gz":
        content = gzip.decompress(path.read_bytes())
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            content = b"".join(archive.read(name) for name in archive.namelist())
    else:
        content = path.read_bytes()
    return np.frombuffer(content, np.uint8)


def _standard_library() -> bytes:
    root = Path(sysconfig.get_path("stdlib"))
    names = [file.relative_to(root) for file in root.rglob("*.py")]
    sources = [name for name in names if "packages" not in name.parts[0]]  # site-, dist-packages

    # In the order of a hash of their names, so that the held-out end is a sample of everything and
    # not what happens to come last in the alphabet.
    sources.sort(key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())
    return b"".join((root / name).read_bytes() for name in sources)


def split(data: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation bytes: the validation bytes are the last 5 %."""
    held_out = int(len(data) * VALIDATION_FRACTION)
    if held_out < window:
        raise ValueError(
            f"{len(data)} bytes of data leave {held_out} for validation, fewer than one window of "
            f"{window}"
        )
    return data[:-held_out], data[-held_out:]


def random_windows(
    data: np.ndarray, count: int, window: int, *, seed: int, step: int
) -> np.ndarray:
    """The training batch of a step, uint8 [count, window].

    A function of seed and step alone: a resumed run goes on with the batches it would have seen.
    """
    random = np.random.default_rng((seed, step))
    starts = random.integers(0, len(data) - window + 1, count)
    return data[starts[:, None] + np.arange(window)]


def even_windows(data: np.ndarray, count: int, window: int) -> np.ndarray:
    """Windows spread evenly over the data, uint8 [count, window]."""
    starts = np.linspace(0, len(data) - window, count).astype(np.int64)
    return data[starts[:, None] + np.arange(window)]
