// The extension module: FFI targets as capsules, and what was built. Holds no kernels, so that one
// shared library serves every Python version.
#include <pybind11/pybind11.h>

#include <type_traits>

#include "ffi/attention.h"
#include "launch/instances.h"

namespace py = pybind11;

namespace {

template <typename Handler>
py::capsule capsule(Handler* handler) {
  static_assert(std::is_invocable_r_v<XLA_FFI_Error*, Handler, XLA_FFI_CallFrame*>,
                "not an XLA FFI handler");
  return py::capsule(reinterpret_cast<void*>(handler));
}

py::dict registrations() {
  py::dict targets;
  targets["jax_cosine_attn_fwd"] = capsule(&jca::jax_cosine_attn_fwd);
  targets["jax_cosine_attn_bwd"] = capsule(&jca::jax_cosine_attn_bwd);
  return targets;
}

py::dict build_info() {
  py::dict info;
  info["architectures"] = JAX_COSINE_ATTN_ARCHITECTURES;
  info["cuda"] = JAX_COSINE_ATTN_CUDA_VERSION;
  info["jaxlib"] = JAX_COSINE_ATTN_JAXLIB_VERSION;
  info["ffi_api"] = std::to_string(XLA_FFI_API_MAJOR) + "." + std::to_string(XLA_FFI_API_MINOR);
  return info;
}

py::list instances() {
  py::list rows;
  for (const jca::Instance& instance : jca::instances()) {
    py::dict row;
    row["direction"] = jca::name(instance.direction);
    row["arithmetic"] = jca::name(instance.arithmetic);
    row["family"] = jca::name(instance.family);
    row["unbounded"] = instance.unbounded;
    row["small"] = instance.small;
    row["raw"] = instance.raw;
    row["makes_keys"] = instance.makes_keys;
    row["head_dim"] = instance.head_dim;
    row["block_m"] = instance.block_m;
    row["block_n"] = instance.block_n;
    row["smem_bytes"] = instance.smem_bytes;
    row["stages"] = instance.stages;
    row["key_stages"] = instance.key_stages;
    row["candidate"] = instance.candidate;
    rows.append(row);
  }
  return rows;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.def("registrations", &registrations, "FFI target name -> capsule of its handler.");
  m.def("build_info", &build_info, "What the kernels were built with.");
  m.def("limit_shared_memory", &jca::limit_shared_memory,
        "For tests: chooses kernels as on a GPU with this many bytes for a CTA; 0: as the device says.");
  m.def("select_candidate", &jca::select_candidate,
        "For benchmarks/tune.py: takes this candidate where there is one; 0: the shipped kernels.");
  m.def("instances", &instances, "The launch table: one dict for each compiled kernel.");
}
