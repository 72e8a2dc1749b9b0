"""The compiled extension (cuda/bindings.cc)."""

from typing import Any

def registrations() -> dict[str, Any]:
    """FFI target name -> capsule of its handler."""

def build_info() -> dict[str, str]:
    """Architectures, CUDA version, and the jaxlib and FFI API of the headers."""

def limit_shared_memory(bytes: int, /) -> None:
    """For tests: chooses kernels as if a CTA had this many bytes; 0: as the device says."""

def select_candidate(number: int, /) -> None:
    """For benchmarks/tune.py: takes the instances with this `candidate` where there are any and
    they fit; 0: the shipped ones."""

def instances() -> list[dict[str, Any]]:
    """The launch table: one dict for each compiled kernel."""
