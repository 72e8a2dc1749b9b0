// The pre-pass over masks and segments: one warp condenses one cell.
#pragma once

#include "kernels/params.h"
#include "ptx/grid.h"

namespace jca {

constexpr int kCellThreads = 256;

__global__ void __launch_bounds__(kCellThreads) condense_mask(const Mask mask) {
  const int64_t cell = int64_t(blockIdx.x) * (kCellThreads / 32) + threadIdx.x / 32;
  const int rows = mask.cell_rows(), cols = mask.cell_cols();
  const int64_t bh = cell / cols / rows;
  if (bh >= mask.batch.size * mask.heads) return;
  const int first_row = int(cell / cols % rows) * kCellRows, col = int(cell % cols);
  const int lane = threadIdx.x % 32, j = col * kCellCols + lane;
  const bool inside = mask.cols == 1 || j < mask.cols;
  const uint8_t* data = mask.data + bh / mask.heads * mask.stride_batch +
                        bh % mask.heads * mask.stride_head + (inside ? j : 0) * mask.stride_col;
  const unsigned all = __ballot_sync(0xffffffff, inside);
  unsigned some = 0, every = all;
  for (int i0 = first_row; i0 < min(first_row + kCellRows, mask.rows); i0 += 32) {
    unsigned word = 0;  // of row i0 + lane
#pragma unroll 8
    for (int r = 0; r < min(32, mask.rows - i0); ++r) {
      const unsigned row = __ballot_sync(0xffffffff, inside && data[(i0 + r) * mask.stride_row] != 0);
      if (lane == r) word = row;
      some |= row;
      every &= row;
    }
    if (i0 + lane < mask.rows) mask.bits[(bh * cols + col) * mask.rows + i0 + lane] = word;
  }
  if (lane == 0) {
    mask.cells[cell] = (some != 0 ? kSomeAllowed : 0) | (every != all ? kSomeForbidden : 0);
  }
}

constexpr int kListThreads = 1024;

// The keys of one entry of a mask over keys alone. A warp takes kWords words at a time.
__global__ void __launch_bounds__(kListThreads) list_keys(const Mask mask) {
  constexpr int kWarps = kListThreads / 32, kWords = 4;
  static_assert(kWarps == 32);
  ptx::launch_dependent_grids();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, words = mask.cell_cols();
  const uint8_t* data = mask.data + blockIdx.x * mask.stride_batch;
  uint32_t* bits = mask.bits + int64_t(blockIdx.x) * words;
  int32_t* ranks = mask.keys + int64_t(blockIdx.x) * mask.keys_size();
  int32_t* keys = ranks + words + 1;
  __shared__ int counts[kWarps];
  int total = 0;
  for (int first = 0; first < words; first += kWarps * kWords) {
    unsigned word[kWords];
    int count = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const int j = (first + warp * kWords + w) * 32 + lane;
      word[w] = __ballot_sync(0xffffffff, j < mask.cols && data[j * mask.stride_col] != 0);
      count += __popc(word[w]);
    }
    __syncthreads();  // the last counts have been read
    if (lane == 0) counts[warp] = count;
    __syncthreads();
    const int others = counts[lane];
    int rank = total + __reduce_add_sync(0xffffffff, lane < warp ? others : 0);
    total += __reduce_add_sync(0xffffffff, others);
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const int at = first + warp * kWords + w;
      if (at < words && lane == 0) {
        bits[at] = word[w];
        ranks[at] = rank;
      }
      if (word[w] >> lane & 1) keys[rank + __popc(word[w] & ((1u << lane) - 1))] = at * 32 + lane;
      rank += __popc(word[w]);
    }
  }
  if (threadIdx.x == 0) ranks[words] = total;
}

// Zeros in the rows of x and y of keys that are in no list or past the length: the kernels leave them as they
// are, with skips_prefix unless the list is a prefix. A CTA takes the 32 keys of a word of the mask. Grid:
// words * B.
template <typename T, typename Word>
__global__ void __launch_bounds__(kCellThreads)
    clear_unlisted(const Problem p, const Rows x, const Rows y, bool skips_prefix) {
  constexpr int kElems = sizeof(Word) / sizeof(T);
  const int words = p.mask.cell_cols(), word = blockIdx.x % words, b = blockIdx.x / words;
  const int first = 32 * word, length = p.kv_lengths(b), chunks = p.head_dim / kElems;
  unsigned kept = p.mask.bits[int64_t(p.mask.batch(b)) * words + word];
  if (first + 32 > length) kept &= length > first ? (1u << (length - first)) - 1 : 0;
  if (kept == 0xffffffff || (skips_prefix && is_prefix(p.mask.keys_of(b), p.mask.count_of(b)))) return;
  for (int i = threadIdx.x; i < 32 * p.num_heads_kv * chunks; i += kCellThreads) {
    const int j = i / chunks / p.num_heads_kv, head = i / chunks % p.num_heads_kv;
    if (kept >> j & 1 || first + j >= p.seqlen_k) continue;
    for (const Rows* rows : {&x, &y}) {
      reinterpret_cast<Word*>(rows->head<T>(b, head).row(first + j))[i % chunks] = Word{};
    }
  }
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
