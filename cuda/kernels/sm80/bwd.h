// Backward of the portable family (sm_80 on: mma.sync, ldmatrix, cp.async).
//
// One CTA owns kBlockN keys of one kv head and walks over the query blocks of every query head of its
// group, so that dk and dv stay in registers whatever the grouping; dq leaves as float32 reductions, in any
// order: ordered.h has the kernels for one order.
// With S in log2 units (q^ carries scale * log2 e; without a bound scale alone, S in natural units):
//   P = exp2(S - lse), dP = dO v^T, dS = P (dP - delta)
//   dv = P^T dO, dk^ = ln2 dS^T q^ (so scale comes in per query head), dq^ / scale = dS k^
// The norm's backward turns dk^ into dk in the epilogue; finish_dq does the same for q.
#pragma once

#include "kernels/bias.h"
#include "kernels/rows.h"
#include "kernels/sm80/tile.h"
#include "kernels/visible.h"

namespace jca::sm80 {

// kUnbounded: with biases, logits in natural units. Warps are split kWarps*M by kWarps / kWarps*M over each
// product. Blocks and stages: what 163 KB of shared memory (sm_80; kSmall: 99 KB) and 255 registers allow.
template <class Op_, int kHeadDim_, bool kUnbounded_, bool kSmall_ = false>
struct BwdTile {
  static constexpr bool kUnbounded = kUnbounded_, kSmall = kSmall_;
  using Op = Op_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kIsFloat = sizeof(typename Op::T) == 4;
  // kSmall: a square block of pairs.
  static constexpr int kSide = (kHeadDim <= 128 ? 64 : 32) / (kIsFloat ? 2 : 1);
  static constexpr int kWarps = kSmall ? kSide / 8 : 8, kThreads = kWarps * 32;
  // Half an ulp of a bounded lse is far below the rounding of 16-bit weights.
  static constexpr bool kExactLse = kIsFloat || kUnbounded;
  static constexpr int kBlockM = kSmall ? kSide : !kIsFloat || kHeadDim <= 96 ? 64 : 32;
  static constexpr int kBlockN = kSmall ? kSide : (kHeadDim <= 128 ? 128 : 64) / (kIsFloat ? 2 : 1);
  static constexpr int kStages = (kSmall || kHeadDim == 256 || (kIsFloat && kHeadDim == 96)) ? 1 : 2;
  // S and dP [kBlockM, kBlockN]
  static constexpr int kWarpsSM = kBlockM / 16;
  // dk and dv [kBlockN, kHeadDim]
  static constexpr int kWarpsKM = kBlockN >= 64 ? 4 : kBlockN / 16;
  // dq [kBlockM, kHeadDim]
  static constexpr int kWarpsQM = kBlockM / 16;
  using TileQ = SmemTile<typename Op::T, kBlockM, kHeadDim>;
  using TileK = SmemTile<typename Op::T, kBlockN, kHeadDim>;
  using TileP = SmemTile<typename Op::T, kBlockM, kBlockN>;
  // sK sV | sQ sdO a stage | sP sdS | row stats a stage; the dk epilogue reuses the front.
  static constexpr int kStatsBytes = kRowStats * kBlockM * sizeof(float);
  static constexpr int kSmemBytes =
      2 * TileK::kBytes + kStages * (2 * TileQ::kBytes + kStatsBytes) + 2 * TileP::kBytes;
  static constexpr int kDkPitch = kHeadDim + 4;  // floats
  static_assert(kBlockN * kDkPitch * int(sizeof(float)) <= kSmemBytes);
};

// This warp's block of a product over [kRows, kCols] split kWarpsM by 8 / kWarpsM.
template <int kRows, int kCols, int kWarpsM, int kWarps>
struct WarpBlock {
  static constexpr int kM = kRows / kWarpsM / 16;
  static constexpr int kN = kCols / (kWarps / kWarpsM) / 8;
  int m0, n0;
  __device__ WarpBlock()
      : m0(int(threadIdx.x) / 32 % kWarpsM * kM * 16), n0(int(threadIdx.x) / 32 / kWarpsM * kN * 8) {}
};

// Dead keys may hold NaN, and 0 * NaN is NaN: those of the tiles that hold any become zeros. Whether such
// a key is dead is looked up pair by pair.
template <int kThreads, class Tile>
__device__ inline void clear_dead_keys(const Tile& k, const Tile& v, const Problem& p,
                                       const Visible& visible, int head, int group, int n0) {
  if (!__syncthreads_or(copied_nonfinite<kThreads>(k) || copied_nonfinite<kThreads>(v))) return;
  __shared__ bool sSuspect[Tile::kRows];
  for (int r = threadIdx.x; r < Tile::kRows; r += kThreads) sSuspect[r] = false;
  __syncthreads();
  for (int i = threadIdx.x; i < Tile::kRows * Tile::kCols; i += kThreads) {
    const int r = i / Tile::kCols, c = i % Tile::kCols;
    const float x = static_cast<float>(*k.at(r, c)) * 0.f + static_cast<float>(*v.at(r, c)) * 0.f;
    if (x != 0.f) sSuspect[r] = true;
  }
  __syncthreads();
  for (int r = 0; r < Tile::kRows; ++r) {
    if (!sSuspect[r]) continue;
    bool seen = false;
    for (int h = head; h < head + group; ++h) {
      for (int i = threadIdx.x; i < visible.seqlen_q && !seen; i += kThreads) {
        seen = is_allowed(p, visible, h, i, n0 + r);
      }
    }
    if (__syncthreads_or(seen)) continue;
    for (int c = threadIdx.x; c < Tile::kCols; c += kThreads) {
      *k.at(r, c) = *v.at(r, c) = typename Tile::T(0.f);
    }
  }
  __syncthreads();
}

// Grid: x = key blocks * K * B, the key block running fastest.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) cosine_attn_bwd_sm80(const BwdParams params) {
  using Op = typename Tile::Op;
  using T = typename Op::T;
  constexpr int kBlockM = Tile::kBlockM, kBlockN = Tile::kBlockN, kHeadDim = Tile::kHeadDim;
  constexpr int kStages = Tile::kStages, kThreads = Tile::kThreads;

