// dq and the gradients of biases as sums in one order, for results that are bitwise equal from run to run.
//
// Where CTAs of bwd.h add to a common sum by atomics, here one CTA owns a sum and walks over all that adds
// to it. P and dS are computed once more for each of the kernels, in natural units whatever the bound.
// Warps split the rows alone: 16 each, with P and dS in registers.
#pragma once

#include "kernels/bias.h"
#include "kernels/sm80/tile.h"
#include "kernels/visible.h"

namespace jca::sm80 {

// The numbers of the two rows of this thread's fragment, [16, 8 kN] from row i0 on.
struct FragmentRows {
  float lse[2], lse_low[2], delta[2];

  __device__ FragmentRows(const RowStats& stats, int64_t bh, int i0) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = i0 + int(threadIdx.x) % 32 / 4 + half * 8;
      lse[half] = stats.row(bh, kLse)[i];
      lse_low[half] = stats.row(bh, kLseLow)[i];
      delta[half] = stats.row(bh, kDelta)[i];
    }
  }

  __device__ float weight(float s, int half) const {
    return ptx::ex2((s - lse[half] - lse_low[half]) * kLog2e);
  }
  // S becomes P.
  template <int kN>
  __device__ void to_weights(float (&s)[1][kN][4]) const {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[0][n][e] = weight(s[0][n][e], e / 2);
    }
  }
  // dP becomes dS: 0 wherever P is, since dead rows and keys may hold NaN.
  template <int kN>
  __device__ void to_ds(float (&dp)[1][kN][4], const float (&p)[1][kN][4]) const {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        dp[0][n][e] = p[0][n][e] == 0.f ? 0.f : p[0][n][e] * (dp[0][n][e] - delta[e / 2]);
      }
    }
  }
};

// Blocks: what 163 KB of shared memory (sm_80; kSmall: 99 KB) and 255 registers allow.
template <class Op_, int kHeadDim_, bool kSmall_ = false>
struct DqTile {
  static constexpr bool kUnbounded = true, kSmall = kSmall_;
  using Op = Op_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kIsFloat = sizeof(typename Op::T) == 4;
  static constexpr int kBlockM = kSmall ? 32 : 64, kThreads = kBlockM / 16 * 32;
  static constexpr int kBlockN =
      kIsFloat ? (kHeadDim <= 64 ? 64 : kHeadDim <= 128 ? 32 : 16) : (kHeadDim <= 128 ? 64 : 32);
  using TileQ = SmemTile<typename Op::T, kBlockM, kHeadDim>;
  using TileK = SmemTile<typename Op::T, kBlockN, kHeadDim>;
  static constexpr int kSmemBytes = 2 * TileQ::kBytes + 2 * TileK::kBytes;
};

