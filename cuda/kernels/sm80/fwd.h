// Forward of the portable family (sm_80 on: mma.sync, ldmatrix, cp.async).
//
// Rows of q^ and k^ have unit norm (per group), so |S| <= bound up to rounding, and exp(S - c) with a
// constant c neither overflows nor loses a row: rO and rL are plain sums over key blocks. Where the bound
// is too large for that, or a bias leaves none, c is the row's running maximum.
#pragma once

#include "kernels/bias.h"
#include "kernels/lse.h"
#include "kernels/sm80/tile.h"
#include "kernels/visible.h"

namespace jca::sm80 {

// 128 query rows; kSmall: 64. 4 warps of 32 rows read each key fragment for two products, and two or three
// such CTAs share an SM (kernels/NOTES.md); where 32 rows of accumulators leave no registers it is 8 warps
// of 16.
// kBlockN: what 163 KB of shared memory (sm_80; kSmall: 99 KB) and the registers allow.
template <class OpS_, class OpV_, int kHeadDim_, bool kUnbounded_, bool kSmall_ = false>
struct FwdTile {
  static constexpr bool kUnbounded = kUnbounded_, kSmall = kSmall_;
  using OpS = OpS_;  // arithmetic of q^ k^T
  using OpV = OpV_;  // arithmetic of P v
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kIsFloat = sizeof(typename OpV::T) == 4;
  static constexpr int kM = !kIsFloat && kHeadDim <= 128 ? 2 : 1;  // m16 blocks of a warp
  static constexpr int kBlockM = kSmall ? 64 : 128;
  static constexpr int kThreads = kBlockM / (16 * kM) * 32;
  static constexpr int kBlockN =
      kIsFloat ? (kHeadDim > 128 ? 16 : kSmall ? 32 : 64) : (kHeadDim == 192 ? 64 : 32);
  static constexpr int kMinBlocks = kM == 2 ? (kHeadDim <= 64 && !kUnbounded ? 3 : 2) : 1;
  using TileQ = SmemTile<typename OpS::T, kBlockM, kHeadDim>;
  using TileK = SmemTile<typename OpS::T, kBlockN, kHeadDim>;
  using TileV = SmemTile<typename OpV::T, kBlockN, kHeadDim>;
  static constexpr int kSmemBytes = TileQ::kBytes + TileK::kBytes + TileV::kBytes;
};

// Grid: x = query blocks * N * B, the query block running fastest and from the last one down, so that
// causal blocks with the most keys start first.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kMinBlocks)
    cosine_attn_fwd_sm80(const FwdParams params) {
  using OpS = typename Tile::OpS;
  using OpV = typename Tile::OpV;
  using TS = typename OpS::T;
  using TV = typename OpV::T;
  constexpr int kBlockM = Tile::kBlockM, kBlockN = Tile::kBlockN, kHeadDim = Tile::kHeadDim;
  constexpr int kM = Tile::kM, kN = kBlockN / 8, kNV = kHeadDim / 8, kThreads = Tile::kThreads;

  const Problem& p = params.problem;
  const int blocks_m = (p.seqlen_q + kBlockM - 1) / kBlockM;
  const int m_block = blocks_m - 1 - blockIdx.x % blocks_m;
  const int head = blockIdx.x / blocks_m % p.num_heads;
  const int b = blockIdx.x / blocks_m / p.num_heads;
  const int head_kv = head / (p.num_heads / p.num_heads_kv);
  const int m0 = m_block * kBlockM;
  const int warp_m0 = int(threadIdx.x) / 32 * kM * 16, lane = threadIdx.x % 32;

  extern __shared__ __align__(128) char smem[];
  __shared__ BlockWindow windows[kThreads / 32];
  BlockWindow& window = windows[threadIdx.x / 32];
  const typename Tile::TileQ sQ{reinterpret_cast<TS*>(smem)};
  const typename Tile::TileK sK{reinterpret_cast<TS*>(smem + Tile::TileQ::kBytes)};
  const typename Tile::TileV sV{
      reinterpret_cast<TV*>(smem + Tile::TileQ::kBytes + Tile::TileK::kBytes)};

  __shared__ Visible visible;
  Visible::init(visible, p, b);
  const auto gQ = params.q_hat.head<const TS>(b, head);
  const auto gK = params.k_hat.head<const TS>(b, head_kv);
  const auto gV = params.v.head<const TV>(b, head_kv);
  const auto gO = params.out.head<TV>(b, head);
  const auto load_keys = [&](const auto& tile, const auto& rows, int n0) {
    load_rows_async<kThreads>(tile, p.head_dim_padded, rows, n0, visible.seqlen_k, visible.keys);
    ptx::cp_async_commit();
  };
  const auto end_n = [&] { return (visible.k_end(m0, m0 + kBlockM) + kBlockN - 1) / kBlockN; };
  const auto kind_of = [&](int n_block) {
    return visible.block(p, head, m0, m0 + kBlockM, n_block * kBlockN, (n_block + 1) * kBlockN);
  };

  float rO[kM][kNV][4] = {};
  float rL[kM][2] = {};  // this thread's share of the sums of rows lane / 4 and lane / 4 + 8
  float rM[kM][2];       // their running maxima, c of P = exp(S - c) without a bound
#pragma unroll
  for (int m = 0; m < kM; ++m) rM[m][0] = rM[m][1] = -INFINITY;

  int n_block = window.seek(visible.k_begin(m0) / kBlockN, end_n(), kind_of);
  if (n_block >= 0) {
    load_rows_async<kThreads>(sQ, p.head_dim_padded, gQ, m0, visible.seqlen_q);
    load_keys(sK, gK, n_block * kBlockN);
  }
  while (n_block >= 0) {
    const int n0 = n_block * kBlockN;
    ptx::cp_async_wait<0>();
    __syncthreads();  // this K has arrived; the last V has been read by every warp
    load_keys(sV, gV, n0);

    float rS[kM][kN][4] = {};  // [16 kM, kBlockN] logits
    warp_gemm<OpS, false, false>(rS, sQ, warp_m0, sK, 0);
    const FragmentAt at(m0 + warp_m0, n0);
    if constexpr (Tile::kUnbounded) add_biases(rS, p, visible, head, at);
    const bool all = window.is_all(n_block);
    if (!all) hide(rS, p, visible, head, at);

    if constexpr (Tile::kUnbounded) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float top = rM[m][half];
#pragma unroll
          for (int n = 0; n < kN; ++n) {
            top = fmaxf(top, fmaxf(rS[m][n][half * 2], rS[m][n][half * 2 + 1]));
          }
          top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 1));
          top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 2));
          // A row that has seen no key yet: -inf - -inf would be NaN.
          const float scale = top == -INFINITY ? 0.f : ptx::ex2((rM[m][half] - top) * kLog2e);
          rM[m][half] = top;
          rL[m][half] *= scale;
