// Decode of the portable family: few query rows against many keys, bound by the bytes of k and v.
//
// The query heads of one kv head are packed into one tile of rows, so each key and value is read once, as
// it lies in memory: a key's norm is taken from the tile that the product needs anyway. Queries are raw too:
// their norm and scale are a factor of the finished product. CTAs split the keys. Logits are bounded,
// P = exp(S - c) has the same constant c everywhere, and so partial results are plain sums, which a second
// kernel adds up (splits.h).
#pragma once

#include "kernels/sm80/fwd.h"
#include "kernels/splits.h"

namespace jca::sm80 {

// Packed row r is query r % T of head r / T of the kv head: the order in which lse has them.
//
// A team of kTeamWarps warps, 16 rows each, streams keys through a pipeline of its own; the teams of a CTA
// share its keys out, and meet once, when they add up. Either a warp is a team, and needs no barrier, or
// all are one.
template <class Op_, int kHeadDim_, int kTeamWarps_>
struct DecodeTile {
  using Op = Op_;
  static constexpr bool kUnbounded = false, kSmall = false;
  static constexpr int kHeadDim = kHeadDim_, kTeamWarps = kTeamWarps_;
  static constexpr int kBlockM = 16 * kTeamWarps;
  static constexpr int kBlockN = kHeadDim <= 128 ? 64 : 32;  // keys of a stage, of all teams
  static constexpr int kWarps = kTeamWarps > kBlockN / 16 ? kTeamWarps : kBlockN / 16;
  static constexpr int kTeams = kWarps / kTeamWarps;
  static_assert(kTeamWarps == 1 || kTeams == 1);
  static constexpr int kTeamKeys = kBlockN / kTeams;
  static constexpr int kThreads = 32 * kWarps;
  static_assert(kWarps == 4);  // that share out lookups
  // Two CTAs on an SM of 228 KB have 128 KB in flight, several times what latency asks for; one fits into
  // the 99 KB of sm_86.
  static constexpr int kStages = kHeadDim <= 64 ? 4 : 3;
  static constexpr int kMinBlocks = 2;
  using TileKV = SmemTile<typename Op::T, kTeamKeys, kHeadDim>;
  static constexpr int kSmemBytes = kStages * kTeams * 2 * TileKV::kBytes;
  static_assert(kSmemBytes >= kTeams * kBlockM * (kHeadDim + 4) * int(sizeof(float)));
};

// 1 / the norm of row lane / 4 + 8 * half of q, after that row has been divided by a power of two near its
// largest element, so that 1e30 does not overflow: that is exact, but for elements of float16 2^14 times
// smaller. Done to float16 too, in place: of unchanged rows the compiler keeps float32 copies, 520 bytes of
// spills at H 256.
template <class Op, int kSteps>
__device__ inline float inverse_norm(typename Op::A (&q)[kSteps], int half) {
  float largest = 0.f;
#pragma unroll
  for (int i = 0; i < 2 * kSteps; ++i) {
    const float2 x = Op::unpack(q[i / 2].r[i % 2 * 2 + half]);
    largest = fmaxf(largest, fmaxf(fabsf(x.x), fabsf(x.y)));
  }
  largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 1));
  largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 2));
  const int exponent = min(__float_as_int(largest) >> 23, 253);
  const float power = __int_as_float((254 - exponent) << 23);
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < 2 * kSteps; ++i) {
    uint32_t& pair = q[i / 2].r[i % 2 * 2 + half];
    const float2 x = Op::unpack(pair);
    pair = Op::pack(x.x * power, x.y * power);
    squares = fmaf(x.x * power, x.x * power, fmaf(x.y * power, x.y * power, squares));
  }
  squares += __shfl_xor_sync(0xffffffff, squares, 1);
  squares += __shfl_xor_sync(0xffffffff, squares, 2);
  return 1.f / fmaxf(sqrtf(squares), kMinNorm * power);
}

