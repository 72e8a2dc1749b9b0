// Which keys a query row may see, and which blocks of keys a block of rows needs: one definition for
// every kernel. Query i of batch entry b stands at position i + (S_b - T_b) among the keys; T_b > T means
// that the T rows are the first of a longer sequence.
// A key below is one of those that a list of keys holds, where there is one.
//
// Lengths, causal and windows are intervals and cost a few comparisons. Masks and segments are data: a
// pre-pass condenses them into cells of kCellRows x kCellCols pairs, so that a block in which nothing
// may be attended is never visited, and one in which everything may reads neither.
#pragma once

#include "kernels/params.h"

namespace jca {

// Bit l: whether begin <= first + l < end.
__device__ inline unsigned bits_between(int begin, int end, int first) {
  const auto from = [](int x) { return __funnelshift_lc(0u, ~0u, max(0, min(32, x))); };
  return from(begin - first) & ~from(end - first);
}

struct BlockKind {
  bool any, all;  // some pair, every pair of the block is allowed
};

// Least and largest id of the cells that positions first ... last touch.
template <int kCell>
__device__ inline int2 id_range(const int2* cells, int first, int last) {
  int2 all = cells[first / kCell];
  for (int c = first / kCell + 1; c <= last / kCell; ++c) {
    all = {min(all.x, cells[c].x), max(all.y, cells[c].y)};
  }
  return all;
}

// Of one batch entry. Kernels keep it in shared memory: it is needed between blocks and in those that
// hold forbidden pairs, and registers are scarce in between.
struct Visible {
  int b;
  int seqlen_q;    // min(T_b, T)
  int seqlen_k;    // keys below S_b
  int position_k;  // keys stand below it: S_b, or where a prefix of them ends
  int offset;      // S_b - T_b
  int left, right;
  // What the operands hold for this entry, null without them. Batch indices cost divisions.
  const uint8_t* mask_cells;
  const uint32_t* mask_bits;
  const int32_t *ranks, *keys;
  const int32_t *q_ids, *kv_ids;
  const int2 *q_ranges, *kv_ranges;

  Visible() = default;
  __device__ Visible(const Problem& p, int b)
      : b(b),
        seqlen_q(p.q_lengths(b)),
        seqlen_k(p.kv_lengths(b)),
        position_k(seqlen_k),
        offset(seqlen_k - p.q_lengths.of_sequence(b)),
        left(p.left),
        right(p.right),
        mask_cells(nullptr),
        mask_bits(nullptr),
        ranks(nullptr),
        keys(nullptr),
        q_ids(nullptr),
        kv_ids(nullptr),
        q_ranges(nullptr),
        kv_ranges(nullptr) {
    if (p.mask.data != nullptr) {
      const int64_t words = p.mask.batch(b) * p.mask.heads * p.mask.cell_cols();
      mask_bits = p.mask.bits + words * p.mask.rows;
      if (p.mask.keys == nullptr) {
        mask_cells = p.mask.cells + words * p.mask.cell_rows();
      } else {
        ranks = p.mask.ranks_of(b);
        keys = p.mask.keys_of(b);
        seqlen_k = rank(position_k);
        // A list that is a prefix, as padding at the end leaves, is not worth its look-ups.
        if (is_prefix(keys, seqlen_k)) {
          keys = nullptr;
          position_k = seqlen_k;
        }
      }
    }
    if (p.q_segments.data != nullptr) {
      const int64_t q = p.q_segments.batch(b), kv = p.kv_segments.batch(b);
      q_ids = p.q_segments.data + q * p.seqlen_q;
      kv_ids = p.kv_segments.data + kv * p.seqlen_k;
      q_ranges = p.q_segments.ranges + q * p.q_segments.cells();
      kv_ranges = p.kv_segments.ranges + kv * p.kv_segments.cells();
    }
  }

  // Called by every thread.
  __device__ static void init(Visible& shared, const Problem& p, int b) {
    if (threadIdx.x == 0) shared = Visible(p, b);
    __syncthreads();
  }

  // The entry of relative_bias for row 0 and key 0: S_b - min(T_b, T) + T - 1.
  __device__ int first_relative(const Problem& p) const {
    return offset + max(p.q_lengths.of_sequence(b), p.seqlen_q) - 1;
  }
  // The position of key j, and the keys before a position.
  __device__ int position(int j) const { return keys == nullptr ? j : keys[j]; }
  __device__ int rank(int position) const {
    if (keys == nullptr) return position;
    const unsigned before = (1u << (position % 32)) - 1;
    return ranks[position / 32] + (before == 0 ? 0 : __popc(mask_bits[position / 32] & before));
  }

  // Position alone, without mask and segments: keys [first_key, end_key) are seen by row i.
  __device__ int first_key(int i) const { return rank(max(0, min(position_k, i + offset - left))); }
  __device__ int end_key(int i) const {
    return i < seqlen_q ? rank(max(0, min(position_k, i + offset + right + 1))) : 0;
  }

