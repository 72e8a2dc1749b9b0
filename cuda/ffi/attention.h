// The FFI targets of the shared library.
#pragma once

#include "xla/ffi/api/c_api.h"

namespace jca {

extern "C" XLA_FFI_Error* jax_cosine_attn_fwd(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* jax_cosine_attn_bwd(XLA_FFI_CallFrame* call_frame);

}  // namespace jca
