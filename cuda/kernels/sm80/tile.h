// Shared-memory tiles and the warp-level products over them, for one of four arithmetics.
#pragma once

#include "kernels/params.h"
#include "ptx/async.h"
#include "ptx/mma.h"

#include <type_traits>

namespace jca::sm80 {

// Row-major [kRows, kCols] tile of T in shared memory. 16-byte chunks of a row are permuted by the
// row number, so that the 8 rows of an ldmatrix (or the 32 lanes of a float32 fragment load) fall
// into different banks: with kCols a multiple of 8 chunks 8 rows rotate through 8 chunks; with 4 or
// 12 chunks two rows already cover all banks, and row pairs rotate through 4.
template <typename T_, int kRows_, int kCols_>
struct SmemTile {
  using T = T_;
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr int kChunk = 16 / sizeof(T);  // elements
  static constexpr int kChunks = kCols / kChunk;
  static constexpr int kBytes = kRows * kCols * sizeof(T);
  static_assert(kChunks % 4 == 0);

  T* data;

  __device__ static int swizzle(int row, int chunk) {
    return kChunks % 8 == 0 ? chunk ^ (row & 7) : chunk ^ ((row >> 1) & 3);
  }
  __device__ T* chunk(int row, int chunk) const {
    return data + row * kCols + swizzle(row, chunk) * kChunk;
  }
  __device__ T* at(int row, int col) const {
    return chunk(row, col / kChunk) + col % kChunk;
  }
};

// The operand fragments of one warp mma, and how to fetch them. A is [16, kK], B is [kK, 8].
//   kTransA: the tile stores A^T, [k, m];  kTransB: the tile stores B as [k, n], else as [n, k].
//   load_b fetches kN neighbouring B fragments.
//   from_accum turns float32 accumulators (kK / 8 neighbouring [16, 8] blocks) into an A fragment.
template <typename T_>
struct Half16 {  // float16 or bfloat16, m16n8k16
  using T = T_;
  using Accum = float;  // of sums across CTAs
  static constexpr int kK = 16;
  static constexpr bool kSquaresOverflow = std::is_same_v<T, __nv_bfloat16>;  // float32
  struct A {
    uint32_t r[4];
  };
  struct B {
    uint32_t r[2];
  };

  template <bool kTransA, class Tile>
  __device__ static void load_a(A& a, const Tile& tile, int m0, int k0) {
    const int lane = threadIdx.x % 32;
    if constexpr (kTransA) {
      const int row = k0 + lane % 8 + (lane / 16) * 8;
      ptx::ldmatrix_x4_trans(a.r, ptx::smem_address(tile.chunk(row, m0 / 8 + (lane / 8) % 2)));
    } else {
      ptx::ldmatrix_x4(a.r, ptx::smem_address(tile.chunk(m0 + lane % 16, k0 / 8 + lane / 16)));
    }
  }

  template <bool kTransB, int kN, class Tile>
  __device__ static void load_b(B (&b)[kN], const Tile& tile, int n0, int k0) {
    static_assert(kN % 2 == 0);
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t r[4];
      if constexpr (kTransB) {
        const int row = k0 + lane % 16;
        ptx::ldmatrix_x4_trans(r, ptx::smem_address(tile.chunk(row, n0 / 8 + n + lane / 16)));
      } else {
        const int row = n0 + n * 8 + lane % 8 + (lane / 16) * 8;
        ptx::ldmatrix_x4(r, ptx::smem_address(tile.chunk(row, k0 / 8 + (lane / 8) % 2)));
      }
      b[n].r[0] = r[0];
      b[n].r[1] = r[1];
      b[n + 1].r[0] = r[2];
      b[n + 1].r[1] = r[3];
    }
  }

  __device__ static void mma(float (&c)[4], const A& a, const B& b) {
    ptx::mma_m16n8k16(c, a.r, b.r, T{});
  }

  template <int kN>
  __device__ static void from_accum(A& a, const float (&c)[kN][4], int k0) {
    const int n = k0 / 8;
    a.r[0] = pack(c[n][0], c[n][1]);
    a.r[1] = pack(c[n][2], c[n][3]);
    a.r[2] = pack(c[n + 1][0], c[n + 1][1]);
    a.r[3] = pack(c[n + 1][2], c[n + 1][3]);
  }