  // Keys [k_begin, k_end) can be seen by rows [i0, i1), as far as position tells.
  __device__ int k_begin(int i0) const { return first_key(i0); }
  __device__ int k_end(int i0, int i1) const {
    return i0 < seqlen_q ? end_key(min(i1, seqlen_q) - 1) : 0;
  }
  // Rows [q_begin, q_end) can see keys [j0, j1).
  __device__ int q_begin(int j0) const {
    return j0 < seqlen_k ? max(0, position(j0) - offset - right) : 0;
  }
  __device__ int q_end(int j0, int j1) const {
    const int last = min(j1, seqlen_k) - 1;
    return j0 > last ? 0 : max(0, min(seqlen_q, position(last) - offset + left + 1));
  }

  // Bits of the mask: row i, keys 32 c ... 32 c + 31.
  __device__ unsigned mask_word(const Mask& mask, int head, int i, int c) const {
    const int cols = mask.cell_cols();
    const int64_t column = (mask.heads == 1 ? 0 : head) * cols + min(c, cols - 1);
    return mask_bits[column * mask.rows + min(i, mask.rows - 1)];
  }
  // CellBits of all cells that rows i0 ... i1 and keys j0 ... j1 touch.
  __device__ unsigned cell_bits(const Mask& mask, int head, int i0, int i1, int j0, int j1) const {
    const int rows = mask.cell_rows(), cols = mask.cell_cols();
    const uint8_t* cells = mask_cells + int64_t(mask.heads == 1 ? 0 : head) * rows * cols;
    unsigned found = 0;
    for (int r = min(i0 / kCellRows, rows - 1); r <= min(i1 / kCellRows, rows - 1); ++r) {
      for (int c = min(j0 / kCellCols, cols - 1); c <= min(j1 / kCellCols, cols - 1); ++c) {
        found |= cells[int64_t(r) * cols + c];
      }
    }
    return found;
  }

  // Which of keys 32 c ... 32 c + 31 row i may attend as far as position tells.
  __device__ unsigned in_range(int i, int c) const {
    return bits_between(first_key(i), end_key(i), 32 * c);
  }
  // The same with the mask.
  __device__ unsigned allowed(const Problem& p, int head, int i, int c) const {
    return in_range(i, c) & (mask_cells == nullptr ? ~0u : mask_word(p.mask, head, i, c));
  }
  __device__ bool in_one_segment(int i, int j) const { return q_ids == nullptr || q_ids[i] == kv_ids[j]; }
  __device__ bool is_allowed(const Problem& p, int head, int i, int j) const {
    return allowed(p, head, i, j / 32) >> (j % 32) & 1 && in_one_segment(i, j);
  }

  // The block of rows [i0, i1) and keys [j0, j1).
  __device__ BlockKind block(const Problem& p, int head, int i0, int i1, int j0, int j1) const {
    const int last_i = min(i1, seqlen_q) - 1, last_j = min(j1, seqlen_k) - 1;
    if (i0 > last_i || j0 > last_j) return {false, false};
    const int nearest = position(j0) - last_i - offset;
    const int farthest = position(last_j) - i0 - offset;
    BlockKind kind{farthest >= -left && nearest <= right,
                   i1 <= seqlen_q && j1 <= seqlen_k && nearest >= -left && farthest <= right};
    if (kind.any && q_ranges != nullptr) {
      const int2 q = id_range<kCellRows>(q_ranges, i0, last_i);
      const int2 k = id_range<kCellCols>(kv_ranges, j0, last_j);
      kind.any = q.y >= k.x && k.y >= q.x;
      kind.all = kind.all && q.x == q.y && k.x == k.y && q.x == k.x;
    }
    if (kind.any && mask_cells != nullptr) {
      const unsigned found = cell_bits(p.mask, head, i0, last_i, j0, last_j);
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
  int end;

  // The first block of first ... last - 1, or -1. kind_of(block) is its BlockKind.
  template <class KindOf>
  __device__ int seek(int first, int last, KindOf kind_of) {
    __syncwarp();
    end = last;
    __syncwarp();
    return seek(first, kind_of);
  }
  // The one after `block`, or -1.
  template <class KindOf>
  __device__ int next(int block, KindOf kind_of) {
    const unsigned rest = any >> (block & 31) >> 1;
    return rest ? block + __ffs(rest) : seek((block & ~31) + 32, kind_of);
  }
  __device__ bool is_all(int block) const { return all >> (block & 31) & 1; }

 private:
  template <class KindOf>
  __device__ int seek(int first, KindOf kind_of) {
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
};

// Whether keys below seqlen_k may be unseen by every row of the sequence.
__device__ inline bool may_leave_dead_keys(const Problem& p) {
  return (p.mask.data != nullptr && p.mask.keys == nullptr) || p.q_segments.data != nullptr ||
         p.left < kUnlimited ||
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

// Blocks of a fragment's columns whose bits are within one word.
template <int kN>
constexpr int kBlocksPerWord = kN < 4 ? kN : 4;

// Keys [x, y) that each of a thread's rows sees as far as position tells.
template <int kM>
__device__ inline void find_ranges(int2 (&ranges)[kM][2], const Visible& visible, FragmentAt at) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = at.row_of(m, 2 * half);
      ranges[m][half] = {visible.first_key(i), visible.end_key(i)};
    }
  }
}

// What masks and segments tell of the pairs in blocks n0 ... n0 + kBlocksPerWord - 1: bit j % 32 of
// words[m][half], whether row_of(m, 2 * half) may attend key j. Rows and keys past the end read the last one:
// ranges hide them. The words of a mask are not looked at, and may still be on their way.
template <int kN, int kM>
__device__ inline void find_allowed(unsigned (&words)[kM][2], const Problem& p, const Visible& visible,
                                    int head, FragmentAt at, int n0) {
  const int j = at.col_of(n0, 0);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      words[m][half] = visible.mask_cells == nullptr
                           ? ~0u
                           : visible.mask_word(p.mask, head, at.row_of(m, 2 * half), j / 32);
    }
  }
  if (visible.q_ids != nullptr) {
    int ids[kM][2];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        ids[m][half] = visible.q_ids[min(at.row_of(m, 2 * half), p.seqlen_q - 1)];
      }
    }
    // Rolled: the ids of all keys at once would take their registers.
