// Which keys a query row may see, and which blocks of keys a block of rows needs: one definition for
// every kernel. Query i of batch entry b stands at position i + (S_b - T_b) among the keys.
//
// Lengths, causal and windows are intervals and cost a few comparisons. Masks and segments are data: a
// pre-pass condenses them into cells of kCellRows x kCellCols pairs, so that a block in which nothing
// may be attended is never visited, and one in which everything may reads neither.
#pragma once

#include "kernels/params.h"

namespace jca {

struct BlockKind {
  bool any, all;  // some pair, every pair of the block is allowed
};

// CellBits of all cells that rows i0 ... i1 and keys j0 ... j1 touch.
__device__ inline unsigned cell_bits(const Mask& mask, int b, int head, int i0, int i1, int j0, int j1) {
  const int last_row = mask.cell_rows - 1, last_col = mask.cell_cols - 1;
  const uint8_t* cells = mask.cell_data + (mask.batch(b) * mask.cell_heads + head % mask.cell_heads) *
                                              mask.cell_rows * mask.cell_cols;
  unsigned found = 0;
  for (int r = min(i0 / kCellRows, last_row); r <= min(i1 / kCellRows, last_row); ++r) {
    for (int c = min(j0 / kCellCols, last_col); c <= min(j1 / kCellCols, last_col); ++c) {
      found |= cells[r * mask.cell_cols + c];
    }
  }
  return found;
}

// Least and largest id of the cells that positions first ... last touch.
__device__ inline int2 id_range(const Segments& segments, int b, int first, int last) {
  const int2* cells = segments.ranges + segments.batch(b) * segments.cells();
  int2 all = cells[first / segments.cell];
  for (int c = first / segments.cell + 1; c <= last / segments.cell; ++c) {
    all = {min(all.x, cells[c].x), max(all.y, cells[c].y)};
  }
  return all;
}

// Of one batch entry. Kernels keep it in shared memory: it is needed between blocks and in those that
// hold forbidden pairs, and registers are scarce in between.
struct Visible {
  int b;
  int seqlen_q, seqlen_k;  // T_b, S_b
  int offset;              // S_b - T_b
  int left, right;

  // Called by every thread.
  __device__ static void init(Visible& shared, const Problem& p, int b) {
    if (threadIdx.x == 0) {
      const int seqlen_q = p.q_lengths(b), seqlen_k = p.kv_lengths(b);
      shared = {b, seqlen_q, seqlen_k, seqlen_k - seqlen_q, p.left, p.right};
    }
    __syncthreads();
  }

  // Position alone, without mask and segments: keys [first_key, end_key) are seen by row i.
  __device__ int first_key(int i) const { return max(0, i + offset - left); }
  __device__ int end_key(int i) const {
    return i < seqlen_q ? max(0, min(seqlen_k, i + offset + right + 1)) : 0;
  }
  __device__ bool in_range(int i, int j) const { return j >= first_key(i) && j < end_key(i); }

  // Keys [k_begin, k_end) can be seen by rows [i0, i1), as far as position tells.
  __device__ int k_begin(int i0) const { return first_key(i0); }
  __device__ int k_end(int i0, int i1) const {
    return i0 < seqlen_q ? end_key(min(i1, seqlen_q) - 1) : 0;
  }
  // Rows [q_begin, q_end) can see keys [j0, j1).
  __device__ int q_begin(int j0) const { return max(0, j0 - offset - right); }
  __device__ int q_end(int j0, int j1) const {
    const int last = min(j1, seqlen_k) - 1;
    return j0 > last ? 0 : max(0, min(seqlen_q, last - offset + left + 1));
  }

  // The block of rows [i0, i1) and keys [j0, j1).
  __device__ BlockKind block(const Problem& p, int head, int i0, int i1, int j0, int j1) const {
    const int last_i = min(i1, seqlen_q) - 1, last_j = min(j1, seqlen_k) - 1;
    if (i0 > last_i || j0 > last_j) return {false, false};
    const int nearest = j0 - last_i - offset, farthest = last_j - i0 - offset;
    BlockKind kind{farthest >= -left && nearest <= right,
                   i1 <= seqlen_q && j1 <= seqlen_k && nearest >= -left && farthest <= right};
    if (kind.any && p.q_segments.data != nullptr) {
      const int2 q = id_range(p.q_segments, b, i0, last_i), k = id_range(p.kv_segments, b, j0, last_j);
      kind.any = q.y >= k.x && k.y >= q.x;
      kind.all = kind.all && q.x == q.y && k.x == k.y && q.x == k.x;
    }
    if (kind.any && p.mask.data != nullptr) {
      const unsigned found = cell_bits(p.mask, b, head, i0, last_i, j0, last_j);
      kind.any = found & kSomeAllowed;
      kind.all = kind.all && !(found & kSomeForbidden);
    }
    return kind;
  }
};

// Walks over those of blocks 0 ... end - 1 that hold an allowed pair, upwards. Every warp walks for itself
// with a window of its own in shared memory: 32 blocks are looked at together, one a lane.
struct BlockWindow {
  unsigned any, all;  // bit i: of block (first & ~31) + i

