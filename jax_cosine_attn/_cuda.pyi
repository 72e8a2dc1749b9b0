"""The compiled extension (cuda/bindings.cc)."""

from typing import Any

def registrations() -> dict[str, Any]:
    """FFI target name -> capsule of its handler."""

def build_info() -> dict[str, str]:
    """Architectures, CUDA version, and the jaxlib and FFI API of the headers."""

def instances() -> list[dict[str, Any]]:
    """The launch table: direction, arithmetic, unbounded, head_dim, block sizes, shared memory."""