  const Problem& p = params.problem;
  const int blocks_n = (p.seqlen_k + kBlockN - 1) / kBlockN;
  const int n0 = blockIdx.x % blocks_n * kBlockN;
  const int head_kv = blockIdx.x / blocks_n % p.num_heads_kv;
  const int b = blockIdx.x / blocks_n / p.num_heads_kv;
  const int group = p.num_heads / p.num_heads_kv;
  const int lane = threadIdx.x % 32;

  extern __shared__ __align__(128) char smem[];
  char* carve = smem;
  const auto take = [&carve](int bytes) {
    char* at = carve;
    carve += bytes;
    return at;
  };
  const typename Tile::TileK sK{reinterpret_cast<T*>(take(Tile::TileK::kBytes))};
  const typename Tile::TileK sV{reinterpret_cast<T*>(take(Tile::TileK::kBytes))};
  char* const stages = take(kStages * 2 * Tile::TileQ::kBytes);
  const typename Tile::TileP sP{reinterpret_cast<T*>(take(Tile::TileP::kBytes))};
  const typename Tile::TileP sdS{reinterpret_cast<T*>(take(Tile::TileP::kBytes))};
  float* sStats = reinterpret_cast<float*>(take(kStages * Tile::kStatsBytes));

  const auto stage_q = [&](int stage) {
    return typename Tile::TileQ{reinterpret_cast<T*>(stages + stage * 2 * Tile::TileQ::kBytes)};
  };
  const auto stage_do = [&](int stage) {
    return typename Tile::TileQ{reinterpret_cast<T*>(stages + (stage * 2 + 1) * Tile::TileQ::kBytes)};
  };

  __shared__ Visible visible;
  __shared__ BlockWindow windows[Tile::kWarps];
  BlockWindow& window = windows[threadIdx.x / 32];
  Visible::init(visible, p, b);