  // The first block from `first` on, or -1. kind_of(block) is its BlockKind.
  template <class KindOf>
  __device__ int seek(int first, int end, KindOf kind_of) {
    while (first < end) {
      const int block = (first & ~31) + int(threadIdx.x) % 32;
      const BlockKind kind = block < end ? kind_of(block) : BlockKind{false, false};
      const unsigned some = __ballot_sync(0xffffffff, kind.any);
      const unsigned every = __ballot_sync(0xffffffff, kind.all);
      if (some >> (first & 31)) {
        __syncwarp();
        any = some;
        all = every;
        __syncwarp();
        return first + __ffs(some >> (first & 31)) - 1;
      }
      first = (first & ~31) + 32;
    }
    return -1;
  }
  // The one after `block`, or -1.
  template <class KindOf>
  __device__ int next(int block, int end, KindOf kind_of) {
    const unsigned rest = any >> (block & 31) >> 1;
    return rest ? block + __ffs(rest) : seek((block & ~31) + 32, end, kind_of);
  }
  __device__ bool is_all(int block) const { return all >> (block & 31) & 1; }
};

// Whether keys below seqlen_k may be unseen by every row.
__device__ inline bool may_leave_dead_keys(const Problem& p) {
  return p.mask.data != nullptr || p.q_segments.data != nullptr || p.left < kUnlimited ||
         p.bias.data != nullptr || p.relative_bias.data != nullptr;
}

// A warp's accumulator fragment: kM x kN blocks of [16, 8], the first at row i0 and key j0. Element e of
// block (m, n) of this thread stands at row_of(m, e), col_of(n, e).
struct FragmentAt {
  int i0, j0;
  __device__ FragmentAt(int i0, int j0)
      : i0(i0 + int(threadIdx.x) % 32 / 4), j0(j0 + 2 * (int(threadIdx.x) % 4)) {}
  __device__ int row_of(int m, int e) const { return i0 + m * 16 + e / 2 * 8; }
  __device__ int col_of(int n, int e) const { return j0 + n * 8 + e % 2; }
};

// Logits of pairs that may not be attended become -inf.
template <int kM, int kN>
__device__ inline void hide(float (&s)[kM][kN][4], const Problem& p, const Visible& visible, int head,
                            FragmentAt at) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = at.row_of(m, 2 * half);
      const int first = visible.first_key(i), end = visible.end_key(i);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          const int j = at.col_of(n, e);
          if (j < first || j >= end) s[m][n][e] = -INFINITY;
        }
      }
    }
  }
  if (p.q_segments.data == nullptr && p.mask.data == nullptr) return;

  // Rows and keys past the end read the last one; position has hidden them.
  const int last_i = p.seqlen_q - 1, last_j = p.seqlen_k - 1;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    // A rolled loop over bits: loads for all elements at once would take their registers.
    unsigned hidden = 0;
#pragma unroll 1
    for (int bit = 0; bit < kN * 4; ++bit) {
      const int i = min(at.row_of(m, bit % 4), last_i), j = min(at.col_of(bit / 4, bit % 4), last_j);
      bool forbidden = false;
      if (p.q_segments.data != nullptr) {
        forbidden = p.q_segments.row(visible.b)[i] != p.kv_segments.row(visible.b)[j];
      }
      if (p.mask.data != nullptr) {
        forbidden = forbidden || !p.mask.at(visible.b, head)[i * p.mask.stride_row +
                                                             j * p.mask.stride_col];
      }
      hidden |= unsigned(forbidden) << bit;
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (hidden >> (n * 4 + e) & 1) s[m][n][e] = -INFINITY;
      }
    }
  }
}

}  // namespace jca