// s += q k^T of this warp's rows and 16 keys, from row n0 of the tile on. With kSquares, squares[n] +=
// this thread's share of the sum of squares of key n * 8 + lane / 4; with kFactor, those keys are
// multiplied by factor[n] first.
template <class Op, bool kSquares, bool kFactor, int kSteps, class Tile>
__device__ inline void key_products(float (&s)[2][4], float (&squares)[2],
                                    const typename Op::A (&q)[kSteps], const Tile& tile, int n0,
                                    const float (&factor)[2]) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    typename Op::B b[2];
    Op::template load_b<false>(b, tile, n0, step * Op::kK);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      if constexpr (kSquares) {
#pragma unroll
        for (uint32_t& pair : b[n].r) {
          float2 x = Op::unpack(pair);
          if constexpr (kFactor) {
            x = {x.x * factor[n], x.y * factor[n]};
            pair = Op::pack(x.x, x.y);
          }
          squares[n] = fmaf(x.x, x.x, fmaf(x.y, x.y, squares[n]));
        }
      }
      Op::mma(s[n], q[step], b[n]);
    }
  }
  if constexpr (kSquares) {
#pragma unroll
    for (float& sum : squares) {
      sum += __shfl_xor_sync(0xffffffff, sum, 1);
      sum += __shfl_xor_sync(0xffffffff, sum, 2);
    }
  }
}

// The same with unit keys.
template <class Op, int kSteps, class Tile>
__device__ inline void unit_key_products(float (&s)[2][4], const typename Op::A (&q)[kSteps],
                                         const Tile& tile, int n0) {
  float squares[2] = {0.f, 0.f};
  key_products<Op, true, false>(s, squares, q, tile, n0, {1.f, 1.f});
  if constexpr (Op::kSquaresOverflow) {
    // Keys too long for their squares are taken again, made shorter by a power of two: that is exact.
    const bool too_long[2] = {squares[0] == INFINITY, squares[1] == INFINITY};
    if (__any_sync(0xffffffff, too_long[0] || too_long[1])) {
      const float factor[2] = {too_long[0] ? 0x1p-80f : 1.f, too_long[1] ? 0x1p-80f : 1.f};
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        squares[n] = 0.f;
#pragma unroll
        for (float& x : s[n]) x = 0.f;
      }
      key_products<Op, true, true>(s, squares, q, tile, n0, factor);
    }
  }
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const float inverse_norm = fminf(rsqrtf(squares[n]), 1.f / kMinNorm);
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      // The norm of this thread's column is with the lanes that hold that key.
      const float r = __shfl_sync(0xffffffff, inverse_norm, 4 * (2 * (threadIdx.x % 4) + x));
      s[n][x] *= r;
      s[n][2 + x] *= r;
    }
  }
}