  __device__ static uint32_t pack(float x, float y) {
    uint32_t r;
    if constexpr (std::is_same_v<T, __half>) {
      const __half2 h = __floats2half2_rn(x, y);
      r = reinterpret_cast<const uint32_t&>(h);
    } else {
      const __nv_bfloat162 h = __floats2bfloat162_rn(x, y);
      r = reinterpret_cast<const uint32_t&>(h);
    }
    return r;
  }

  __device__ static float2 unpack(uint32_t r) {
    if constexpr (std::is_same_v<T, __half>) {
      return __half22float2(reinterpret_cast<const __half2&>(r));
    } else {
      // Not __bfloat1622float2, beside which ptxas spills more.
      return {__uint_as_float(r << 16), __uint_as_float(r & 0xffff0000)};
    }
  }

  __device__ static void store2(T* p, float x, float y) {
    *reinterpret_cast<uint32_t*>(p) = pack(x, y);
  }
};

// float32 on m16n8k8 tf32: one pass, or three (big * small + small * big + big * big) for float32-grade
// products. Within a block of 8 the k index is permuted, fragment slots t and t + 4 holding k = 2 t
// and 2 t + 1: then float32 accumulators are A fragments as they are, and transposed loads touch rows
// that the swizzle keeps in different banks.
template <bool kThreePasses>
struct Tf32 {
  using T = float;
  // Reductions in any order, of partial sums that may be much larger than their total, cost float32
  // results a digit (T = 1, S = 1000: 1.7e-7 in place of 1.0e-7).
  using Accum = std::conditional_t<kThreePasses, double, float>;
  static constexpr int kK = 8;
  struct A {
    uint32_t hi[4];
    uint32_t lo[kThreePasses ? 4 : 1];
  };
  struct B {
    uint32_t hi[2];
    uint32_t lo[kThreePasses ? 2 : 1];
  };

  template <class F>
  __device__ static void set(F& f, int i, float x) {
    f.hi[i] = ptx::cvt_tf32(x);
    if constexpr (kThreePasses) f.lo[i] = ptx::cvt_tf32(x - __uint_as_float(f.hi[i]));
  }

  template <bool kTransA, class Tile>
  __device__ static void load_a(A& a, const Tile& tile, int m0, int k0) {
    const int lane = threadIdx.x % 32, g = lane / 4, k = k0 + 2 * (lane % 4);
    if constexpr (kTransA) {
      set(a, 0, *tile.at(k, m0 + g));
      set(a, 1, *tile.at(k, m0 + g + 8));
      set(a, 2, *tile.at(k + 1, m0 + g));
      set(a, 3, *tile.at(k + 1, m0 + g + 8));
    } else {
      const float2 top = *reinterpret_cast<const float2*>(tile.at(m0 + g, k));
      const float2 bottom = *reinterpret_cast<const float2*>(tile.at(m0 + g + 8, k));
      set(a, 0, top.x);
      set(a, 1, bottom.x);
      set(a, 2, top.y);
      set(a, 3, bottom.y);
    }
  }

  template <bool kTransB, int kN, class Tile>
  __device__ static void load_b(B (&b)[kN], const Tile& tile, int n0, int k0) {
    const int lane = threadIdx.x % 32, g = lane / 4, k = k0 + 2 * (lane % 4);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      if constexpr (kTransB) {
        set(b[n], 0, *tile.at(k, n0 + n * 8 + g));
        set(b[n], 1, *tile.at(k + 1, n0 + n * 8 + g));
      } else {
        const float2 x = *reinterpret_cast<const float2*>(tile.at(n0 + n * 8 + g, k));
        set(b[n], 0, x.x);
        set(b[n], 1, x.y);
      }
    }
  }

  __device__ static void mma(float (&c)[4], const A& a, const B& b) {
    if constexpr (kThreePasses) {
      // Long sums stay outside the tensor core, whose accumulator truncates (Ootomo and Yokota 2022).
      float sum[4] = {0.f, 0.f, 0.f, 0.f};
      ptx::mma_m16n8k8_tf32(sum, a.lo, b.hi);
      ptx::mma_m16n8k8_tf32(sum, a.hi, b.lo);
      ptx::mma_m16n8k8_tf32(sum, a.hi, b.hi);
#pragma unroll
      for (int i = 0; i < 4; ++i) c[i] += sum[i];
    } else {
      ptx::mma_m16n8k8_tf32(c, a.hi, b.hi);
    }
  }

  template <int kN>
  __device__ static void from_accum(A& a, const float (&c)[kN][4], int k0) {
    const int n = k0 / 8;
    set(a, 0, c[n][0]);
    set(a, 1, c[n][2]);
    set(a, 2, c[n][1]);
    set(a, 3, c[n][3]);
  }

  __device__ static void store2(float* p, float x, float y) {
    *reinterpret_cast<float2*>(p) = make_float2(x, y);
  }
};

