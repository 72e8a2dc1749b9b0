// The pre-pass over masks and segments: one warp condenses one cell.
#pragma once

#include "kernels/params.h"

namespace jca {

constexpr int kCellThreads = 256;

// Extents of the mask's own axes, 1 where it is broadcast.
struct MaskCellParams {
  Mask mask;
  int64_t heads_and_batch;
  int heads, rows, cols;
};

__global__ void __launch_bounds__(kCellThreads) condense_mask(const MaskCellParams params) {
  const Mask& mask = params.mask;
  const int64_t cell = int64_t(blockIdx.x) * (kCellThreads / 32) + threadIdx.x / 32;
  const int64_t cells = int64_t(mask.cell_rows) * mask.cell_cols;
  if (cell >= params.heads_and_batch * cells) return;
  const int64_t bh = cell / cells;
  const int row = int(cell % cells / mask.cell_cols), col = int(cell % mask.cell_cols);
  const int lane = threadIdx.x % 32, j = col * kCellCols + lane;
  const uint8_t* data = mask.data + bh / params.heads * mask.stride_batch +
                        bh % params.heads * mask.stride_head + j * mask.stride_col;
  bool allowed = false, forbidden = false;
  if (j < params.cols) {
    const int end = min((row + 1) * kCellRows, params.rows);
#pragma unroll 4
    for (int i = row * kCellRows; i < end; ++i) {
      const bool value = data[i * mask.stride_row] != 0;
      allowed = allowed || value;
      forbidden = forbidden || !value;
    }
  }
  const bool any = __any_sync(0xffffffff, allowed), not_all = __any_sync(0xffffffff, forbidden);
  if (lane == 0) mask.cell_data[cell] = (any ? kSomeAllowed : 0) | (not_all ? kSomeForbidden : 0);
}

__global__ void __launch_bounds__(kCellThreads) condense_segments(const Segments segments) {
  const int64_t cell = int64_t(blockIdx.x) * (kCellThreads / 32) + threadIdx.x / 32;
  if (cell >= segments.batch.size * segments.cells()) return;
  const int32_t* ids = segments.data + cell / segments.cells() * segments.seqlen;
  const int first = int(cell % segments.cells()) * segments.cell;
  const int last = min(first + segments.cell, segments.seqlen) - 1;
  int least = INT32_MAX, most = INT32_MIN;
  for (int i = first + int(threadIdx.x) % 32; i <= last; i += 32) {
    least = min(least, ids[i]);
    most = max(most, ids[i]);
  }
  least = __reduce_min_sync(0xffffffff, least);
  most = __reduce_max_sync(0xffffffff, most);
  if (threadIdx.x % 32 == 0) segments.ranges[cell] = {least, most};
}

}  // namespace jca