  // Head 0 of q^ and dO; the heads of the group follow at their strides.
  const auto gQ = params.q_hat.head<const T>(b, 0);
  const auto gdO = params.dout.head<const T>(b, 0);
  const auto load_stage = [&](int stage, int head, int m0) {
    const auto load = [&](const auto& tile, auto rows, int64_t stride_head) {
      rows.data += head * stride_head;
      load_rows_async<kThreads>(tile, p.head_dim_padded, rows, m0, visible.seqlen_q);
    };
    load(stage_q(stage), gQ, params.q_hat.stride_head);
    load(stage_do(stage), gdO, params.dout.stride_head);
    // A thread copies 4 values: the first kBlockM / 4 threads of lse, the next of the next stat.
    if (threadIdx.x < kRowStats * kBlockM / 4) {
      const int stat = threadIdx.x / (kBlockM / 4), r = threadIdx.x % (kBlockM / 4) * 4;
      ptx::cp_async_16(
          ptx::smem_address(sStats + (stage * kRowStats + stat) * kBlockM + r),
          params.stats.row(int64_t(b) * p.num_heads + head, RowStat(stat)) + m0 + r, true);
    }
    ptx::cp_async_commit();
  };

  const WarpBlock<kBlockN, kHeadDim, Tile::kWarpsKM, Tile::kWarps> at_dk;
  constexpr int kMK = decltype(at_dk)::kM, kNK = decltype(at_dk)::kN;
  float rdK[kMK][kNK][4] = {}, rdV[kMK][kNK][4] = {};

  const auto load_keys = [&](const auto& tile, const auto& rows) {
    load_rows_async<kThreads>(tile, p.head_dim_padded, rows, n0, visible.seqlen_k, visible.keys);
  };
  // A step is one block of query rows of one query head; m_block -1 after the last one.
  int head = head_kv * group;
  const auto end_m = [&] { return (visible.q_end(n0, n0 + kBlockN) + kBlockM - 1) / kBlockM; };
  const auto kind_of = [&](int m_block) {
    return visible.block(p, head, m_block * kBlockM, (m_block + 1) * kBlockM, n0, n0 + kBlockN);
  };
  const auto seek = [&] {
    int m_block;
    do {
      m_block = window.seek(visible.q_begin(n0) / kBlockM, end_m(), kind_of);
    } while (m_block < 0 && ++head < (head_kv + 1) * group);
    return m_block;
  };
  int m_block = seek();
  if (m_block >= 0) {
    load_keys(sK, params.k_hat.head<const T>(b, head_kv));
    load_keys(sV, params.v.head<const T>(b, head_kv));
    load_stage(0, head, m_block * kBlockM);
    if (may_leave_dead_keys(p)) {
      ptx::cp_async_wait<0>();
      clear_dead_keys<kThreads>(sK, sV, p, visible, head_kv * group, group, n0);
    }
  }

