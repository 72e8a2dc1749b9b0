// Sums of what CTAs left as partial sums, in one order: no result depends on which CTA finished first.
#pragma once

#include "kernels/params.h"

namespace jca {

constexpr int kSumThreads = 256;

// dscale [dscale_batch, N], one CTA an entry, from partials [batch, N, blocks]. In float64: rows of both
// signs leave a sum much smaller than its parts.
__global__ void __launch_bounds__(kSumThreads) sum_dscale(const float* partials, float* dscale, int batch,
                                                          int dscale_batch, int num_heads, int blocks) {
  const int e = blockIdx.x / num_heads, head = blockIdx.x % num_heads;
  const int64_t count = int64_t((batch - e + dscale_batch - 1) / dscale_batch) * blocks;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kSumThreads) {
    const int64_t b = e + i / blocks * dscale_batch;
    sum += partials[(b * num_heads + head) * blocks + i % blocks];
  }
  __shared__ double of_warp[kSumThreads / 32];
#pragma unroll
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffff, sum, d);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kSumThreads / 32; ++w) sum += of_warp[w];
    dscale[blockIdx.x] = float(sum);
  }
}

// sums [size] from partials [slices, size].
__global__ void __launch_bounds__(kSumThreads)
    sum_slices(const float* partials, float* sums, int64_t size, int slices) {
  const int64_t i = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
  if (i >= size) return;
  float sum = 0.f;
  for (int slice = 0; slice < slices; ++slice) sum += partials[slice * size + i];
  sums[i] = sum;
}

// sums [size] from the float64 sums of BiasGradient::wide.
__global__ void __launch_bounds__(kSumThreads) round_sums(const double* wide, float* sums, int64_t size) {
  const int64_t i = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
  if (i < size) sums[i] = float(wide[i]);
}

// drelative_bias [., 1|N, T + S - 1] from DbiasParams::partials: a diagonal of pairs crosses the blocks of
// two neighbouring block diagonals, or of one where it is theirs.
__global__ void __launch_bounds__(kSumThreads)
    sum_diagonals(const Problem p, const float* partials, const BiasGradient drelative) {
  const int entries = p.seqlen_q + p.seqlen_k - 1;
  const int heads_own = drelative.stride_head == 0 ? 1 : p.num_heads;
  const int64_t id = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
  if (id >= drelative.batch * heads_own * entries) return;
  const int entry = int(id % entries), head = int(id / entries % heads_own);
  const BlockDiagonals blocks(p);
  float sum = 0.f;
  for (int64_t b = id / entries / heads_own; b < p.batch; b += drelative.batch) {
    // The diagonal of query less key: block diagonal `lower` holds it from its main diagonal on.
    const int diagonal = entry - (p.kv_lengths(b) - p.q_lengths(b)) - (p.seqlen_q - 1);
    const int within = diagonal & (kBiasBlock - 1);
    const int lower = (diagonal - within) / kBiasBlock - blocks.first();
    for (int h = head; h < p.num_heads; h += heads_own) {
      const float* of_head = partials + (b * p.num_heads + h) * blocks.count() * (2 * kBiasBlock);
      if (lower >= 0 && lower < blocks.count()) {
        sum += of_head[int64_t(lower) * (2 * kBiasBlock) + kBiasBlock - 1 + within];
      }
      if (within > 0 && lower + 1 >= 0 && lower + 1 < blocks.count()) {
        sum += of_head[int64_t(lower + 1) * (2 * kBiasBlock) + within - 1];
      }
    }
  }
  drelative.data[id] = sum;
}

}  // namespace jca