// c[kM * 16, kN * 8] += A B over the k range of the tiles; this warp's block starts at (m0, n0).
template <class Op, bool kTransA, bool kTransB, int kM, int kN, class TileA, class TileB>
__device__ inline void warp_gemm(float (&c)[kM][kN][4], const TileA& tile_a, int m0,
                                 const TileB& tile_b, int n0) {
  constexpr int kDepth = kTransA ? TileA::kRows : TileA::kCols;
  constexpr int kPair = kN % 2 == 0 ? 2 : 1;  // few B fragments at a time: registers
  // Full unrolling hoists every ldmatrix address out of the callers' loops, into registers that the
  // accumulators need (up to 430 bytes of spills).
#pragma unroll 2
  for (int k0 = 0; k0 < kDepth; k0 += Op::kK) {
    typename Op::A a[kM];
#pragma unroll
    for (int m = 0; m < kM; ++m) Op::template load_a<kTransA>(a[m], tile_a, m0 + m * 16, k0);
#pragma unroll
    for (int n = 0; n < kN; n += kPair) {
      typename Op::B b[kPair];
      Op::template load_b<kTransB>(b, tile_b, n0 + n * 8, k0);
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int i = 0; i < kPair; ++i) Op::mma(c[m][n + i], a[m], b[i]);
    }
  }
}

// The same with A in registers: kN_A accumulator blocks of 8 columns, B stored [k, n], from column n0 on.
template <class Op, int kM, int kN_A, int kN, class TileB>
__device__ inline void warp_gemm_accum(float (&c)[kM][kN][4], const float (&p)[kM][kN_A][4],
                                       const TileB& tile_b, int n0 = 0) {
#pragma unroll
  for (int k0 = 0; k0 < kN_A * 8; k0 += Op::kK) {
    typename Op::A a[kM];
#pragma unroll
    for (int m = 0; m < kM; ++m) Op::from_accum(a[m], p[m], k0);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      typename Op::B b[2];
      Op::template load_b<true>(b, tile_b, n0 + n * 8, k0);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        Op::mma(c[m][n], a[m], b[0]);
        Op::mma(c[m][n + 1], a[m], b[1]);
      }
    }
  }
}

// Elements h and h + 1 (h even) of a row of head_dim elements in global memory.
template <class Op>
__device__ inline void store_pair(typename Op::T* row, int h, int head_dim, float x, float y) {
  if (head_dim % 2 == 0) {
    if (h < head_dim) Op::store2(row + h, x, y);
  } else {
    if (h < head_dim) row[h] = static_cast<typename Op::T>(x);
    if (h + 1 < head_dim) row[h + 1] = static_cast<typename Op::T>(y);
  }
}

