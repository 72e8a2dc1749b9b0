// What a launcher hands to a kernel. Plain structs of pointers and extents; nothing here knows XLA.
//
// Letters as in the public API: B batch, T query length, S key length, N query heads, K key heads,
// H head dim; Hp = H rounded up to a multiple of 8, the row length of everything the pre-pass writes.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace jca {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLog2eLow = 1.4426950408889634 - kLog2e;  // what rounding to float32 took
constexpr float kLn2 = 0.6931471805599453f;
constexpr int kUnlimited = 1 << 30;  // side of a window that rules nothing out
constexpr float kMinNorm = 1e-6f;  // a slice below it counts as a zero row

// Batch entry b of the call reads entry (b / div) % size of an operand: how vmap shares an operand
// among mapped entries without a copy.
struct BatchIndex {
  int64_t size = 1;
  int64_t div = 1;
  // Both fit into 32 bits, where divisions are several times cheaper.
  __host__ __device__ int64_t operator()(int b) const { return unsigned(b) / unsigned(div) % unsigned(size); }
};

// [batch, rows, heads, H] tensor in either memory order; the last axis is contiguous.
struct Rows {
  void* data = nullptr;
  int64_t stride_batch = 0, stride_row = 0, stride_head = 0;  // in elements
  BatchIndex batch;

  // The rows of one head of one batch entry. Taken once by a kernel: the batch index costs divisions.
  template <typename T>
  struct Head {
    T* data;
    int stride;
    __device__ T* row(int i) const { return data + int64_t(i) * stride; }
  };
  template <typename T>
  __device__ Head<T> head(int b, int head) const {
    return {static_cast<T*>(data) + batch(b) * stride_batch + head * stride_head,
            static_cast<int>(stride_row)};
  }
};

// Per-batch lengths; without data every entry is `full`.
struct Lengths {
  const int32_t* data = nullptr;
  int full = 0;  // rows that the call has
  BatchIndex batch;

  // Of the sequence, whose first rows these may be, and of what the call has of it.
  __device__ int of_sequence(int b) const {
    if (data == nullptr) return full;
    const int length = data[batch(b)];
    return length < 0 ? 0 : length;
  }
  __device__ int operator()(int b) const {
    const int length = of_sequence(b);
    return length > full ? full : length;
  }
};

// Masks and segments are condensed into cells of this many rows and keys.
constexpr int kCellRows = 64, kCellCols = 32;
enum CellBits : uint8_t { kSomeAllowed = 1, kSomeForbidden = 2 };

// bool [., heads, rows, cols]: which pairs may be attended. Broadcast axes have extent 1 and stride 0.
// A pre-pass packs it, and kernels read what that wrote.
struct Mask {
  const uint8_t* data = nullptr;
  int64_t stride_batch = 0, stride_head = 0, stride_row = 0, stride_col = 0;
  BatchIndex batch;
  int heads = 1, rows = 1, cols = 1;
  uint8_t* cells = nullptr;  // scratch [., heads, cell_rows, cell_cols] of CellBits
  uint32_t* bits = nullptr;  // scratch [., heads, cell_cols, rows]: bit l of word (c, i): pair (i, 32 c + l)
  // Scratch [., cell_cols + 1 + cols], or null: of a mask over keys alone, how many keys it allows before
  // each word, and their list. Kernels then run over these keys as if there were no others.
  int32_t* keys = nullptr;

  __host__ __device__ int cell_rows() const { return (rows + kCellRows - 1) / kCellRows; }
  __host__ __device__ int cell_cols() const { return (cols + kCellCols - 1) / kCellCols; }
  __host__ __device__ int keys_size() const { return cell_cols() + 1 + cols; }
  // Of a batch entry of the call.
  __device__ const int32_t* ranks_of(int b) const { return keys + batch(b) * keys_size(); }
  __device__ const int32_t* keys_of(int b) const { return ranks_of(b) + cell_cols() + 1; }
  __device__ int count_of(int b) const { return ranks_of(b)[cell_cols()]; }
};