// Grid: x = K * splits * B, the kv head running fastest: heads of one key are neighbours in memory.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kMinBlocks)
    cosine_attn_decode_sm80(const DecodeParams params) {
  using Op = typename Tile::Op;
  using T = typename Op::T;
  using TileKV = typename Tile::TileKV;
  constexpr int kHeadDim = Tile::kHeadDim, kBlockN = Tile::kBlockN, kStages = Tile::kStages;
  constexpr int kTeams = Tile::kTeams, kTeamThreads = 32 * Tile::kTeamWarps;
  constexpr int kSteps = kHeadDim / Op::kK, kNV = kHeadDim / 8;

  // As soon as that: when every CTA has its place, the next kernel cannot take one.
  ptx::launch_dependent_grids();
  const Problem& p = params.problem;
  const int head_kv = blockIdx.x % p.num_heads_kv;
  const int split = blockIdx.x / p.num_heads_kv % params.splits;
  const int b = blockIdx.x / p.num_heads_kv / params.splits;
  const int group = p.num_heads / p.num_heads_kv, head = head_kv * group;
  const int rows = group * p.seqlen_q;
  const int lane = threadIdx.x % 32, team = threadIdx.x / kTeamThreads;
  const int team_thread = threadIdx.x % kTeamThreads;
  const int m0 = team_thread / 32 * 16;  // this warp's first row

  extern __shared__ __align__(128) char smem[];
  __shared__ BlockWindow windows[Tile::kWarps];
  // What the stages hold, as 2 * block + whether all pairs are allowed; every warp's own.
  __shared__ int stage_blocks[Tile::kWarps][kStages];
  constexpr int kNotYet = -2, kNone = -1;
  __shared__ Rows::Head<const T> queries, keys_and_values[2];
  // Beside what the first warp looks up: batch indices cost divisions, and no key is on its way yet.
  if (threadIdx.x == 32 || threadIdx.x == 64) {
    const int which = threadIdx.x / 64;
    keys_and_values[which] = (which == 0 ? params.k : params.v).head<const T>(b, head_kv);
  } else if (threadIdx.x == 96) {
    queries = params.q.head<const T>(b, head);
  }
  __shared__ Visible visible;
  Visible::init(visible, p, b);

  const KeyShares shares(visible, p.seqlen_q, params.splits);
  if (!shares.has_result(split)) return;

  const auto first_key_of = [&](int block) { return block * kBlockN + team * Tile::kTeamKeys; };
  const auto kind_of = [&](int block) {
    const int j0 = first_key_of(block);
    BlockKind kind{false, true};
#pragma unroll 1
    for (int g = 0; g < (p.mask.heads > 1 ? group : 1); ++g) {
      const BlockKind of_head =
          visible.block(p, head + g, 0, p.seqlen_q, j0, j0 + Tile::kTeamKeys);
      kind = {kind.any || of_head.any, kind.all && of_head.all};
    }
    return kind;
  };
  const auto tile = [&](int stage, int which) {
    return TileKV{reinterpret_cast<T*>(smem + ((stage * kTeams + team) * 2 + which) * TileKV::kBytes)};
  };
  // `from` by value: in shared memory it would be looked up again for each copy.
  const auto load_keys = [&](const TileKV& to, const Rows::Head<const T> from, int j0) {
    load_rows_async<kTeamThreads>(to, p.head_dim, from, j0, visible.seqlen_k, visible.keys,
                                  team_thread);
  };

  const auto row_of = [&](int half) { return m0 + lane / 4 + 8 * half; };
  const auto hide_pairs = [&](float (&s)[2][4], int j0) {
    const FragmentAt at(m0, j0);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = at.row_of(0, 2 * half), i = r % p.seqlen_q;
      const int j = at.col_of(0, 0);
      const unsigned word =
          r < rows ? visible.allowed(p, head + r / p.seqlen_q, i, j / 32) >> (j % 32) : 0;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int bit = e / 2 * 8 + e % 2;
        if (!(word >> bit & 1) || !visible.in_one_segment(i, j + bit)) {
          s[e / 2][2 * half + e % 2] = -INFINITY;
        }
      }
    }
  };

  typename Op::A rQ[kSteps];
  float factor[2];  // of a row's products with unit keys, in units of log2 e
  float rO[kNV][4] = {};
  float rL[2] = {0.f, 0.f};
  BlockWindow& window = windows[threadIdx.x / 32];
  int* const in_stage = stage_blocks[threadIdx.x / 32];
  for (int stage = 0; stage < kStages; ++stage) in_stage[stage] = kNotYet;
  static_assert(kShareKeys % kBlockN == 0);
  const int end = (shares.end(split) + kBlockN - 1) / kBlockN;
  int block = window.seek(shares.begin(split) / kBlockN, end, kind_of);
  for (int stage = 0;;) {
    ptx::cp_async_wait<kStages - 2>();
    // The oldest block has arrived, and the one before it has been read, for the whole team.
    if constexpr (Tile::kTeamWarps == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
    if (block >= 0) {
      const int j0 = first_key_of(block);
#pragma unroll 1
      for (int which = 0; which < 2; ++which) {
        load_keys(tile(stage, which), keys_and_values[which], j0);
      }
      in_stage[stage] = 2 * block + window.is_all(block);
      block = window.next(block, kind_of);
    } else {
      in_stage[stage] = kNone;
    }
    ptx::cp_async_commit();
    stage = stage == kStages - 1 ? 0 : stage + 1;
    const int oldest = in_stage[stage];
    if (oldest == kNone) break;
    if (m0 >= rows) continue;  // warps without rows help to load
    if (oldest == kNotYet) {
      if (stage < kStages - 1) continue;
      // Taken here, where the first keys are on their way.
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = row_of(half);
        const T* const row = queries.row(r % p.seqlen_q) + r / p.seqlen_q * params.q.stride_head;
#pragma unroll
        for (int i = 0; i < 2 * kSteps; ++i) {
          const int h = i * 8 + 2 * (lane % 4);
          rQ[i / 2].r[i % 2 * 2 + half] =
              r < rows && h < p.head_dim ? *reinterpret_cast<const uint32_t*>(row + h) : 0;
        }
        factor[half] = r < rows ? p.scale(b, head + r / p.seqlen_q) * kLog2e : 0.f;
        if (p.l2norm) factor[half] *= inverse_norm<Op>(rQ, half);
      }
      continue;
    }

    const TileKV sK = tile(stage, 0), sV = tile(stage, 1);
    const bool all = oldest % 2;
#pragma unroll 1
    for (int n0 = 0; n0 < Tile::kTeamKeys; n0 += 16) {
      float rS[1][2][4] = {};
      if (p.l2norm) {
        unit_key_products<Op>(rS[0], rQ, sK, n0);
      } else {
        float none[2];
        key_products<Op, false, false>(rS[0], none, rQ, sK, n0, {1.f, 1.f});
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          rS[0][n][e] = fmaf(rS[0][n][e], factor[e / 2], -params.shift_log2);
        }
      }
      if (!all) hide_pairs(rS[0], first_key_of(oldest / 2) + n0);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          rS[0][n][e] = ptx::ex2(rS[0][n][e]);
          rL[e / 2] += rS[0][n][e];
        }
      }
      // Zeros in v for keys that no row of the warp sees: they may be dead and hold NaN, and 0 * NaN is
      // NaN. Columns of P and rows of v are spread over the lanes alike.
      uint32_t keep[2] = {0xffffffff, 0xffffffff};
      if (!all) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const float* weights = rS[0][n];
          keep[n] = (weights[0] + weights[2] != 0.f ? 0xffffu : 0u) |
                    (weights[1] + weights[3] != 0.f ? 0xffff0000u : 0u);
