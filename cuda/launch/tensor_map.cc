#include "launch/tensor_map.h"

#include <algorithm>

namespace jca {
namespace {

// Found at run time: the library links no driver, so that it loads where there is none.
using Encode = decltype(&cuTensorMapEncodeTiled);
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                             cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess
             ? reinterpret_cast<Encode>(function)
             : nullptr;
}

}  // namespace

Status make_tensor_map(CUtensorMap* map, const char* what, const Rows& rows, FloatType type, int head_dim,
                       int seqlen, int heads, int box_rows) {
  static const Encode encode = find_encode();
  if (encode == nullptr) return {std::string(what) + ": the driver has no cuTensorMapEncodeTiled"};
  const cuuint64_t sizes[] = {cuuint64_t(head_dim), cuuint64_t(seqlen), cuuint64_t(heads),
                              cuuint64_t(rows.batch.size)};
  // In bytes, of all axes but the first. Those of axes of one entry are never used, but must be valid.
  const auto stride = [](int64_t elements) { return cuuint64_t(std::max<int64_t>(16, 2 * elements)); };
  const cuuint64_t strides[] = {stride(rows.stride_row), stride(rows.stride_head),
                                stride(rows.stride_batch)};
  const cuuint32_t box[] = {64, cuuint32_t(box_rows), 1, 1}, steps[] = {1, 1, 1, 1};
  const CUresult result =
      encode(map,
             type == FloatType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                         : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
             4, rows.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return {};
  return {std::string(what) + ": cuTensorMapEncodeTiled failed with " + std::to_string(int(result)) +
          " for (" + std::to_string(rows.batch.size) + ", " + std::to_string(heads) + ", " +
          std::to_string(seqlen) + ", " + std::to_string(head_dim) + ")"};
}

}  // namespace jca