// dq_accum and row_sums of kBlockM rows of one head. Grid: x = query blocks * N * B, as in the forward.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2) cosine_attn_dq_sm80(const BwdParams params) {
  using Op = typename Tile::Op;
  using T = typename Op::T;
  using Accum = typename Op::Accum;
  constexpr int kBlockM = Tile::kBlockM, kBlockN = Tile::kBlockN, kHeadDim = Tile::kHeadDim;
  constexpr int kN = kBlockN / 8, kThreads = Tile::kThreads;
  // Sums in float64 wait in global memory, 32 columns at a time in registers.
  constexpr bool kInMemory = sizeof(Accum) == sizeof(double);
  constexpr int kPart = kInMemory ? 4 : kHeadDim / 8;

  const Problem& p = params.problem;
  const int blocks_m = (p.seqlen_q + kBlockM - 1) / kBlockM;
  const int m_block = blocks_m - 1 - blockIdx.x % blocks_m;
  const int head = blockIdx.x / blocks_m % p.num_heads;
  const int b = blockIdx.x / blocks_m / p.num_heads;
  const int head_kv = head / (p.num_heads / p.num_heads_kv);
  const int64_t bh = int64_t(b) * p.num_heads + head;
  const int m0 = m_block * kBlockM;
  const int warp_m0 = int(threadIdx.x) / 32 * 16, lane = threadIdx.x % 32;

  extern __shared__ __align__(128) char smem[];
  const typename Tile::TileQ sQ{reinterpret_cast<T*>(smem)};
  const typename Tile::TileQ sdO{reinterpret_cast<T*>(smem + Tile::TileQ::kBytes)};
  const typename Tile::TileK sK{reinterpret_cast<T*>(smem + 2 * Tile::TileQ::kBytes)};
  const typename Tile::TileK sV{
      reinterpret_cast<T*>(smem + 2 * Tile::TileQ::kBytes + Tile::TileK::kBytes)};
  __shared__ BlockWindow windows[kThreads / 32];
  BlockWindow& window = windows[threadIdx.x / 32];
  __shared__ Visible visible;
  Visible::init(visible, p, b);

  const auto load_rows = [&](const auto& tile, const auto& rows) {
    load_rows_async<kThreads>(tile, p.head_dim_padded, rows, m0, visible.seqlen_q);
  };
  const auto load_keys = [&](const auto& tile, const auto& rows, int n0) {
    load_rows_async<kThreads>(tile, p.head_dim_padded, rows, n0, visible.seqlen_k, visible.keys);
    ptx::cp_async_commit();
  };
  const auto end_n = [&] { return (visible.k_end(m0, m0 + kBlockM) + kBlockN - 1) / kBlockN; };
  const auto kind_of = [&](int n_block) {
    return visible.block(p, head, m0, m0 + kBlockM, n_block * kBlockN, (n_block + 1) * kBlockN);
  };
  int n_block = window.seek(visible.k_begin(m0) / kBlockN, end_n(), kind_of);
  if (n_block < 0) return;  // rows without keys are dead: nobody reads their sums
  load_rows(sQ, params.q_hat.head<const T>(b, head));
  load_rows(sdO, params.dout.head<const T>(b, head));
  const auto gK = params.k_hat.head<const T>(b, head_kv);
  const auto gV = params.v.head<const T>(b, head_kv);
  const FragmentRows rows(params.stats, bh, m0 + warp_m0);

  float rdQ[1][kPart][4] = {};
  float rSumdS[2] = {}, rPS[2] = {};  // this thread's share of row_sums
  // Stores rdQ, columns from h0 on, over what is there or added to it.
  const auto store = [&](int h0, bool add) {
    struct alignas(2 * sizeof(Accum)) Pair {
      Accum x, y;
    };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = m0 + warp_m0 + lane / 4 + half * 8;
      if (i >= visible.seqlen_q) continue;
      Accum* row = static_cast<Accum*>(params.dq_accum) + (bh * p.seqlen_q + i) * p.head_dim_padded;
#pragma unroll
      for (int n = 0; n < kPart; ++n) {
        const int h = h0 + n * 8 + 2 * (lane % 4);
        if (h >= p.head_dim_padded) continue;
        Pair& sum = *reinterpret_cast<Pair*>(row + h);
        Pair part{rdQ[0][n][half * 2], rdQ[0][n][half * 2 + 1]};
        if (add) part = {sum.x + part.x, sum.y + part.y};
        sum = part;
      }
    }
  };

  for (bool first = true; n_block >= 0; first = false) {
    const int n0 = n_block * kBlockN;
    load_keys(sK, gK, n0);
    load_keys(sV, gV, n0);
    ptx::cp_async_wait<1>();
    __syncthreads();  // K has arrived, with the first one q^ and dO

    float rP[1][kN][4] = {}, rdS[1][kN][4] = {};
    warp_gemm<Op, false, false>(rP, sQ, warp_m0, sK, 0);
    const FragmentAt at(m0 + warp_m0, n0);
    add_biases(rP, p, visible, head, at);
    if (!window.is_all(n_block)) hide(rP, p, visible, head, at);
    if (params.row_sums != nullptr) {
      float rBias[1][kN][4] = {}, sum[2] = {};
      add_biases(rBias, p, visible, head, at);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float w = rows.weight(rP[0][n][e], e / 2);
          if (w != 0.f) sum[e / 2] += w * (rP[0][n][e] - rBias[0][n][e]);
        }
      }
      for (int half = 0; half < 2; ++half) rPS[half] += sum[half];
    }
    rows.to_weights(rP);

    n_block = window.next(n_block, kind_of);
    ptx::cp_async_wait<0>();
    if (!may_leave_dead_keys(p)) {
      __syncthreads();  // V has arrived; K has been read by every warp
    } else if (__syncthreads_or(copied_nonfinite<kThreads>(sK))) {
      clear_unseen_keys<kThreads>(sK, rP);
    }
    warp_gemm<Op, false, false>(rdS, sdO, warp_m0, sV, 0);
    rows.to_ds(rdS, rP);
    if (params.row_sums != nullptr) {
      float sum[2] = {};
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[e / 2] += rdS[0][n][e];
      }
      for (int half = 0; half < 2; ++half) rSumdS[half] += sum[half];
    }
    if constexpr (kInMemory) {
#pragma unroll 1
      for (int h0 = 0; h0 < kHeadDim; h0 += kPart * 8) {
#pragma unroll
        for (int n = 0; n < kPart; ++n) rdQ[0][n][0] = rdQ[0][n][1] = rdQ[0][n][2] = rdQ[0][n][3] = 0.f;
        warp_gemm_accum<Op>(rdQ, rdS, sK, h0);
        store(h0, !first);
      }
    } else {
      warp_gemm_accum<Op>(rdQ, rdS, sK);
    }
    __syncthreads();  // K and V have been read by every warp
  }

  if constexpr (!kInMemory) store(0, false);
  if (params.row_sums != nullptr) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int d = 1; d < 4; d *= 2) {
        rSumdS[half] += __shfl_xor_sync(0xffffffff, rSumdS[half], d);
        rPS[half] += __shfl_xor_sync(0xffffffff, rPS[half], d);
      }
      const int i = m0 + warp_m0 + lane / 4 + half * 8;
      if (lane % 4 == 0 && i < visible.seqlen_q) {
        params.row_sums[bh * p.seqlen_q + i] = make_float2(rSumdS[half], rPS[half]);
      }
    }
  }
}