#pragma unroll 1
    for (int n = 0; n < kBlocksPerWord<kN>; ++n) {
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        const int id = visible.kv_ids[min(at.col_of(n0 + n, x), p.seqlen_k - 1)];
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            if (ids[m][half] != id) words[m][half] &= ~(1u << (j % 32 + n * 8 + x));
          }
        }
      }
    }
  }
}

// Logits of pairs that may not be attended become -inf, in the blocks n0 ... that `words` are of.
template <int kM, int kN>
__device__ inline void hide(float (&s)[kM][kN][4], const unsigned (&words)[kM][2],
                            const int2 (&ranges)[kM][2], FragmentAt at, int n0) {
  const int j = at.col_of(n0, 0);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int2 range = ranges[m][half];
      const unsigned word = (words[m][half] & bits_between(range.x, range.y, j / 32 * 32)) >> (j % 32);
#pragma unroll
      for (int n = 0; n < kBlocksPerWord<kN>; ++n) {
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          if (!(word >> (n * 8 + x) & 1)) s[m][n0 + n][2 * half + x] = -INFINITY;
        }
      }
    }
  }
}
template <int kM, int kN>
__device__ inline void hide(float (&s)[kM][kN][4], const Problem& p, const Visible& visible, int head,
                            FragmentAt at) {
  static_assert(kN % kBlocksPerWord<kN> == 0);
  int2 ranges[kM][2];
  find_ranges(ranges, visible, at);
#pragma unroll
  for (int n0 = 0; n0 < kN; n0 += kBlocksPerWord<kN>) {
    unsigned words[kM][2];
    find_allowed<kN>(words, p, visible, head, at, n0);
    hide(s, words, ranges, at, n0);
  }
}

// The same for a fragment of the transposed logits: rows of `at` are keys, all of them within one word of the
// mask, and columns query rows.
template <int kN>
__device__ inline void hide_transposed(float (&s)[kN][4], const Problem& p, const Visible& visible, int head,
                                       FragmentAt at) {
  constexpr int kPart = 4;  // blocks of columns within one word
  static_assert(kN % kPart == 0);
  const int j = at.row_of(0, 0), c = j / 32, bit = j % 32;  // and key j + 8
  const int begin[] = {visible.q_begin(j), visible.q_begin(j + 8)};
  const int end[] = {visible.q_end(j, j + 1), visible.q_end(j + 8, j + 9)};
#pragma unroll
  for (int n0 = 0; n0 < kN; n0 += kPart) {
    const int i = at.col_of(n0, 0);
    // From the bit of row i on.
    unsigned words[2] = {bits_between(begin[0], end[0], i), bits_between(begin[1], end[1], i)};
    const auto for_each_row = [&](auto f) {
#pragma unroll
      for (int n = 0; n < kPart; ++n) {
#pragma unroll
        for (int x = 0; x < 2; ++x) f(min(at.col_of(n0 + n, x), p.seqlen_q - 1), n * 8 + x);
      }
    };
    if (visible.mask_cells != nullptr) {
      for_each_row([&](int row, int at_bit) {
        const unsigned word = visible.mask_word(p.mask, head, row, c) >> bit;
        words[0] &= ~((~word & 1) << at_bit);
        words[1] &= ~((~word >> 8 & 1) << at_bit);
      });
    }
    if (visible.q_ids != nullptr) {
      const int ids[2] = {visible.kv_ids[min(j, p.seqlen_k - 1)], visible.kv_ids[min(j + 8, p.seqlen_k - 1)]};
      for_each_row([&](int row, int at_bit) {
        const int id = visible.q_ids[row];
        if (ids[0] != id) words[0] &= ~(1u << at_bit);
        if (ids[1] != id) words[1] &= ~(1u << at_bit);
      });
    }
#pragma unroll
    for (int n = 0; n < kPart; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (!(words[e / 2] >> (n * 8 + e % 2) & 1)) s[n0 + n][e] = -INFINITY;
      }
    }
  }
}

}  // namespace jca
