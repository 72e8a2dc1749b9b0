// Forward of the portable family (sm_80 on: mma.sync, ldmatrix, cp.async).
//
// Rows of q^ and k^ have unit norm (per group), so |S| <= bound in log2 units up to rounding, and
// exp2(S - c) with a constant c neither overflows nor loses a row (launch/shift.h): no running row
// maximum, rO and rL are plain sums over key blocks.
#pragma once

#include "kernels/sm80/tile.h"
#include "kernels/visible.h"

namespace jca::sm80 {

// 8 warps of 16 query rows each. kBlockN: what 163 KB of shared memory (sm_80) and 255 registers allow.
template <class OpS_, class OpV_, int kHeadDim_>
struct FwdTile {
  using OpS = OpS_;  // arithmetic of q^ k^T
  using OpV = OpV_;  // arithmetic of P v
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kIsFloat = sizeof(typename OpV::T) == 4;
  static constexpr int kBlockM = kWarps * 16;
  static constexpr int kBlockN =
      kIsFloat ? (kHeadDim <= 128 ? 64 : kHeadDim <= 192 ? 32 : 16) : (kHeadDim <= 192 ? 64 : 32);
  // Two CTAs on an SM hide each other's softmax; beyond H = 64 the accumulators leave room for one.
  static constexpr int kMinBlocks = !kIsFloat && kHeadDim <= 64 ? 2 : 1;
  using TileQ = SmemTile<typename OpS::T, kBlockM, kHeadDim>;
  using TileK = SmemTile<typename OpS::T, kBlockN, kHeadDim>;
  using TileV = SmemTile<typename OpV::T, kBlockN, kHeadDim>;
  static constexpr int kSmemBytes = TileQ::kBytes + TileK::kBytes + TileV::kBytes;
};

// Grid: x = query blocks * N * B, the query block running fastest and from the last one down, so that
// causal blocks with the most keys start first.
template <class Tile>
__global__ void __launch_bounds__(kThreads, Tile::kMinBlocks) cosine_attn_fwd_sm80(const FwdParams params) {
  using OpS = typename Tile::OpS;
  using OpV = typename Tile::OpV;
  using TS = typename OpS::T;
  using TV = typename OpV::T;
  constexpr int kBlockM = Tile::kBlockM, kBlockN = Tile::kBlockN, kHeadDim = Tile::kHeadDim;
  constexpr int kN = kBlockN / 8, kNV = kHeadDim / 8;

  const Problem& p = params.problem;
  const int blocks_m = (p.seqlen_q + kBlockM - 1) / kBlockM;
  const int m_block = blocks_m - 1 - blockIdx.x % blocks_m;
  const int head = blockIdx.x / blocks_m % p.num_heads;
  const int64_t b = blockIdx.x / blocks_m / p.num_heads;
  const int head_kv = head / (p.num_heads / p.num_heads_kv);
  const int m0 = m_block * kBlockM;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  extern __shared__ __align__(128) char smem[];
  const typename Tile::TileQ sQ{reinterpret_cast<TS*>(smem)};
  const typename Tile::TileK sK{reinterpret_cast<TS*>(smem + Tile::TileQ::kBytes)};
  const typename Tile::TileV sV{
      reinterpret_cast<TV*>(smem + Tile::TileQ::kBytes + Tile::TileK::kBytes)};

  const Visible visible(p, b);
  const uint8_t* key_mask = p.key_mask.row(b, head);
  const int blocks_n = (visible.k_end(m0, m0 + kBlockM) + kBlockN - 1) / kBlockN;

  // Dead keys may hold NaN, and 0 * NaN is NaN: they enter as zero rows.
  const auto key_row = [&](const Rows& rows, int n0, auto type) {
    return [&rows, &visible, key_mask, b, head_kv, n0, type](int r) {
      const int j = n0 + r;
      const bool live = j < visible.seqlen_k && (key_mask == nullptr || key_mask[j]);
      return SourceRow<decltype(type)>{rows.row<decltype(type)>(b, head_kv, live ? j : 0), live};
    };
  };

  float rO[kNV][4] = {};
  float rL[2] = {0.f, 0.f};  // this thread's share of the sums of rows lane / 4 and lane / 4 + 8

  if (blocks_n > 0) {
    load_tile_async(sQ, p.head_dim_padded, [&](int r) {
      const bool live = m0 + r < visible.seqlen_q;
      return SourceRow<TS>{params.q_hat.row<TS>(b, head, live ? m0 + r : 0), live};
    });
    load_tile_async(sK, p.head_dim_padded, key_row(params.k_hat, (blocks_n - 1) * kBlockN, TS{}));
    ptx::cp_async_commit();
  }
  for (int n_block = blocks_n - 1; n_block >= 0; --n_block) {
    const int n0 = n_block * kBlockN;
    ptx::cp_async_wait<0>();
    __syncthreads();  // K(n) has arrived; V(n + 1) has been read by every warp
    load_tile_async(sV, p.head_dim_padded, key_row(params.v, n0, TV{}));
    ptx::cp_async_commit();

    float rS[1][kN][4] = {};  // [16, kBlockN] logits in log2 units
    warp_gemm<OpS, false, false>(rS, sQ, warp * 16, sK, 0);

    const bool all_allowed =
        key_mask == nullptr && visible.all_allowed(m0, m0 + kBlockM, n0, n0 + kBlockN);
    if (!all_allowed) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = m0 + warp * 16 + lane / 4 + (e / 2) * 8;
          const int j = n0 + n * 8 + 2 * (lane % 4) + e % 2;
          if (!visible.allowed(i, j) || (key_mask != nullptr && !key_mask[j])) {
            rS[0][n][e] = -INFINITY;
          }
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        rS[0][n][e] = ptx::ex2(rS[0][n][e] - params.shift);
        rL[e / 2] += rS[0][n][e];
      }
    }

    ptx::cp_async_wait<0>();
    __syncthreads();  // V(n) has arrived; K(n) has been read by every warp
    if (n_block > 0) {
      load_tile_async(sK, p.head_dim_padded, key_row(params.k_hat, n0 - kBlockN, TS{}));
      ptx::cp_async_commit();
    }
    warp_gemm_accum<OpV>(rO, rS[0], sV);
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    rL[half] += __shfl_xor_sync(0xffffffff, rL[half], 1);
    rL[half] += __shfl_xor_sync(0xffffffff, rL[half], 2);
    const int i = m0 + warp * 16 + lane / 4 + half * 8;
    if (i >= p.seqlen_q) continue;
    const bool live = rL[half] > 0.f;
    const float inverse = 1.f / rL[half];
    if (lane % 4 == 0) {
      params.lse[(b * p.num_heads + head) * p.seqlen_q + i] =
          live ? (log2f(rL[half]) + params.shift) * kLn2 : -INFINITY;
    }
    TV* out = params.out.row<TV>(b, head, i);
#pragma unroll
    for (int n = 0; n < kNV; ++n) {
      // A dead row is zero even where a live key of another row holds inf: P = 0 made that NaN.
      const float x = live ? rO[n][half * 2] * inverse : 0.f;
      const float y = live ? rO[n][half * 2 + 1] * inverse : 0.f;
      store_pair<OpV>(out, n * 8 + 2 * (lane % 4), p.head_dim, x, y);
    }
  }
}

}  // namespace jca::sm80
