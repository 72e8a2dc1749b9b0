#include "launch/instances.h"

#include <cuda_runtime.h>

#include <atomic>
#include <vector>

#include "launch/instance_rows.h"

namespace jca {

const char* name(Direction direction) {
  switch (direction) {
    case Direction::kForward:
      return "fwd";
    case Direction::kBackward:
      return "bwd";
    case Direction::kDecode:
      return "decode";
    case Direction::kDq:
      return "dq";
    case Direction::kDbias:
      return "dbias";
  }
  return "?";
}

const char* name(Arithmetic arithmetic) {
  switch (arithmetic) {
    case Arithmetic::kFloat16:
      return "float16";
    case Arithmetic::kBfloat16:
      return "bfloat16";
    case Arithmetic::kFloat16Bfloat16:
      return "float16-bfloat16";
    case Arithmetic::kTf32:
      return "tf32";
    case Arithmetic::kThreeTf32:
      return "3xtf32";
  }
  return "?";
}

const char* name(Family family) { return family == Family::kSm80 ? "sm80" : "sm90"; }

std::span<const Instance> instances() {
  static const std::vector<Instance> table = [] {
    std::vector<Instance> rows;
    for (const InstanceRow& row :
         {
#ifdef JAX_COSINE_ATTN_SM90A
          sm90_fwd_float16(), sm90_fwd_bfloat16(), sm90_fwd_float16_bfloat16(),
          sm90_bwd_float16(), sm90_bwd_bfloat16(),
#endif
          sm80_fwd_float16(), sm80_fwd_bfloat16(), sm80_fwd_float16_bfloat16(), sm80_fwd_tf32(),
          sm80_fwd_3xtf32(),
          sm80_fwd_float16_unbounded(), sm80_fwd_bfloat16_unbounded(),
          sm80_fwd_tf32_unbounded(), sm80_fwd_3xtf32_unbounded(),
          sm80_bwd_float16(), sm80_bwd_bfloat16(), sm80_bwd_tf32(), sm80_bwd_3xtf32(),
          sm80_bwd_float16_unbounded(), sm80_bwd_bfloat16_unbounded(),
          sm80_bwd_tf32_unbounded(), sm80_bwd_3xtf32_unbounded(),
          sm80_decode_float16(), sm80_decode_bfloat16(),
          sm80_ordered_float16(), sm80_ordered_bfloat16(), sm80_ordered_tf32(),
          sm80_ordered_3xtf32()}) {
      rows.insert(rows.end(), row.begin(), row.end());
    }
    return rows;
  }();
  return table;
}

namespace {

std::atomic<int> shared_memory_limit{0}, selected_candidate{0};

int shared_memory() {
  if (const int limit = shared_memory_limit; limit > 0) return limit;
  int device = 0, bytes = 0;
  const bool known =
      cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess;
  return known ? bytes : 0;
}

// Whether the current device runs this kernel, its rows being of head_dim elements. What was compiled for
// sm_90a alone has a body there and nowhere else.
bool runs(const Instance& instance, int head_dim) {
  if (instance.family == Family::kSm80) return true;
  cudaFuncAttributes attributes{};
  return head_dim % 8 == 0 &&  // tensor maps want rows of a multiple of 16 bytes
         cudaFuncGetAttributes(&attributes, instance.kernel) == cudaSuccess &&
         attributes.binaryVersion == 90 && attributes.ptxVersion >= 90;  // no PTX of sm_80
}

}  // namespace

void limit_shared_memory(int bytes) { shared_memory_limit = bytes; }

void select_candidate(int number) { selected_candidate = number; }

const Instance* find_instance(Direction direction, Arithmetic arithmetic, bool unbounded,
                              int head_dim, int packed_rows, bool fused) {
  constexpr int kStatic = 384;  // bytes that kernels declare themselves (ptxas -v)
  const int available = shared_memory() - kStatic;
  const Instance* found = nullptr;
  for (const Instance& instance : instances()) {
    if (found != nullptr && instance.candidate == 0) break;  // past the candidates beside it
    if ((instance.candidate == 0 || instance.candidate == selected_candidate) &&
        instance.direction == direction && instance.arithmetic == arithmetic &&
        instance.unbounded == unbounded && instance.head_dim >= head_dim &&
        instance.block_m >= packed_rows && instance.fused == fused && instance.smem_bytes <= available &&
        runs(instance, head_dim)) {
      found = &instance;
    }
  }
  return found;
}

}  // namespace jca
