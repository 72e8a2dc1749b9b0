"""Keeps tests/gpu_record.json: which kernels the suite last passed with on a GPU.

`write` records a finished `make test-gpu`; `check` says loudly when the record is not of the
kernels in the tree, and never fails for it: whoever runs it may have no GPU.
"""

import argparse
import collections
import datetime
import hashlib
import json
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "tests" / "gpu_record.json"
PRIMITIVE = ("_config.py", "_ffi.py", "_primitive.py", "_vjp.py")


def kernel_hash() -> str:
    """SHA-256 over everything in cuda/ but its notes, and over the primitive's Python files."""
    files = [path for path in (ROOT / "cuda").rglob("*") if path.is_file() and path.suffix != ".md"]
    files += [ROOT / "jax_cosine_attn" / name for name in PRIMITIVE]
    digest = hashlib.sha256()
    for path in sorted(files):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def outcomes(junit: Sequence[Path]) -> collections.Counter[str]:
    """How many tests passed, failed and were skipped; of one that several files have, the last."""
    last = {}
    for file in junit:
        for case in ET.parse(file).getroot().iter("testcase"):
            found = {child.tag for child in case}
            outcome = "failed" if found & {"failure", "error"} else "passed"
            if "skipped" in found:
                outcome = "skipped"
            last[case.get("classname"), case.get("name")] = outcome
    return collections.Counter(last.values())


def write(junit: Sequence[Path], commit: str, record: Path) -> None:
    import jax

    counts = outcomes(junit)
    content = {
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "kernel_hash": kernel_hash(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        **{outcome: counts[outcome] for outcome in ("passed", "failed", "skipped")},
    }
    record.write_text(json.dumps(content, indent=2) + "\n")
    print(record.read_text(), end="")


def check() -> None:
    if not RECORD.exists():
        problem = "there is no tests/gpu_record.json: the suite has not been recorded on a GPU"
    else:
        content = json.loads(RECORD.read_text())
        if content["kernel_hash"] == kernel_hash() and not content["failed"]:
            print(f"GPU record: {content['passed']} passed on {content['device']}, same kernels")
            return
        problem = (
            f"the suite failed on a GPU: {content['failed']} tests"
            if content["failed"]
            else f"the kernels have changed since the GPU run of {content['date']}"
        )
    line = "!" * 88
    print(f"{line}\n!! {problem}\n!! run `make test-gpu` on a GPU and commit its record\n{line}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check")
    writer = commands.add_parser("write")
    writer.add_argument(
        "junit", type=Path, nargs="+", help="pytest's --junitxml files: a run, then repeated tests"
    )
    writer.add_argument("--commit", required=True)
    writer.add_argument("--record", type=Path, default=RECORD)
    arguments = parser.parse_args()
    if arguments.command == "check":
        check()
    else:
        write(arguments.junit, arguments.commit, arguments.record)


if __name__ == "__main__":
    main()