#pragma unroll
          for (int d = 4; d < 32; d *= 2) keep[n] |= __shfl_xor_sync(0xffffffff, keep[n], d);
        }
      }
      typename Op::A weights;
      Op::from_accum(weights, rS[0], 0);
#pragma unroll
      for (int n = 0; n < kNV; n += 2) {
        typename Op::B v[2];
        Op::template load_b<true>(v, sV, n * 8, n0);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          v[i].r[0] &= keep[0];
          v[i].r[1] &= keep[1];
          Op::mma(rO[n + i], weights, v[i]);
        }
      }
    }
  }

  // A partial result: rows of O~, and l in the column after.
  const int width = p.head_dim + 4;
  float* const team_partials = reinterpret_cast<float*>(smem);
  __syncthreads();  // every team has read its last stage
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float l = rL[half];
    l += __shfl_xor_sync(0xffffffff, l, 1);
    l += __shfl_xor_sync(0xffffffff, l, 2);
    const int r = m0 + lane / 4 + half * 8;
    if (r >= rows) continue;
    float* const row = team_partials + (team * rows + r) * width;
    if (lane % 4 == 0) *reinterpret_cast<float4*>(row + p.head_dim) = {l, 0.f, 0.f, 0.f};
#pragma unroll
    for (int n = 0; n < kNV; ++n) {
      const int h = n * 8 + 2 * (lane % 4);
      if (h < p.head_dim) {
        *reinterpret_cast<float2*>(row + h) = {rO[n][2 * half], rO[n][2 * half + 1]};
      }
    }
  }
  __syncthreads();

  const int chunks = width / 4, size = rows * width;
  const int64_t first_row = (int64_t(b) * p.num_heads + head) * p.seqlen_q;
  float4* const partials = reinterpret_cast<float4*>(params.partials) + first_row * params.splits * chunks;
  const auto sum_of_teams = [&](int offset) {
    float4 total{0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int t = 0; t < kTeams; ++t) {
      const float4 x = *reinterpret_cast<const float4*>(team_partials + t * size + offset);
      total = {total.x + x.x, total.y + x.y, total.z + x.z, total.w + x.w};
    }
    return total;
  };
  for (int item = threadIdx.x; item < rows * chunks; item += Tile::kThreads) {
    const int r = item / chunks, chunk = item % chunks;
    const float4 sums = sum_of_teams(4 * item);
    if (params.splits > 1) {
      partials[(r * params.splits + split) * chunks + chunk] = sums;
    } else if (chunk < chunks - 1) {
      const float l = sum_of_teams(r * width + p.head_dim).x;
      T* const out = params.out.head<T>(b, head + r / p.seqlen_q).row(r % p.seqlen_q);
      write_quotient(params, out, first_row + r, 4 * chunk, sums, l);
    }
  }
}

}  // namespace jca::sm80
