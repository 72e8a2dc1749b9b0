// Tensor maps of row tensors, as the kernels for sm_90 read and write them.
#pragma once

#include "launch/attention.h"

namespace jca {

// `rows` as a tensor (H, seqlen, heads, batch entries) of 16-bit elements of `type`, in boxes of 64 columns
// by box_rows rows with the 128-byte swizzle. H must be a multiple of 8. CUDA Driver API,
// "cuTensorMapEncodeTiled".
Status make_tensor_map(CUtensorMap* map, const char* what, const Rows& rows, FloatType type, int head_dim,
                       int seqlen, int heads, int box_rows);

}  // namespace jca