// Whether the first `count` keys of a list are those below `count`.
__device__ inline bool is_prefix(const int32_t* keys, int count) {
  return count == 0 || keys[count - 1] == count - 1;
}

// int32 [., L]: a pair is allowed only within one segment.
struct Segments {
  const int32_t* data = nullptr;
  int seqlen = 0, cell = 1;  // ids a cell
  BatchIndex batch;
  int2* ranges = nullptr;  // scratch [., cells]: least and largest id of each

  __host__ __device__ int cells() const { return (seqlen + cell - 1) / cell; }
};

enum class FloatType { kFloat16, kBfloat16, kFloat32 };

// Float [., 1|N, 1|T, 1|S] added to the logits. Broadcast axes have stride 0.
struct Bias {
  const void* data = nullptr;
  FloatType type = FloatType::kFloat32;
  int64_t stride_batch = 0, stride_head = 0, stride_row = 0, stride_col = 0;
  BatchIndex batch;
};

// float32 [., 1|N, T + S - 1] added at entry (i - j) + (S_b - min(T_b, T)) + (T - 1).
struct RelativeBias {
  const float* data = nullptr;
  int64_t stride_batch = 0, stride_head = 0;
  BatchIndex batch;
};

// Gradient of one of them, float32: strides as in the operand, batch entry b adds to b % batch.
struct BiasGradient {
  float* data = nullptr;
  // Or sums in float64, where an entry adds up thousands of parts in any order: scratch, zeroed.
  double* wide = nullptr;
  int64_t stride_batch = 0, stride_head = 0, stride_row = 0, stride_col = 0;
  int64_t batch = 1;
};

// float32 [., 1|N]. A broadcast axis has stride 0.
struct HeadScale {
  const float* data = nullptr;
  int64_t stride_batch = 0, stride_head = 0;
  BatchIndex batch;

  __device__ float operator()(int64_t b, int head) const {
    return data[batch(b) * stride_batch + head * stride_head];
  }
};

struct Problem {
  int batch, seqlen_q, seqlen_k, num_heads, num_heads_kv, head_dim, head_dim_padded;
  int groups;       // l2-norm slices of a head
  int left, right;  // row i sees keys j with -left <= j - i - (S_b - T_b) <= right
  bool l2norm;
  Lengths q_lengths, kv_lengths;  // T_b, which may exceed T, and S_b
  Mask mask;
  Segments q_segments, kv_segments;
  HeadScale scale;
  Bias bias;
  RelativeBias relative_bias;
};

struct NormParams {
  Problem problem;
  Rows x;        // [., L, heads, H] raw
  int seqlen, num_heads, batch;
  HeadScale fold;       // multiplied in per head; no data: the unit vectors alone
  bool log2_units;      // log2 e too
  Rows hat;             // [batch, heads, L, Hp], zeros past H
  float* inverse_norm;  // [batch, heads, L, groups], 0 for zero rows; may be null
  bool l2norm;
  bool listed = false;   // row j of hat is that of the list of keys of the mask, with zeros behind them
  bool skips_prefix = false;  // not where the list is a prefix of all keys
  int* zero = nullptr;   // set to 0, for the kernel after; may be null
};

struct FwdParams {
  Problem problem;
  // [., heads, L, Hp] unit rows. q_hat carries the scale and, where logits are bounded, log2 e: then P is
  // one exp2 away. With biases the logits stay in natural units, where adding one rounds as it does in the
  // formula.
  Rows q_hat, k_hat;
  Rows v;             // [., S, K, H]
  Rows out;           // [B, T, N, H]
  float* lse;         // [B, N, T] natural log
  float* lse_low;     // [B, N, T] what rounding took from lse
  float shift, shift_log2;  // c of P = exp(S - c), and times log2 e; unused with a running maximum
};

// Division by a number that the host knows, of x < 2^31: by a multiplication (Granlund and Montgomery 1994).
struct Divisor {
  unsigned divisor = 1, factor = 1, shift = 0;