  for (int stage = 0; m_block >= 0; stage = (stage + 1) % kStages) {
    const int m0 = m_block * kBlockM, this_head = head;
    const bool all_allowed = window.is_all(m_block);
    const float* sLse = sStats + stage * kRowStats * kBlockM;
    const float* sLseLow = sLse + kLseLow * kBlockM;
    const float* sDelta = sLse + kDelta * kBlockM;
    const typename Tile::TileQ sQ = stage_q(stage), sdO = stage_do(stage);
    ptx::cp_async_wait<0>();
    // Dead rows of q and dO may hold NaN: P = 0 does not silence them in the products, zero rows do.
    // Each thread looks at the values it copied itself, which the wait has made visible to it.
    bool dead = false;
    if (threadIdx.x < kBlockM / 4) {
      for (int r = 0; r < 4; ++r) dead = dead || sLse[threadIdx.x * 4 + r] == INFINITY;
    }
    if (__syncthreads_or(dead)) {  // this step's tiles have arrived; the last step's are free
      for (int i = threadIdx.x; i < kBlockM * kHeadDim; i += kThreads) {
        if (sLse[i / kHeadDim] == INFINITY) {
          *sQ.at(i / kHeadDim, i % kHeadDim) = T(0.f);
          *sdO.at(i / kHeadDim, i % kHeadDim) = T(0.f);
        }
      }
      __syncthreads();
    }
    m_block = window.next(m_block, kind_of);
    if (m_block < 0 && ++head < (head_kv + 1) * group) m_block = seek();
    if (kStages == 2 && m_block >= 0) load_stage(1 - stage, head, m_block * kBlockM);

    {
      const WarpBlock<kBlockM, kBlockN, Tile::kWarpsSM, Tile::kWarps> at;
      constexpr int kM = decltype(at)::kM, kN = decltype(at)::kN;
      float rP[kM][kN][4] = {}, rdP[kM][kN][4] = {};
      warp_gemm<Op, false, false>(rP, sQ, at.m0, sK, at.n0);

      const FragmentAt pairs(m0 + at.m0, n0 + at.n0);
      if constexpr (Tile::kUnbounded) add_biases(rP, p, visible, this_head, pairs);
      if (!all_allowed) hide(rP, p, visible, this_head, pairs);
      // Visits this thread's pairs of neighbouring elements: row and column in the tile.
      const auto for_each_pair = [&](auto f) {
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int n = 0; n < kN; ++n)
              f(m, n, half * 2, at.m0 + m * 16 + lane / 4 + half * 8,
                at.n0 + n * 8 + 2 * (lane % 4));
      };
      const auto weight = [&](float s, int r) {
        const float x = Tile::kExactLse ? s - sLse[r] - sLseLow[r] : s - sLse[r];
        return ptx::ex2(Tile::kUnbounded ? x * kLog2e : x);
      };
      // This thread's share of the sums of P S, S without biases, and of dS over rows lane / 4 and
      // lane / 4 + 8.
      float rPS[kM][2] = {}, rSumdS[kM][2] = {};
      if (params.row_sums != nullptr) {
        float rBias[kM][kN][4] = {};
        if constexpr (Tile::kUnbounded) add_biases(rBias, p, visible, this_head, pairs);
        for_each_pair([&](int m, int n, int e, int r, int c) {
#pragma unroll
          for (int x = 0; x < 2; ++x) {
            const float s = rP[m][n][e + x], w = weight(s, r);
            if (w != 0.f) rPS[m][e / 2] += w * (s - rBias[m][n][e + x]);
          }
        });
      }
      for_each_pair([&](int m, int n, int e, int r, int c) {
        rP[m][n][e] = weight(rP[m][n][e], r);
        rP[m][n][e + 1] = weight(rP[m][n][e + 1], r);
        Op::store2(sP.at(r, c), rP[m][n][e], rP[m][n][e + 1]);
      });
      warp_gemm<Op, false, false>(rdP, sdO, at.m0, sV, at.n0);
      float (&rdS)[kM][kN][4] = rdP;
      for_each_pair([&](int m, int n, int e, int r, int c) {
        rdS[m][n][e] = rP[m][n][e] * (rdP[m][n][e] - sDelta[r]);
        rdS[m][n][e + 1] = rP[m][n][e + 1] * (rdP[m][n][e + 1] - sDelta[r]);
        Op::store2(sdS.at(r, c), rdS[m][n][e], rdS[m][n][e + 1]);
      });
      if constexpr (Tile::kUnbounded) {
        if (params.dbias.data != nullptr) {
          add_to_dbias(params.dbias, rdS, visible, this_head, pairs);
        }
      }
      if (params.row_sums != nullptr) {
        for_each_pair([&](int m, int n, int e, int r, int c) {
          rSumdS[m][e / 2] += rdS[m][n][e] + rdS[m][n][e + 1];
        });
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int i = m0 + at.m0 + m * 16 + lane / 4 + half * 8;
#pragma unroll
            for (int d = 1; d < 4; d *= 2) {
              rSumdS[m][half] += __shfl_xor_sync(0xffffffff, rSumdS[m][half], d);
              rPS[m][half] += __shfl_xor_sync(0xffffffff, rPS[m][half], d);
            }
            if (lane % 4 == 0 && i < visible.seqlen_q) {
              float2* sums = params.row_sums + (int64_t(b) * p.num_heads + this_head) * p.seqlen_q + i;
              ptx::red_add_x2(&sums->x, rSumdS[m][half], rPS[m][half]);
            }
          }
        }
      }
    }
    __syncthreads();  // P and dS are complete
    if constexpr (Tile::kUnbounded) {
      if (params.drelative_bias.data != nullptr) {
        add_to_drelative_bias(params.drelative_bias, sdS, p, visible, this_head, m0, n0);
      }
    }

    warp_gemm<Op, true, true>(rdV, sP, at_dk.m0, sdO, at_dk.n0);
    warp_gemm<Op, true, true>(rdK, sdS, at_dk.m0, sQ, at_dk.n0);
    if (!Tile::kUnbounded || params.dq_accum != nullptr) {
      const WarpBlock<kBlockM, kHeadDim, Tile::kWarpsQM, Tile::kWarps> at;
      constexpr int kM = decltype(at)::kM, kN = decltype(at)::kN;
      // 32 columns at a time: dk and dv already hold half of the registers at H = 128 and 256.
      constexpr int kPart = kN % 4 == 0 ? 4 : kN;
      using Accum = typename Op::Accum;
      const int64_t head_row = (int64_t(b) * p.num_heads + this_head) * p.seqlen_q;
      Accum* dq = static_cast<Accum*>(params.dq_accum) + head_row * p.head_dim_padded;
#pragma unroll 1
      for (int n1 = at.n0; n1 < at.n0 + kN * 8; n1 += kPart * 8) {
        float rdQ[kM][kPart][4] = {};
        warp_gemm<Op, false, true>(rdQ, sdS, at.m0, sK, n1);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int i = m0 + at.m0 + m * 16 + lane / 4 + half * 8;
            if (i >= visible.seqlen_q) continue;
#pragma unroll
            for (int n = 0; n < kPart; ++n) {
              const int h = n1 + n * 8 + 2 * (lane % 4);
              if (h < p.head_dim_padded) {
                ptx::red_add_x2(dq + int64_t(i) * p.head_dim_padded + h, rdQ[m][n][half * 2],
                                rdQ[m][n][half * 2 + 1]);
              }
            }
          }
        }
      }
    }
    if (kStages == 1 && m_block >= 0) {
      __syncthreads();  // every warp is done with the only stage
      load_stage(0, head, m_block * kBlockM);
    }
  }

  // dv straight from the registers; dk through shared memory, one row to a group of lanes.
  __syncthreads();
  // Keys that are not in a list have been given zeros.
  const int end_key = p.mask.keys == nullptr ? p.seqlen_k : visible.seqlen_k;
  float* sdK = reinterpret_cast<float*>(smem);
  const auto gdV = params.dv.head<T>(b, head_kv);