// Fills a tile by cp.async, 16 bytes a thread and step: with rows i0 ... of a head, those below `end`, at
// the positions in `list` if there is one. The rest, and columns from `cols` on, are zeros. Rows are 16-byte
// aligned and `cols` is a multiple of 8. `thread` is one of kThreads.
template <int kThreads, class Tile, class Head>
__device__ inline void load_rows_async(const Tile& tile, int cols, const Head& rows, int i0, int end,
                                       const int32_t* list = nullptr, unsigned thread = threadIdx.x) {
  constexpr int kAll = Tile::kRows * Tile::kChunks, kSteps = (kAll + kThreads - 1) / kThreads;
  // Where a thread keeps its column, both addresses only advance. Rows keep their place in the swizzle; those
  // of a warp alone have bits of it flipped by each step, the same for all lanes. (By more warps, 100 bytes
  // of spills in dq at H 256.)
  constexpr int kRowsPerStep = kThreads / Tile::kChunks;
  constexpr bool kFlips = kThreads == 32 && (Tile::kChunks == 8 || Tile::kChunks == 16);
  constexpr bool kAdvances = kThreads % Tile::kChunks == 0 && (kRowsPerStep % 8 == 0 || kFlips);
  // Most lists are whole runs of rows.
  if (list != nullptr) {
    const int last = min(end, i0 + Tile::kRows) - 1;
    if (last >= i0 && list[last] - list[i0] == last - i0) {
      end = list[last] + 1;
      i0 = list[i0];
      list = nullptr;
    }
  }
  if (kAdvances && list == nullptr) {
    const int row = thread / Tile::kChunks, chunk = thread % Tile::kChunks;
    const int col = chunk * Tile::kChunk;
    const int valid_rows = col < cols ? end - i0 - row : 0;
    const auto* from = rows.row(i0 + row) + col;
    const uint32_t to = ptx::smem_address(tile.chunk(row, chunk));
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (kAll % kThreads != 0 && row + step * kRowsPerStep >= Tile::kRows) break;
      const bool valid = step * kRowsPerStep < valid_rows;
      const uint32_t flip = kFlips ? step * kRowsPerStep % 8 * 16 : 0;
      ptx::cp_async_16((to ^ flip) + step * kRowsPerStep * Tile::kCols * int(sizeof(typename Tile::T)),
                       valid ? from : rows.data, valid);
      from += int64_t(kRowsPerStep) * rows.stride;
    }
    return;
  }
#pragma unroll 4
  for (int step = 0; step < kSteps; ++step) {
    const unsigned i = thread + step * kThreads;
    if (kAll % kThreads != 0 && i >= kAll) break;
    const int row = i / Tile::kChunks, chunk = i % Tile::kChunks, col = chunk * Tile::kChunk;
    const bool valid = i0 + row < end && col < cols;
    const int from = !valid ? 0 : list == nullptr ? i0 + row : list[i0 + row];
    ptx::cp_async_16(ptx::smem_address(tile.chunk(row, chunk)), rows.row(from) + (valid ? col : 0),
                     valid);
  }
}

// Whether the part of a tile that this thread has copied holds inf or NaN.
template <int kThreads, class Tile>
__device__ inline bool copied_nonfinite(const Tile& tile) {
  using T = typename Tile::T;
  constexpr bool kIsFloat = sizeof(T) == 4;
  using Pair = std::conditional_t<kIsFloat, float2,
                                  std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>>;
  float sum = 0.f;  // of zeros, or NaN
  for (unsigned i = threadIdx.x; i < Tile::kRows * Tile::kChunks; i += kThreads) {
    const Pair* pairs = reinterpret_cast<const Pair*>(tile.chunk(i / Tile::kChunks, i % Tile::kChunks));
    if constexpr (kIsFloat) {
      for (int j = 0; j < 2; ++j) sum += pairs[j].x * 0.f + pairs[j].y * 0.f;
    } else {
      const T zero(0.f);
      Pair chunk{zero, zero};
      for (int j = 0; j < 4; ++j) chunk = __hfma2(pairs[j], Pair{zero, zero}, chunk);
      sum += static_cast<float>(chunk.x) + static_cast<float>(chunk.y);
    }
  }
  return sum != 0.f;
}

// Zero rows in a tile of keys or values for those to which no row of the CTA gives a weight: they may be
// dead and hold NaN, and 0 * NaN is NaN.
template <int kThreads, class Tile, int kM, int kN>
__device__ inline void clear_unseen_keys(const Tile& keys, const float (&weights)[kM][kN][4]) {
  __shared__ bool seen[Tile::kRows];
  for (int j = threadIdx.x; j < Tile::kRows; j += kThreads) seen[j] = false;
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      float sum = 0.f;
#pragma unroll
      for (int m = 0; m < kM; ++m) sum += weights[m][n][x] + weights[m][n][2 + x];
      if (sum != 0.f) seen[n * 8 + 2 * (threadIdx.x % 4) + x] = true;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < Tile::kRows * Tile::kCols; i += kThreads) {
    if (!seen[i / Tile::kCols]) *keys.at(i / Tile::kCols, i % Tile::kCols) = typename Tile::T(0.f);
  }
  __syncthreads();
}

}  // namespace jca::sm80