  Divisor() = default;
  __host__ explicit Divisor(unsigned d) : divisor(d) {
    while (shift < 31 && (1u << shift) < d) ++shift;
    factor = static_cast<unsigned>((uint64_t{1} << (31 + shift)) / d + 1);
  }
  __device__ unsigned operator()(unsigned x) const { return uint64_t{x} * factor >> (31 + shift); }
};

// The same for the kernel that reads and writes through tensor maps: (H, L, heads, batch) of q or q^, of k^,
// v and out, in boxes of 64 columns by 64 rows of queries or a block of keys.
struct FwdTmaParams {
  CUtensorMap q_map, k_map, v_map, raw_v_map, out_map;
  Problem problem;
  BatchIndex q_batch, k_batch, v_batch, raw_v_batch;
  bool listed;    // k^ and v hold the listed keys alone, v none of a list that is a prefix: raw_v_map serves
  bool q_is_raw, k_is_raw;  // the maps are of q and k, not of what a pre-pass made of them
  float* lse;
  float* lse_low;
  float shift, shift_log2;
  int section;     // neighbouring (batch, head) whose tiles are taken together
  int* next_tile;  // counts those taken beyond the first of each CTA; zeroed
  // CTAs make k^ of raw k themselves, each a part for all: in boxes of kUnitKeys keys of one head, last keys
  // first, those of a section of heads together. made: how many of a block's are there, [entries of k^, K,
  // blocks]; null where k^ is there already. Both counters zeroed.
  CUtensorMap raw_k_map, unit_k_map;  // of such boxes
  int key_heads;                      // entries times K
  Divisor key_section, section_boxes, heads_kv;
  int boxes;       // of all sections, the last of which may have fewer heads than it has boxes for
  int* next_box;   // counts those taken
  int* made;
};
constexpr int kUnitKeys = 32;

// Scratch of the forward on Hopper: the two counters, and one of at least so many keys of each head.
constexpr int kCounters = 2, kCountedKeys = 64;

constexpr int kMinSplitKeys = 128;  // fewer are not worth a CTA of their own

struct DecodeParams {
  Problem problem;
  Rows q, k, v, out;        // raw
  float* lse;               // as in FwdParams
  float* lse_low;
  float shift, shift_log2;
  int splits;               // CTAs of a (batch, kv head)
  float* partials;          // [B, N, T, splits, H + 4], H sums of P v and that of P; unused with one split
};

// Rows of one (batch, head) in the per-row numbers of the backward, float32 [B, N, kRowStats, Tp].
// Tp is T rounded up to a multiple of every kBlockM.
enum RowStat {
  kLse,     // in the units of S, +inf in dead rows
  kLseLow,  // what rounding took from it
  kDelta,   // rowsum(dO * O) - dlse, 0 in dead rows
  kRowStats
};

struct RowStats {
  float* data = nullptr;
  int seqlen_padded = 0;

  __device__ float* row(int64_t bh, RowStat stat) const {
    return data + (bh * kRowStats + stat) * seqlen_padded;
  }
};

struct QueryParams {
  Problem problem;
  Rows q, out, dout;      // [., T, N, H]
  const float* lse;       // [B, N, T]
  const float* lse_low;   // [B, N, T]
  const float* dlse;      // [B, N, T] or null
  bool log2_units;        // of S in the kernel that reads stats
  Rows q_hat;             // [B, N, T, Hp]
  float* q_inverse_norm;  // [B, N, T, groups]
  RowStats stats;
  // What the kernels after add to becomes zero: so many 16 bytes of sums, row_sums or null, next_tile.
  uint4* sums;
  int64_t zeros;
  float2* row_sums;  // [B, N, T]
  int* next_tile;
};