// The blocks of pairs that a CTA of cosine_attn_dbias sums, keys running fastest, then rows, heads and batch
// entries. In shared memory, as Visible.
struct BlockWalk {
  int b, b_step, head, heads, m, rows, n, cols;  // the first of each, and how many
  bool diagonal;                                 // key blocks move with row blocks
  int slice;
  int64_t begin;  // of all those blocks the CTA takes `count` from this one on
  int count;

  struct At {
    int b, head, i0, j0;
  };
  __device__ At at(int index) const {
    const int64_t row = (begin + index) / cols, of_head = row / rows;
    const int m_step = int(row % rows);
    const int n_step = diagonal ? m_step : int((begin + index) % cols);
    return {b + int(of_head / heads) * b_step, head + int(of_head % heads), (m + m_step) * kBiasBlock,
            (n + n_step) * kBiasBlock};
  }

  // CTA `id` of B * N * block diagonals.
  __device__ static BlockWalk along_diagonal(const Problem& p, int64_t id) {
    const BlockDiagonals blocks(p);
    const int diagonal = int(id % blocks.count()) + blocks.first();
    const int64_t bh = id / blocks.count();
    BlockWalk walk{int(bh / p.num_heads), 1, int(bh % p.num_heads), 1, max(0, diagonal), 0,
                   max(0, -diagonal), 1, true, 0, 0, 0};
    walk.rows = walk.count = min(blocks.rows - walk.m, blocks.cols - walk.n);
    return walk;
  }
  // CTA `id` of slices * blocks of dbias.
  __device__ static BlockWalk onto_block(const Problem& p, const BiasGradient& dbias, int slices,
                                         int64_t id) {
    const BlockDiagonals blocks(p);
    const int heads = dbias.stride_head == 0 ? p.num_heads : 1;
    const int rows = dbias.stride_row == 0 ? blocks.rows : 1;
    const int cols = dbias.stride_col == 0 ? blocks.cols : 1;
    const auto take = [&id](int64_t extent) {
      const int index = int(id % extent);
      id /= extent;
      return index;
    };
    const int n = take(blocks.cols / cols), m = take(blocks.rows / rows);
    const int head = take(p.num_heads / heads), b = take(dbias.batch), slice = int(id);
    const int64_t all =
        (p.batch - b + dbias.batch - 1) / dbias.batch * heads * rows * cols;
    const int64_t begin = all * slice / slices, end = all * (slice + 1) / slices;
    return {b, int(dbias.batch), head, heads, m, rows, n, cols, false, slice, begin, int(end - begin)};
  }
};