#pragma unroll
  for (int m = 0; m < kMK; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = at_dk.m0 + m * 16 + lane / 4 + half * 8;
#pragma unroll
      for (int n = 0; n < kNK; ++n) {
        const int h = at_dk.n0 + n * 8 + 2 * (lane % 4);
        sdK[r * Tile::kDkPitch + h] = rdK[m][n][half * 2];
        sdK[r * Tile::kDkPitch + h + 1] = rdK[m][n][half * 2 + 1];
        if (n0 + r < end_key) {
          store_pair<Op>(gdV.row(visible.position(n0 + r)), h, p.head_dim, rdV[m][n][half * 2],
                         rdV[m][n][half * 2 + 1]);
        }
      }
    }
  }
  __syncthreads();
  constexpr int kLanes = kHeadDim <= 32 ? 4 : kHeadDim <= 64 ? 8 : kHeadDim <= 128 ? 16 : 32;
  using L = RowLanes<kLanes>;
  const auto gK = params.k_raw.head<const T>(b, head_kv);
  const auto gdK = params.dk.head<T>(b, head_kv);
  const int64_t norm_row = (params.k_hat.batch(b) * p.num_heads_kv + head_kv) * p.seqlen_k;
  // Every lane of a warp takes part in the sums of norm_backward, so the row count is uniform.
  for (int r0 = 0; r0 < kBlockN; r0 += kThreads / kLanes) {
    const int r = r0 + int(threadIdx.x) / kLanes;
    const bool valid = r < kBlockN && n0 + r < end_key;
    const int row = valid ? visible.position(n0 + r) : 0;
    constexpr float unit = Tile::kUnbounded ? 1.f : kLn2;  // q^ carries log2 e
    float a[L::kElems], k[L::kElems], magnitude = 0.f;
#pragma unroll
    for (int e = 0; e < L::kElems; ++e) {
      a[e] = valid && L::first() + e < kHeadDim ? sdK[r * Tile::kDkPitch + L::first() + e] * unit : 0.f;
      magnitude += fabsf(a[e]);
    }
    // A dead key may hold NaN; its gradient, and that of no other key but by accident, is zero here.
    const bool live = L::sum(magnitude) != 0.f;
    L::load(k, gK.row(row), p.head_dim, live);
    L::norm_backward(a, k, params.k_inverse_norm + (norm_row + row) * p.groups, p.groups, p.head_dim,
                     p.l2norm);
    if (valid) L::store(gdK.row(row), a, p.head_dim);
  }
}

}  // namespace jca::sm80