struct BwdParams {
  Problem problem;
  Rows q_hat, k_hat, v, dout;
  Rows k_raw;                   // for the norm's backward in the dk epilogue
  const float* k_inverse_norm;  // [Bk, K, S, groups], of the rows of k^
  RowStats stats;
  // What CTAs add to by atomics, zeroed; null where the kernels of sm80/ordered.h find the same sums.
  // cosine_attn_dq_sm80 writes the first two, whatever they hold.
  void* dq_accum;  // [B, N, T, Hp] of Op::Accum: dS k^, without scale
  // [B, N, T] pairs, or null: sums over keys of dS and of P S, S without biases, for dscale.
  float2* row_sums;
  BiasGradient dbias, drelative_bias;
  Rows dk, dv;      // [B, S, K, H]
};

// dq_accum as the kernel for sm_90 has it: tiles of 16 rows by 8 columns, in which a thread's accumulators
// of a product are 16 neighbouring bytes and a warp's 512. T is rounded up to whole tiles.
struct DqTiles {
  static constexpr int kRows = 16, kCols = 8, kSize = kRows * kCols;
  __host__ __device__ static int64_t padded(int64_t rows) { return (rows + kRows - 1) / kRows * kRows; }
  // Elements before row i, a multiple of kRows, of head bh.
  __host__ __device__ static int64_t before(const Problem& p, int64_t bh, int i) {
    return (bh * padded(p.seqlen_q) + i) * p.head_dim_padded;
  }
  // Row i and columns 2 pair, 2 pair + 1 of a tile.
  __host__ __device__ static int pair(int i, int pair) { return (i % 8 * 4 + pair) * 4 + i / 8 * 2; }
};

// The same for the kernel that reads through tensor maps: (H, L, heads, batch) of q^, k^, v and dO, in boxes
// of 64 columns by a block of queries or keys.
struct BwdTmaParams {
  CUtensorMap q_map, k_map, raw_k_map, v_map, raw_v_map, dout_map;
  Problem problem;
  BatchIndex k_batch, v_batch, raw_v_batch;
  bool listed;  // as in FwdTmaParams
  // The kernel makes k^ of k itself, where l2norm asks for that, unless keys come from a list that is no
  // prefix.
  bool takes_raw_k;
  Rows k_raw;
  const float* k_inverse_norm;  // of k^ that a pre-pass made
  RowStats stats;
  float* dq_accum;  // in DqTiles
  float2* row_sums;
  Rows dk, dv;
  int section;     // neighbouring (batch, kv head) whose tiles are taken together
  int* next_tile;  // as in FwdTmaParams
};

// Gradients of biases in a fixed order are summed by blocks of this many rows and keys.
constexpr int kBiasBlock = 64;

// A CTA sums dS over blocks of pairs: those that add to one block of dbias, or for drelative_bias those of
// one (batch, head) that lie along one diagonal.
struct DbiasParams {
  Problem problem;
  Rows q_hat, k_hat, v, dout;
  RowStats stats;
  // Diagonals: [B, N, block diagonals, 2 kBiasBlock], the last entry unused. Else [slices] times dbias.
  float* partials;
  bool diagonals;
  BiasGradient dbias;  // data unused
  int slices;          // CTAs that share out the sum of a block of dbias
};

// Block diagonals, row block less key block, count from the last key block's.
struct BlockDiagonals {
  int rows, cols;  // blocks
  __host__ __device__ explicit BlockDiagonals(const Problem& p)
      : rows((p.seqlen_q + kBiasBlock - 1) / kBiasBlock),
        cols((p.seqlen_k + kBiasBlock - 1) / kBiasBlock) {}
  __host__ __device__ int count() const { return rows + cols - 1; }
  __host__ __device__ int first() const { return 1 - cols; }
};

constexpr int kLeastRowsPerBlock = 8;  // of a row-wise kernel: a row has 32 lanes or fewer

struct DqParams {
  Problem problem;
  Rows q_raw;
  const float* q_inverse_norm;  // [B, N, T, groups]
  RowStats stats;
  const void* dq_accum;
  bool tiled;              // it lies in DqTiles
  const float2* row_sums;  // as above, or null: not centred
  bool log2_units;         // of their S
  const float* dlse;       // [B, N, T] or null
  Rows dq;                 // [B, T, N, H]
  float* dscale_partials;  // [B, N, row blocks], or null
};

}  // namespace jca