// q^ and k^ make room for dO and v. Rows longer than kDepth are taken in parts.
template <class Op_, int kHeadDim_>
struct DbiasTile {
  static constexpr bool kUnbounded = true, kSmall = false;
  using Op = Op_;
  static constexpr int kHeadDim = kHeadDim_, kDepth = kHeadDim < 128 ? kHeadDim : 128;
  static constexpr int kBlockM = kBiasBlock, kBlockN = kBiasBlock, kThreads = kBlockM / 16 * 32;
  using Tile = SmemTile<typename Op::T, kBiasBlock, kDepth>;
  static constexpr int kPitch = kBlockN + 1;  // of the sums, floats; they reuse the front
  static constexpr int kSumBytes = kBlockM * kPitch * int(sizeof(float));
  static constexpr int kSmemBytes = 2 * Tile::kBytes > kSumBytes ? 2 * Tile::kBytes : kSumBytes;
};

// DbiasParams::partials. Grid: x as BlockWalk counts CTAs.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2) cosine_attn_dbias_sm80(const DbiasParams params) {
  using Op = typename Tile::Op;
  using T = typename Op::T;
  constexpr int kBlock = kBiasBlock, kN = kBlock / 8, kThreads = Tile::kThreads;
  const Problem& p = params.problem;
  const int warp_m0 = int(threadIdx.x) / 32 * 16, lane = threadIdx.x % 32;

  extern __shared__ __align__(128) char smem[];
  const typename Tile::Tile sRows{reinterpret_cast<T*>(smem)};
  const typename Tile::Tile sKeys{reinterpret_cast<T*>(smem + Tile::Tile::kBytes)};
  __shared__ BlockWindow windows[kThreads / 32];
  BlockWindow& window = windows[threadIdx.x / 32];
  __shared__ BlockWalk walk;
  if (threadIdx.x == 0) {
    walk = params.diagonals ? BlockWalk::along_diagonal(p, blockIdx.x)
                            : BlockWalk::onto_block(p, params.dbias, params.slices, blockIdx.x);
  }
  __syncthreads();

  const auto kind_of = [&](int index) {
    const BlockWalk::At at = walk.at(index);
    return Visible(p, at.b).block(p, at.head, at.i0, at.i0 + kBlock, at.j0, at.j0 + kBlock);
  };

  float rSum[1][kN][4] = {};
  for (int index = window.seek(0, walk.count, kind_of); index >= 0;
       index = window.next(index, kind_of)) {
    const BlockWalk::At at = walk.at(index);
    const Visible visible(p, at.b);
    const int head_kv = at.head / (p.num_heads / p.num_heads_kv);
    const auto load = [&](auto rows, auto keys, int h0) {
      rows.data += h0;
      keys.data += h0;
      const int cols = p.head_dim_padded - h0;
      load_rows_async<kThreads>(sRows, cols, rows, at.i0, visible.seqlen_q);
      load_rows_async<kThreads>(sKeys, cols, keys, at.j0, visible.seqlen_k);
      ptx::cp_async_commit();
    };
    // c += rows keys^T; the first part has been asked for.
    const auto multiply = [&](auto& c, const auto& rows, const auto& keys) {
#pragma unroll 1
      for (int h0 = 0; h0 < p.head_dim_padded; h0 += Tile::kDepth) {
        if (h0 > 0) load(rows, keys, h0);
        ptx::cp_async_wait<0>();
        __syncthreads();
        warp_gemm<Op, false, false>(c, sRows, warp_m0, sKeys, 0);
        __syncthreads();  // both tiles have been read by every warp
      }
    };
    const auto gQ = params.q_hat.head<const T>(at.b, at.head);
    const auto gdO = params.dout.head<const T>(at.b, at.head);
    const auto gK = params.k_hat.head<const T>(at.b, head_kv);
    const auto gV = params.v.head<const T>(at.b, head_kv);
    float rP[1][kN][4] = {}, rdS[1][kN][4] = {};
    load(gQ, gK, 0);
    multiply(rP, gQ, gK);
    load(gdO, gV, 0);

    const FragmentAt pairs(at.i0 + warp_m0, at.j0);
    add_biases(rP, p, visible, at.head, pairs);
    if (!window.is_all(index)) hide(rP, p, visible, at.head, pairs);
    const FragmentRows rows(params.stats, int64_t(at.b) * p.num_heads + at.head, at.i0 + warp_m0);
    rows.to_weights(rP);
    multiply(rdS, gdO, gV);
    rows.to_ds(rdS, rP);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) rSum[0][n][e] += rdS[0][n][e];
    }
  }

  float* sSum = reinterpret_cast<float*>(smem);
  constexpr int kPitch = Tile::kPitch;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int r = warp_m0 + lane / 4 + e / 2 * 8, c = n * 8 + 2 * (lane % 4) + e % 2;
      sSum[r * kPitch + c] = rSum[0][n][e];
    }
  }
  __syncthreads();
  // Of `count` sums: a row, a column or a diagonal of the block.
  const auto line = [&](int first, int step, int count) {
    float sum = 0.f;
    for (int i = 0; i < count; ++i) sum += sSum[first + i * step];
    return sum;
  };
  const int t = threadIdx.x;
  if (params.diagonals) {
    const int d = t - (kBlock - 1);
    if (d < kBlock) {
      params.partials[int64_t(blockIdx.x) * (2 * kBlock) + t] =
          line(max(d, 0) * kPitch + max(-d, 0), kPitch + 1, kBlock - abs(d));
    }
    return;
  }
  const BiasGradient& dbias = params.dbias;
  float* to = params.partials + (walk.slice * dbias.batch + walk.b) * dbias.stride_batch +
              walk.head * dbias.stride_head;
  const int i0 = walk.m * kBlock, j0 = walk.n * kBlock;
  if (dbias.stride_row != 0 && dbias.stride_col != 0) {
    for (int i = t; i < kBlock * kBlock; i += kThreads) {
      const int r = i / kBlock, c = i % kBlock;
      if (i0 + r < p.seqlen_q && j0 + c < p.seqlen_k) {
        to[(i0 + r) * dbias.stride_row + j0 + c] = sSum[r * kPitch + c];
      }
    }
  } else if (dbias.stride_col != 0) {
    if (t < kBlock && j0 + t < p.seqlen_k) to[j0 + t] = line(t, kPitch, kBlock);
  } else {
    const float sum = t < kBlock ? line(t * kPitch, 1, kBlock) : 0.f;
    if (dbias.stride_row != 0) {
      if (t < kBlock && i0 + t < p.seqlen_q) to[(i0 + t) * dbias.stride_row] = sum;
    } else {
      __syncthreads();
      if (t < kBlock) sSum[t] = sum;
      __syncthreads();
      if (t == 0) *to = line(0, 1, kBlock);
    }
  }
}

}  // namespace jca::sm80
