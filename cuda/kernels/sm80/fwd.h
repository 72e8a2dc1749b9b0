// Forward of the portable family (sm_80 on: mma.sync, ldmatrix, cp.async).
//
// Rows of q^ and k^ have unit norm (per group), so |S| <= bound in log2 units up to rounding, and
// exp2(S - c) with a constant c neither overflows nor loses a row: rO and rL are plain sums over key
// blocks. Where the bound is too large for that, or there is none, c is the row's running maximum.
#pragma once

#include "kernels/sm80/tile.h"
#include "kernels/visible.h"

namespace jca::sm80 {

// 128 query rows. 4 warps of 32 rows read each key fragment for two products, and two or three such CTAs
// share an SM (kernels/NOTES.md); where 32 rows of accumulators leave no registers it is 8 warps of 16.
// kBlockN: what 163 KB of shared memory (sm_80) and the registers allow.
template <class OpS_, class OpV_, int kHeadDim_, bool kRunningMax_>
struct FwdTile {
  static constexpr bool kRunningMax = kRunningMax_;
  using OpS = OpS_;  // arithmetic of q^ k^T
  using OpV = OpV_;  // arithmetic of P v
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kIsFloat = sizeof(typename OpV::T) == 4;
  static constexpr int kM = !kIsFloat && kHeadDim <= 128 ? 2 : 1;  // m16 blocks of a warp
  static constexpr int kBlockM = 128;
  static constexpr int kThreads = kBlockM / (16 * kM) * 32;
  static constexpr int kBlockN =
      kIsFloat ? (kHeadDim <= 128   ? 64
                  : kHeadDim <= 192 ? 32
                                    : 16)
               : (kHeadDim == 64 || kHeadDim == 128 || kHeadDim == 256 ? 32 : 64);
  static constexpr int kMinBlocks = kM == 2 ? (kHeadDim <= 64 && !kRunningMax ? 3 : 2) : 1;
  using TileQ = SmemTile<typename OpS::T, kBlockM, kHeadDim>;
  using TileK = SmemTile<typename OpS::T, kBlockN, kHeadDim>;
  using TileV = SmemTile<typename OpV::T, kBlockN, kHeadDim>;
  static constexpr int kSmemBytes = TileQ::kBytes + TileK::kBytes + TileV::kBytes;
};

// log(l * 2^c) as a float32, and what rounding took from it: the backward's weights are exp(S - lse), and
// half an ulp of lse shows in a whole row of them. Two-sum: Knuth, TAOCP 2, 4.2.2.
struct SplitLog {
  float high, low;
};
__device__ inline SplitLog log_of_sum(float l, float c) {
  const float log_l = logf(l), shift = c * kLn2;
  const float high = shift + log_l, from_log = high - shift;
  const float low = (shift - (high - from_log)) + (log_l - from_log);
  return {high, low + fmaf(c, kLn2, -shift) + c * kLn2Low + (l * expf(-log_l) - 1.f)};
}

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
  const int64_t b = blockIdx.x / blocks_m / p.num_heads;
  const int head_kv = head / (p.num_heads / p.num_heads_kv);
  const int m0 = m_block * kBlockM;
  const int warp_m0 = int(threadIdx.x) / 32 * kM * 16, lane = threadIdx.x % 32;

  extern __shared__ __align__(128) char smem[];
  const typename Tile::TileQ sQ{reinterpret_cast<TS*>(smem)};
  const typename Tile::TileK sK{reinterpret_cast<TS*>(smem + Tile::TileQ::kBytes)};
  const typename Tile::TileV sV{
      reinterpret_cast<TV*>(smem + Tile::TileQ::kBytes + Tile::TileK::kBytes)};

  const Visible visible(p, b);
  const uint8_t* key_mask = p.key_mask.row(b, head);
  const int blocks_n = (visible.k_end(m0, m0 + kBlockM) + kBlockN - 1) / kBlockN;

  const auto gQ = params.q_hat.head<const TS>(b, head);
  const auto gK = params.k_hat.head<const TS>(b, head_kv);
  const auto gV = params.v.head<const TV>(b, head_kv);
  const auto gO = params.out.head<TV>(b, head);
  // Dead keys may hold NaN, and 0 * NaN is NaN: they enter as zero rows.
  const auto load_keys = [&](const auto& tile, const auto& rows, int n0) {
    load_tile_async<kThreads>(tile, p.head_dim_padded, [&](int r) {
      const int j = n0 + r;
      const bool live = j < visible.seqlen_k && (key_mask == nullptr || key_mask[j]);
      return SourceRow{rows.row(live ? j : 0), live};
    });
    ptx::cp_async_commit();
  };

  float rO[kM][kNV][4] = {};
  float rL[kM][2] = {};  // this thread's share of the sums of rows lane / 4 and lane / 4 + 8
  float rC[kM][2];       // c of these rows
#pragma unroll
  for (int m = 0; m < kM; ++m) rC[m][0] = rC[m][1] = Tile::kRunningMax ? -INFINITY : params.shift;

  if (blocks_n > 0) {
    load_tile_async<kThreads>(sQ, p.head_dim_padded, [&](int r) {
      const bool live = m0 + r < visible.seqlen_q;
      return SourceRow{gQ.row(live ? m0 + r : 0), live};
    });
    load_keys(sK, gK, (blocks_n - 1) * kBlockN);
  }
  for (int n_block = blocks_n - 1; n_block >= 0; --n_block) {
    const int n0 = n_block * kBlockN;
    ptx::cp_async_wait<0>();
    __syncthreads();  // K(n) has arrived; V(n + 1) has been read by every warp
    load_keys(sV, gV, n0);

    float rS[kM][kN][4] = {};  // [16 kM, kBlockN] logits in log2 units
    warp_gemm<OpS, false, false>(rS, sQ, warp_m0, sK, 0);

    const bool all_allowed =
        key_mask == nullptr && visible.all_allowed(m0, m0 + kBlockM, n0, n0 + kBlockN);
    if (!all_allowed) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int i = m0 + warp_m0 + m * 16 + lane / 4 + (e / 2) * 8;
            const int j = n0 + n * 8 + 2 * (lane % 4) + e % 2;
            if (!visible.allowed(i, j) || (key_mask && !key_mask[j])) rS[m][n][e] = -INFINITY;
          }
        }
      }
    }
    if constexpr (Tile::kRunningMax) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float top = rC[m][half];
#pragma unroll
          for (int n = 0; n < kN; ++n) {
            top = fmaxf(top, fmaxf(rS[m][n][half * 2], rS[m][n][half * 2 + 1]));
          }
          top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 1));
          top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 2));
          // A row that has seen no key yet: -inf - -inf would be NaN.
          const float scale = top == -INFINITY ? 0.f : ptx::ex2(rC[m][half] - top);
          rC[m][half] = top;
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
      const float c[2] = {rC[m][0] == -INFINITY ? 0.f : rC[m][0],
                          rC[m][1] == -INFINITY ? 0.f : rC[m][1]};
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          rS[m][n][e] = ptx::ex2(rS[m][n][e] - c[e / 2]);
          rL[m][e / 2] += rS[m][n][e];
        }
      }
    }

    ptx::cp_async_wait<0>();
    __syncthreads();  // V(n) has arrived; K(n) has been read by every warp
    if (n_block > 0) load_keys(sK, gK, n0 - kBlockN);
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
        const SplitLog lse = live ? log_of_sum(l, rC[m][half]) : SplitLog{-INFINITY, 0.f};
        const int64_t at = (b * p.num_heads + head) * p.seqlen_q + i;
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