#pragma unroll
          for (int n = 0; n < kNV; ++n) {
            rO[m][n][half * 2] *= scale;
            rO[m][n][half * 2 + 1] *= scale;
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const float c[2] = {rM[m][0] == -INFINITY ? 0.f : rM[m][0],
                          rM[m][1] == -INFINITY ? 0.f : rM[m][1]};
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          rS[m][n][e] = ptx::ex2(Tile::kUnbounded ? (rS[m][n][e] - c[e / 2]) * kLog2e
                                                  : rS[m][n][e] - params.shift_log2);
          rL[m][e / 2] += rS[m][n][e];
        }
      }
    }

    n_block = window.next(n_block, kind_of);
    ptx::cp_async_wait<0>();
    if (all || !may_leave_dead_keys(p)) {
      __syncthreads();  // V has arrived; K has been read by every warp
    } else if (__syncthreads_or(copied_nonfinite<kThreads>(sV))) {
      clear_unseen_keys<kThreads>(sV, rS);
    }
    if (n_block >= 0) load_keys(sK, gK, n_block * kBlockN);
    warp_gemm_accum<OpV>(rO, rS, sV);
  }

#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float l = rL[m][half];
      l += __shfl_xor_sync(0xffffffff, l, 1);
      l += __shfl_xor_sync(0xffffffff, l, 2);
      const int i = m0 + warp_m0 + m * 16 + lane / 4 + half * 8;
      if (i >= p.seqlen_q) continue;
      const bool live = l > 0.f;
      if (lane % 4 == 0) {
        const float c = Tile::kUnbounded ? rM[m][half] : params.shift;
        const SplitLog lse = live ? log_of_sum(l, c) : SplitLog{-INFINITY, 0.f};
        const int64_t at = (int64_t(b) * p.num_heads + head) * p.seqlen_q + i;
        params.lse[at] = lse.high;
        params.lse_low[at] = lse.low;
      }
      const float inverse = 1.f / l;
#pragma unroll
      for (int n = 0; n < kNV; ++n) {
        // A dead row is zero even where a live key of another row holds inf: P = 0 made that NaN.
        store_pair<OpV>(gO.row(i), n * 8 + 2 * (lane % 4), p.head_dim,
                        live ? rO[m][n][half * 2] * inverse : 0.f,
                        live ? rO[m][n][half * 2 + 1] * inverse : 0.f);
      }
    }
  }
}

}  // namespace jca::sm80
