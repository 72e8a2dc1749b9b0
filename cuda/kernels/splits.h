// Keys of a row that several CTAs share out, and the sum of what they leave. Logits are bounded,
// P = exp(S - c) has the same constant c everywhere, and so partial results are plain sums.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/lse.h"
#include "kernels/visible.h"
#include "ptx/grid.h"

namespace jca {

constexpr int kShareKeys = 64;  // shares are whole blocks of so many

// Which keys CTA `split` of a (batch, kv head) takes. They share out what the entry's rows can see, not S;
// of few keys some CTAs get none.
struct KeyShares {
  int first, last, each;

  __device__ KeyShares(const Visible& visible, int seqlen_q, int splits)
      : first(visible.k_begin(0) / kShareKeys * kShareKeys), last(visible.k_end(0, seqlen_q)) {
    const int blocks = max(0, (last - first + kShareKeys - 1) / kShareKeys);
    each = max((blocks + splits - 1) / splits * kShareKeys, kMinSplitKeys);
  }
  __device__ int begin(int split) const { return first + split * each; }
  __device__ int end(int split) const { return min(begin(split) + each, last); }
  // The first CTA leaves a result in any case.
  __device__ bool has_result(int split) const { return split == 0 || begin(split) < last; }
  __device__ int results() const { return max(1, (last - first + each - 1) / each); }
};

// Elements h ... h + 3 of a row of out from the sums of P v and P, and, with the first, its lse: the row
// counts as they lie there.
template <typename T>
__device__ inline void write_quotient(const DecodeParams& params, T* out, int64_t row, int h, float4 o,
                                      float l) {
  const bool live = l > 0.f;
  if (h == 0) {
    const SplitLog lse = live ? log_of_sum(l, params.shift) : SplitLog{-INFINITY, 0.f};
    params.lse[row] = lse.high;
    params.lse_low[row] = lse.low;
  }
  // A dead row is zero even where a live key of another row holds inf: P = 0 made that NaN.
  const float inverse = 1.f / l;
  alignas(8) const T x[4] = {T(live ? o.x * inverse : 0.f), T(live ? o.y * inverse : 0.f),
                             T(live ? o.z * inverse : 0.f), T(live ? o.w * inverse : 0.f)};
  *reinterpret_cast<uint2*>(out + h) = reinterpret_cast<const uint2&>(x);
}

constexpr int kSplitThreads = 256, kSplitLoads = 8;  // at most, and of a thread in flight

// A CTA adds up the partial results of a row, the threads of a slice every `slices`-th of them: x of the
// block is four of their columns, y the slice. Grid: x = B, y = N, z = T. It may start while the CTAs that
// it waits for still run.
template <typename T>
__global__ void __launch_bounds__(kSplitThreads, 4) sum_splits(const DecodeParams params) {
  const Problem& p = params.problem;
  const int b = blockIdx.x, head = blockIdx.y, i = blockIdx.z;
  const int chunk = threadIdx.x, chunks = blockDim.x;  // the last holds the sum of P
  const int slice = threadIdx.y, slices = blockDim.y;
  __shared__ int shared_count;
  __shared__ T* out;
  if (chunk == 0 && slice == 0) {
    shared_count = KeyShares(Visible(p, b), p.seqlen_q, params.splits).results();
    out = params.out.head<T>(b, head).row(i);
  }
  __syncthreads();
  const int count = shared_count;
  const int64_t row = (int64_t(b) * p.num_heads + head) * p.seqlen_q + i;
  const float4* part =
      reinterpret_cast<const float4*>(params.partials) + (row * params.splits + slice) * chunks + chunk;

  const auto add = [](float4& total, const float4& x) {
    total = {total.x + x.x, total.y + x.y, total.z + x.z, total.w + x.w};
  };
  ptx::wait_for_prerequisite_grids();
  float4 total{0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
  for (int split = slice; split < count; split += kSplitLoads * slices) {
    float4 parts[kSplitLoads];
#pragma unroll
    for (int load = 0; load < kSplitLoads; ++load) {
      // Past L1: written while this CTA was there.
      parts[load] = split + load * slices < count ? __ldcg(part) : float4{0.f, 0.f, 0.f, 0.f};
      part += slices * chunks;
    }
#pragma unroll
    for (const float4& x : parts) add(total, x);
  }
  __shared__ float4 totals[kSplitThreads];
  totals[slice * chunks + chunk] = total;
  __syncthreads();
  if (slice > 0 || chunk == chunks - 1) return;
  float l = totals[chunks - 1].x;
#pragma unroll 2
  for (int other = 1; other < slices; ++other) {
    add(total, totals[other * chunks + chunk]);
    l += totals[other * chunks + chunks - 1].x;
  }
  write_quotient(params, out, row, 4 * chunk, total, l);
}

}  // namespace jca
