// Backward on Hopper (sm_90a: wgmma, TMA, mbarriers), 16-bit inputs and bounded logits. The formulas are
// those of sm80/bwd.h, with S in log2 units.
//
// A CTA owns kBlockN keys of one kv head, 64 for each consumer warpgroup, and walks over the query blocks of
// every query head of its group. Products are transposed, S^T = k^ q^T and dP^T = v dO^T, so that P^T and
// dS^T are operands in registers of dv += P^T dO and dk^ += dS^T q^. dS^T also goes through shared memory,
// where both warpgroups read all of it for dQ = dS k^, each for a half; dQ leaves as float32 reductions.
// One producer warp brings q^ and dO with the rows' numbers into rings of tiles, and at H 64 the next tile of
// keys beside this one. Keys are read once; with one norm each the consumers make them unit rows themselves.
// CTAs are persistent and take tiles of keys from a counter. First come the blocks in which some pair is
// forbidden: hiding it takes branches, beside which no product may be in flight (ptxas serialises such, note
// C7514). In the others exp runs beside the product of dP, and dS beside that of dv.
#pragma once

#include "kernels/rows.h"
#include "kernels/sm80/tile.h"
#include "kernels/sm90/norm.h"
#include "kernels/sm90/pipeline.h"
#include "ptx/grid.h"

namespace jca::sm90 {

// What a CTA keeps in shared memory: tiles first, which are swizzled.
template <class T, int kChunks, int kBlockM, int kBlockN, int kStages, int kKeyStages>
struct BwdShared {
  // A tile of keys, handed from the producer to the other warps.
  struct Work {
    int n_block;  // or -1: no more
    int b, head_kv;
    BlockCounts counts;  // of query blocks of all heads of the group
    Visible visible;
  };
  // A block of queries of one head.
  struct Step {
    int m0, head;
    float* dq;  // its first tile
  };
  struct KeyTile {
    T k[kChunks][kBlockN][64], v[kChunks][kBlockN][64];  // dv and dk go the same way
  };

  KeyTile keys[kKeyStages];
  T q[kStages][kChunks][kBlockM][64];
  T dout[kStages][kChunks][kBlockM][64];
  T ds[2][kBlockM / 64][kBlockN][64];  // dS^T of this step and the last
  alignas(16) float lse[kStages][kBlockM];
  alignas(16) float delta[kStages][kBlockM];
  float k_inverse_norm[kBlockN];  // of raw k
  ptx::Mbarrier k_full[kKeyStages], v_full[kKeyStages], keys_empty[kKeyStages];
  ptx::Mbarrier q_full[kStages], q_empty[kStages], dout_full[kStages], dout_empty[kStages];
  ptx::Mbarrier ds_full;
  Work work[kKeyStages + 1];
  Step step[kStages];  // in stage i of q
  BlockWindow window;
  bool suspect[kBlockN];  // by clear_dead_keys
};

// kSums: adds up rows of dS and of P S, for dscale. kStages: of the rings of q^ and dO. kKeyStages: of that
// of keys.
template <class T_, int kHeadDim_, bool kSums_, int kStages_ = 2, int kKeyStages_ = kHeadDim_ <= 64 ? 2 : 1>
struct BwdTile {
  using T = T_;
  static constexpr bool kSums = kSums_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kConsumers = 2;  // warpgroups
  static constexpr int kDsWarps = 4 * kConsumers;  // that make dS
  static constexpr int kBlockM = kHeadDim <= 64 ? 128 : 64, kBlockN = 64 * kConsumers;
  static constexpr int kStages = kStages_, kKeyStages = kKeyStages_;
  static constexpr int kChunks = kHeadDim / 64;  // columns come in chunks of 128 bytes, the swizzle's
  static constexpr int kThreads = 128 * (1 + kConsumers);
  // Of 64 K registers, granted evenly at launch.
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  // Beside 128 queries there are no registers for P in float32: dS = P (dP - delta) takes P as the products
  // do, and in bfloat16, which has the range, multiplies in it.
  static constexpr bool kPackedWeights = kBlockM == 128 || kSums;
  static constexpr bool kPackedProduct = kPackedWeights && !kSums && std::is_same_v<T, __nv_bfloat16>;

  using Shared = BwdShared<T, kChunks, kBlockM, kBlockN, kStages, kKeyStages>;
  static constexpr int kSmemBytes = sizeof(Shared);
};

template <class Tile>
struct BwdKernel {
  using T = typename Tile::T;
  using Shared = typename Tile::Shared;
  using Work = typename Shared::Work;
  using Step = typename Shared::Step;
  using KeyTile = typename Shared::KeyTile;
  using KeyRing = Ring<Tile::kKeyStages>;
  using WorkRing = Ring<Tile::kKeyStages + 1>;
  static constexpr int kBlockM = Tile::kBlockM, kBlockN = Tile::kBlockN, kHeadDim = Tile::kHeadDim;
  static constexpr int kM = kBlockM / 8, kH = kHeadDim / 8;  // blocks of accumulators
  static constexpr int kConsumerThreads = 128 * Tile::kConsumers;
  using Keys = T[Tile::kChunks][kBlockN][64];
  using Queries = T[Tile::kChunks][kBlockM][64];
  enum { kConsumersBarrier = 1, kWarpgroupBarrier = 2 };

  const BwdTmaParams& params;
  const Problem& p;
  Shared& shared;

  __device__ BwdKernel(const BwdTmaParams& params, Shared& shared)
      : params(params), p(params.problem), shared(shared) {}

  __device__ bool reads_list(const Visible& visible) const {
    return params.listed && visible.keys != nullptr;
  }
  __device__ bool k_is_raw(const Visible& visible) const {
    return params.takes_raw_k && !reads_list(visible);
  }
  __device__ int group() const { return p.num_heads / p.num_heads_kv; }
  __device__ int key_blocks() const { return (p.seqlen_k + kBlockN - 1) / kBlockN; }

  // The blocks with the most queries, of a causal call, come first.
  __device__ void locate(Work& work, int tile) const {
    const TilePlace place(tile, params.section, key_blocks(), p.num_heads_kv * p.batch);
    work.n_block = place.block;
    work.b = place.head / p.num_heads_kv;
    work.head_kv = place.head % p.num_heads_kv;
  }

  // ---- The producer warp.

  template <int kRows>
  __device__ static void load(T (&tile)[Tile::kChunks][kRows][64], const CUtensorMap& map,
                              ptx::Mbarrier& full, int row, int head, int entry) {
    for (int c = 0; c < Tile::kChunks; ++c) ptx::tensor_load(tile[c], map, full, 64 * c, row, head, entry);
  }

  // A stage of q^ or dO, with one of the rows' numbers.
  __device__ void load_queries(Queries& tile, float (&numbers)[kBlockM], const CUtensorMap& map,
                               ptx::Mbarrier& full, RowStat stat, int b, int head, int m0) const {
    full.arrive_and_expect(sizeof(tile) + sizeof(numbers));
    load(tile, map, full, m0, head, b);
    ptx::bulk_load(numbers, params.stats.row(int64_t(b) * p.num_heads + head, stat) + m0, sizeof(numbers),
                   full);
  }

  __device__ void produce() {
    const bool leader = threadIdx.x % 32 == 0;
    const int tiles = key_blocks() * p.num_heads_kv * p.batch;
    KeyRing at_keys;
    WorkRing at_work;
    Ring<Tile::kStages> at;
    // Keys of the last work have been loaded into the place of those of the work that had this one's place.
    for (int tile = blockIdx.x;; at_keys.advance(), at_work.advance()) {
      Work& work = shared.work[at_work.stage];
      if (tile >= tiles) {
        shared.keys_empty[at_keys.stage].wait(at_keys.parity ^ 1);
        if (leader) {
          work.n_block = -1;
          shared.k_full[at_keys.stage].arrive();
        }
        break;
      }
      if (leader) {
        locate(work, tile);
        work.visible = Visible(p, work.b);
        tile = atomicAdd(params.next_tile, 1) + gridDim.x;
      }
      tile = __shfl_sync(0xffffffff, tile, 0);
      __syncwarp();
      const Visible& visible = work.visible;
      const int b = work.b, n0 = work.n_block * kBlockN, first_head = work.head_kv * group();
      const int begin = visible.q_begin(n0) / kBlockM;
      const int end = (visible.q_end(n0, n0 + kBlockN) + kBlockM - 1) / kBlockM;
      const auto kinds_of = [&](int head) {
        return [&, head](int block) {
          // Past T there is nothing, which forbids nothing.
          const int m0 = block * kBlockM, m1 = min(m0 + kBlockM, p.seqlen_q);
          return visible.block(p, head, m0, m1, n0, n0 + kBlockN);
        };
      };
      BlockCounts counts;
      for (int h = 0; h < group(); ++h) counts.add(begin, end, kinds_of(first_head + h));
      if (leader) work.counts = counts;

      KeyTile& keys = shared.keys[at_keys.stage];
      const auto load_k = [&] {
        shared.keys_empty[at_keys.stage].wait(at_keys.parity ^ 1);
        if (leader) {
          ptx::Mbarrier& full = shared.k_full[at_keys.stage];
          full.arrive_and_expect(sizeof(keys.k));
          const bool raw = k_is_raw(visible);
          load(keys.k, raw ? params.raw_k_map : params.k_map, full, n0, work.head_kv,
               raw ? params.k_raw.batch(b) : params.k_batch(b));
        }
      };
      const auto load_v = [&] {
        if (leader) {
          ptx::Mbarrier& full = shared.v_full[at_keys.stage];
          full.arrive_and_expect(sizeof(keys.v));
          const bool raw = params.listed && !reads_list(visible);
          load(keys.v, raw ? params.raw_v_map : params.v_map, full, n0, work.head_kv,
               raw ? params.raw_v_batch(b) : params.v_batch(b));
        }
      };
      bool has_keys = false;
      for (const bool all : {false, true}) {
        if (counts.of(all) == 0) continue;
        for (int head = first_head; head < first_head + group(); ++head) {
          for_each_block(shared.window, counts.first, counts.last, all, kinds_of(head), [&](int block) {
            const int m0 = block * kBlockM;
            shared.q_empty[at.stage].wait(at.parity ^ 1);
            if (leader) {
              shared.step[at.stage] = {
                  m0, head, params.dq_accum + DqTiles::before(p, int64_t(b) * p.num_heads + head, m0)};
              load_queries(shared.q[at.stage], shared.lse[at.stage], params.q_map, shared.q_full[at.stage],
                           kLse, b, head, m0);
            }
            if (!has_keys) load_k();
            shared.dout_empty[at.stage].wait(at.parity ^ 1);
            if (leader) {
              load_queries(shared.dout[at.stage], shared.delta[at.stage], params.dout_map,
                           shared.dout_full[at.stage], kDelta, b, head, m0);
            }
            if (!has_keys) load_v();
            has_keys = true;
            __syncwarp();
            at.advance();
          });
        }
      }
      if (!has_keys) {
        load_k();
        load_v();
      }
    }
  }

  // ---- Consumers: 64 keys each.

  struct Keys64 {
    float dk[kH][4], dv[kH][4];
    float s[kM][4], dp[kM][4];  // S^T, then P^T; dP^T
    uint32_t weights[kM / 2][4], ds[kM / 2][4];
    float dq[8][4];  // of 64 rows and 64 columns
  };

  // S^T or dP^T.
  __device__ static void start_pairs(float (&to)[kM][4], const Keys& keys, int warpgroup,
                                     const Queries& queries) {
    const uint64_t a = ptx::matrix_descriptor(ptx::smem_address(keys[0][64 * warpgroup]), 1024, 16);
    const uint64_t b = ptx::matrix_descriptor(ptx::smem_address(queries), 1024, 16);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      const uint64_t a_i = a + (i / 4 * sizeof(keys[0]) + i % 4 * 32) / 16;
      const uint64_t b_i = b + (i / 4 * sizeof(queries[0]) + i % 4 * 32) / 16;
      if (i == 0) {
        ptx::wgmma<T, false>(to, a_i, b_i);
      } else {
        ptx::wgmma<T, true>(to, a_i, b_i);
      }
    }
    ptx::wgmma_commit();
  }

  // dv or dk.
  __device__ static void start_sum(float (&to)[kH][4], const uint32_t (&pairs)[kM / 2][4],
                                   const Queries& queries) {
    const uint64_t b = ptx::matrix_descriptor(ptx::smem_address(queries), 1024, sizeof(queries[0]));
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kM / 2; ++i) ptx::wgmma_add<T>(to, pairs[i], b + i * 16 * 128 / 16);
    ptx::wgmma_commit();
  }

  // This warpgroup's half of dQ: 64 of the columns, or of the rows where there are 128.
  __device__ void start_dq(Keys64& keys, const KeyTile& tile, int buffer, int warpgroup) const {
    const int row_chunk = kBlockM == 128 ? warpgroup : 0, chunk = kBlockM == 128 ? 0 : warpgroup;
    const uint64_t a = ptx::matrix_descriptor(ptx::smem_address(shared.ds[buffer][row_chunk]), 1024, 16);
    const uint64_t b = ptx::matrix_descriptor(ptx::smem_address(tile.k[chunk]), 1024, 16);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kBlockN / 16; ++i) {
      if (i == 0) {
        ptx::wgmma<T, false, true>(keys.dq, a, b);
      } else {
        ptx::wgmma<T, true, true>(keys.dq, a + i * 16 * 128 / 16, b + i * 16 * 128 / 16);
      }
    }
    ptx::wgmma_commit();
  }

  // The numbers of this thread's query rows in block n of an accumulator.
  __device__ static float2 of_rows(const float (&numbers)[kBlockM], int n) {
    return *reinterpret_cast<const float2*>(numbers + 8 * n + 2 * (threadIdx.x % 4));
  }

  // This thread's parts of sums over keys, of query rows 8 n + 2 (lane % 4) and the next.
  struct RowSums {
    float x[kM][2];

    // Adds up those of the warp. Lane l keeps kM / 8 blocks, from l / 4 * (kM / 8) on, as the first of x.
    template <int kHalf = kM / 2, int kLanes = 16>
    __device__ void reduce() {
      const bool upper = threadIdx.x & kLanes;
#pragma unroll
      for (int n = 0; n < kHalf; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float low = x[n][c], high = x[n + kHalf][c];
          x[n][c] = (upper ? high : low) + __shfl_xor_sync(0xffffffff, upper ? low : high, kLanes);
        }
      }
      if constexpr (kLanes > 4) reduce<kHalf / 2, kLanes / 2>();
    }
  };

  // s becomes P, weights the same in 16 bits.
  template <bool kPartial>
  __device__ void take_exp(Keys64& keys, RowSums& logit_sums, int stage) const {
#pragma unroll
    for (int n = 0; n < kM; ++n) {
      const float2 lse = of_rows(shared.lse[stage], n);
      float(&s)[4] = keys.s[n];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float weight = s[e] - (e % 2 == 0 ? lse.x : lse.y);
        asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(weight));
        if constexpr (Tile::kSums) {
          float logit = s[e];
          asm volatile("" : "+f"(logit));  // in a register of its own, or products are serialised (C7520)
          // P = 0 silences a hidden logit, if it is finite.
          if constexpr (kPartial) logit = fmaxf(logit, -1e30f);
          float& sum = logit_sums.x[n][e % 2];
          sum = e < 2 ? weight * logit : fmaf(weight, logit, sum);
        }
        s[e] = weight;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        keys.weights[n / 2][n % 2 * 2 + half] = sm80::Half16<T>::pack(s[2 * half], s[2 * half + 1]);
      }
    }
  }

  // dS from dP and P, in registers and shared memory.
  __device__ void take_ds(Keys64& keys, RowSums& ds_sums, int stage, int buffer, int warpgroup) const {
    const int lane = threadIdx.x % 32, row = warpgroup * 64 + int(threadIdx.x) / 32 % 4 * 16 + lane % 16;
#pragma unroll
    for (int n = 0; n < kM; ++n) {
      const float2 delta = of_rows(shared.delta[stage], n);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float x0 = keys.dp[n][2 * half] - delta.x, x1 = keys.dp[n][2 * half + 1] - delta.y;
        const uint32_t weights = keys.weights[n / 2][n % 2 * 2 + half];
        uint32_t& ds = keys.ds[n / 2][n % 2 * 2 + half];
        if constexpr (Tile::kPackedProduct) {
          const uint32_t x = sm80::Half16<T>::pack(x0, x1);
          asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(ds) : "r"(weights), "r"(x));
        } else {
          float2 weight{keys.s[n][2 * half], keys.s[n][2 * half + 1]};
          if constexpr (Tile::kPackedWeights) weight = sm80::Half16<T>::unpack(weights);
          const float ds0 = weight.x * x0, ds1 = weight.y * x1;
          ds = sm80::Half16<T>::pack(ds0, ds1);
          if constexpr (Tile::kSums) {
            ds_sums.x[n][0] = half == 0 ? ds0 : ds_sums.x[n][0] + ds0;
            ds_sums.x[n][1] = half == 0 ? ds1 : ds_sums.x[n][1] + ds1;
          }
        }
      }
      if (n % 2 == 1) {
        const uint32_t(&ds)[4] = keys.ds[n / 2];
        T* const to = shared.ds[buffer][n / 8][row] + ((n % 8 - 1 + lane / 16) ^ (row % 8)) * 8;
        ptx::stmatrix_x4(ptx::smem_address(to), ds[0], ds[1], ds[2], ds[3]);
      }
    }
    ptx::fence_async_shared();
    release(shared.ds_full);
  }

  __device__ void add_dq(const Keys64& keys, const Step& step, int warpgroup) const {
    const int lane = threadIdx.x % 32, columns = p.head_dim_padded / DqTiles::kCols;
    const int row = int(threadIdx.x) / 32 % 4 * 16 + (kBlockM == 128 ? warpgroup * 64 : 0);
    const int first = kBlockM == 128 ? 0 : warpgroup * 8;  // tile of the row
    const int inside = step.m0 + row < p.seqlen_q ? columns - first : 0;
    float* const dq = step.dq + (row / DqTiles::kRows * columns + first) * DqTiles::kSize + lane * 4;
    if (inside >= 8) {
#pragma unroll
      for (int n = 0; n < 8; ++n) ptx::red_add_x4(dq + n * DqTiles::kSize, keys.dq[n]);
    } else {
#pragma unroll
      for (int n = 0; n < 7; ++n) {
        if (n < inside) ptx::red_add_x4(dq + n * DqTiles::kSize, keys.dq[n]);
      }
    }
  }

  __device__ void add_row_sums(const RowSums& ds_sums, const RowSums& logit_sums, const Step& step,
                               int b) const {
    const int lane = threadIdx.x % 32;
    const int first = step.m0 + lane / 4 * (kM / 8) * 8 + 2 * (lane % 4);
    float2* const sums = params.row_sums + (int64_t(b) * p.num_heads + step.head) * p.seqlen_q;
#pragma unroll
    for (int n = 0; n < kM / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int i = first + 8 * n + c;
        if (i < p.seqlen_q) ptx::red_add_x2(&sums[i].x, ds_sums.x[n][c], logit_sums.x[n][c]);
      }
    }
  }

  // Dead rows of q and dO may hold NaN: P = 0 does not silence them in the products, zero rows do.
  __device__ void clear_dead_rows(int stage) const {
    const float(&lse)[kBlockM] = shared.lse[stage];
    const int thread = threadIdx.x - 128;
    const bool dead = thread < kBlockM && lse[thread] == INFINITY;
    if (!ptx::named_barrier_or(kConsumersBarrier, kConsumerThreads, dead)) return;
    uint4* const q = reinterpret_cast<uint4*>(shared.q[stage]);
    uint4* const dout = reinterpret_cast<uint4*>(shared.dout[stage]);
    for (int i = thread; i < int(sizeof(Queries) / 16); i += kConsumerThreads) {
      if (lse[i / 8 % kBlockM] == INFINITY) q[i] = dout[i] = {0, 0, 0, 0};  // 8 chunks of 16 bytes a row
    }
    ptx::fence_async_shared();
    ptx::named_barrier(kConsumersBarrier, kConsumerThreads);
  }

  // Dead keys may hold NaN, and 0 * NaN is NaN: those past the length become zeros, and so do those of others
  // that hold any. Whether such a key is dead is looked up pair by pair.
  __device__ void clear_dead_keys(const Work& work, KeyTile& tile) const {
    const int thread = threadIdx.x - 128, n0 = work.n_block * kBlockN;
    uint4* const tiles[] = {reinterpret_cast<uint4*>(tile.k), reinterpret_cast<uint4*>(tile.v)};
    for (int j = thread; j < kBlockN; j += kConsumerThreads) shared.suspect[j] = false;
    ptx::named_barrier(kConsumersBarrier, kConsumerThreads);
    bool found = false;
    for (int i = thread; i < int(sizeof(Keys) / 16); i += kConsumerThreads) {
      const int j = i / 8 % kBlockN;  // 8 chunks of 16 bytes a row
      if (n0 + j >= work.visible.seqlen_k) {
        tiles[0][i] = tiles[1][i] = {0, 0, 0, 0};
      } else if (has_nonfinite<T>(tiles[0][i]) || has_nonfinite<T>(tiles[1][i])) {
        found = shared.suspect[j] = true;
      }
    }
    if (ptx::named_barrier_or(kConsumersBarrier, kConsumerThreads, found)) clear_unseen_keys(work, tile);
    ptx::fence_async_shared();
    ptx::named_barrier(kConsumersBarrier, kConsumerThreads);
  }

  __device__ void clear_unseen_keys(const Work& work, KeyTile& tile) const {
    const int thread = threadIdx.x - 128, n0 = work.n_block * kBlockN;
    uint4* const tiles[] = {reinterpret_cast<uint4*>(tile.k), reinterpret_cast<uint4*>(tile.v)};
    for (int j = 0; j < kBlockN; ++j) {
      if (!shared.suspect[j]) continue;
      bool seen = false;
      for (int h = 0; h < group(); ++h) {
        for (int i = thread; i < work.visible.seqlen_q && !seen; i += kConsumerThreads) {
          seen = work.visible.is_allowed(p, work.head_kv * group() + h, i, n0 + j);
        }
      }
      if (ptx::named_barrier_or(kConsumersBarrier, kConsumerThreads, seen)) continue;
      if (thread < Tile::kChunks * 8) {
        const int i = (thread / 8 * kBlockN + j) * 8 + thread % 8;
        tiles[0][i] = tiles[1][i] = {0, 0, 0, 0};
      }
    }
  }

  // One block of queries. kPartial: some of its pairs are forbidden; nothing is in flight beside that.
  template <bool kPartial>
  __device__ void take_step(Keys64& keys, const Work& work, int key_stage, Ring<Tile::kStages> at, int buffer,
                            int warpgroup) const {
    // Opaque, or ptxas keeps all addresses of the tile in registers that it has not.
    asm volatile("" : "+r"(key_stage));
    const KeyTile& tile = shared.keys[key_stage];
    const Queries &q = shared.q[at.stage], &dout = shared.dout[at.stage];
    RowSums logit_sums, ds_sums;
    shared.q_full[at.stage].wait(at.parity);
    if constexpr (kPartial) {
      shared.dout_full[at.stage].wait(at.parity);
      clear_dead_rows(at.stage);
      start_pairs(keys.s, tile.k, warpgroup, q);
      ptx::wgmma_wait<0>();
      pin(keys.s);
      const int first_key = warpgroup * 64 + int(threadIdx.x) / 32 % 4 * 16;
      hide_transposed(keys.s, p, work.visible, shared.step[at.stage].head,
                      FragmentAt(work.n_block * kBlockN + first_key, shared.step[at.stage].m0));
      start_pairs(keys.dp, tile.v, warpgroup, dout);
    } else {
      start_pairs(keys.s, tile.k, warpgroup, q);
      shared.dout_full[at.stage].wait(at.parity);
      start_pairs(keys.dp, tile.v, warpgroup, dout);
      ptx::wgmma_wait<1>();
      pin(keys.s);
    }
    take_exp<kPartial>(keys, logit_sums, at.stage);
    start_sum(keys.dv, keys.weights, dout);
    if constexpr (Tile::kSums) logit_sums.reduce();
    ptx::wgmma_wait<1>();
    pin(keys.dp);
    take_ds(keys, ds_sums, at.stage, buffer, warpgroup);
    // Before products, for which the lanes meet: ptxas leaves the meeting in release() out, and racecheck
    // then takes what other lanes read after them for a race with the next step.
    const Step step = shared.step[at.stage];
    shared.ds_full.wait(buffer);
    start_dq(keys, tile, buffer, warpgroup);
    start_sum(keys.dk, keys.ds, q);
    if constexpr (Tile::kSums) {
      ds_sums.reduce();
      add_row_sums(ds_sums, logit_sums, step, work.b);
    }
    ptx::wgmma_wait<1>();
    release(shared.dout_empty[at.stage]);
    pin(keys.dq);
    add_dq(keys, step, warpgroup);
    ptx::wgmma_wait<0>();
    release(shared.q_empty[at.stage]);
  }

  // Keys below it are given dk and dv here; of others that no list holds, zeros have been written.
  __device__ int end_of_gradients(const Visible& visible) const {
    return params.listed && !k_is_raw(visible) ? visible.seqlen_k : p.seqlen_k;
  }

  // dv and dk of this warp's 16 keys, through the place of k and v, which all have read.
  __device__ void finish(Keys64& keys, const Work& work, KeyTile& tile, int warpgroup) const {
    constexpr int kLanes = kHeadDim / 8;
    using L = RowLanes<kLanes>;
    constexpr int kAtOnce = 32 / kLanes, kTurns = 16 / kAtOnce;  // rows
    static_assert(sizeof(KeyTile) == sizeof(float) * kBlockN * kHeadDim);
    const int lane = threadIdx.x % 32, first = warpgroup * 64 + int(threadIdx.x) / 32 % 4 * 16;
    float* const rows = reinterpret_cast<float*>(&tile) + first * kHeadDim;
    const auto at = [&](int r, int column) {
      return rows + r * kHeadDim + (column / 4 ^ 2 * (r % 4)) * 4 + column % 4;
    };
    const auto put = [&](const float (&x)[kH][4]) {
      __syncwarp();
#pragma unroll
      for (int n = 0; n < kH; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          *reinterpret_cast<float2*>(at(lane / 4 + 8 * half, 8 * n + 2 * (lane % 4))) = {
              x[n][2 * half], x[n][2 * half + 1]};
        }
      }
      __syncwarp();
    };
    const auto take = [&](float (&x)[L::kElems], int r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        *reinterpret_cast<float4*>(x + 4 * i) =
            *reinterpret_cast<const float4*>(at(r, L::first() + 4 * i));
      }
    };
    const auto store = [&](T* row, const float (&x)[L::kElems]) {
      const auto pack = [&](int e) { return sm80::Half16<T>::pack(x[e], x[e + 1]); };
      if (L::first() >= p.head_dim) return;
      *reinterpret_cast<uint4*>(row + L::first()) = {pack(0), pack(2), pack(4), pack(6)};
    };
    const auto row_of = [&](int turn) { return turn * kAtOnce + lane / kLanes; };
    const Visible& visible = work.visible;
    const bool raw_k = k_is_raw(visible);
    const int end_key = end_of_gradients(visible);
    const auto key_of = [&](int turn) { return work.n_block * kBlockN + first + row_of(turn); };
    int positions[kTurns];
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      positions[turn] = key_of(turn) < end_key ? visible.position(key_of(turn)) : -1;
    }

    const auto gK = params.k_raw.template head<const T>(work.b, work.head_kv);
    const auto gdK = params.dk.template head<T>(work.b, work.head_kv);
    const auto gdV = params.dv.template head<T>(work.b, work.head_kv);
    const int64_t norm_row = (params.k_batch(work.b) * p.num_heads_kv + work.head_kv) * p.seqlen_k;
    ptx::named_barrier(kConsumersBarrier, kConsumerThreads);
    put(keys.dv);
    uint4 raw[kTurns];  // of k
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      raw[turn] = positions[turn] >= 0 && L::first() < p.head_dim
                      ? *reinterpret_cast<const uint4*>(gK.row(positions[turn]) + L::first())
                      : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      float x[L::kElems];
      take(x, row_of(turn));
      if (positions[turn] >= 0) store(gdV.row(positions[turn]), x);
    }
    put(keys.dk);
    float a[kTurns][L::kElems], k[kTurns][L::kElems], magnitudes[kTurns], dots[kTurns];
    const float* inverse_norms[kTurns];
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      inverse_norms[turn] =
          raw_k
              ? shared.k_inverse_norm + first + row_of(turn)
              : params.k_inverse_norm + (norm_row + min(key_of(turn), p.seqlen_k - 1)) * p.groups;
      take(a[turn], row_of(turn));
      magnitudes[turn] = 0.f;
#pragma unroll
      for (int e = 0; e < L::kElems; ++e) {
        a[turn][e] *= kLn2;  // q^ carries log2 e
        magnitudes[turn] += fabsf(a[turn][e]);
      }
    }
    L::sum(magnitudes);
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      // A dead key may hold NaN; its gradient, and that of no other key but by accident, is zero here.
      const bool live = magnitudes[turn] != 0.f;
#pragma unroll
      for (int e = 0; e < L::kElems; e += 2) {
        const float2 pair = sm80::Half16<T>::unpack(reinterpret_cast<const uint32_t*>(&raw[turn])[e / 2]);
        k[turn][e] = live ? pair.x : 0.f;
        k[turn][e + 1] = live ? pair.y : 0.f;
      }
    }
    if (p.groups == 1) {
      L::template norm_backward<true>(a, k, inverse_norms, dots, 1, p.head_dim, p.l2norm);
    } else {
      L::norm_backward(a, k, inverse_norms, dots, p.groups, p.head_dim, p.l2norm);
    }
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      if (positions[turn] >= 0) store(gdK.row(positions[turn]), a[turn]);
    }
    ptx::fence_async_shared();
  }

  __device__ void consume(int warpgroup) {
    const bool has_dead_keys = may_leave_dead_keys(p) || p.kv_lengths.data != nullptr || params.listed;
    KeyRing at_keys;
    WorkRing at_work;
    Ring<Tile::kStages> at;
    int buffer = 0;  // of dS; the parity of its barrier too
    Keys64 keys;
    for (;; at_keys.advance(), at_work.advance()) {
      shared.k_full[at_keys.stage].wait(at_keys.parity);
      const Work& work = shared.work[at_work.stage];
      if (work.n_block < 0) break;
      KeyTile& tile = shared.keys[at_keys.stage];
#pragma unroll
      for (int n = 0; n < kH; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) keys.dk[n][e] = keys.dv[n][e] = 0.f;
      }
      if (k_is_raw(work.visible) && p.l2norm) {
        // Its own 64 keys: the others may still be at the last tile's.
        normalize_tile<128, 64>(
            tile.k, 64 * warpgroup, threadIdx.x % 128,
            [&](int row, float inverse_norm) { shared.k_inverse_norm[row] = inverse_norm; });
        ptx::named_barrier(kWarpgroupBarrier + warpgroup, 128);
      }
      shared.v_full[at_keys.stage].wait(at_keys.parity);
      // Every key is seen in a full block.
      if (has_dead_keys && work.counts.partial > 0 && work.counts.full == 0) clear_dead_keys(work, tile);
#pragma unroll 1
      for (int i = work.counts.partial; i > 0; --i, at.advance(), buffer ^= 1) {
        take_step<true>(keys, work, at_keys.stage, at, buffer, warpgroup);
      }
#pragma unroll 1
      for (int i = work.counts.full; i > 0; --i, at.advance(), buffer ^= 1) {
        take_step<false>(keys, work, at_keys.stage, at, buffer, warpgroup);
      }
      pin(keys.dk);
      pin(keys.dv);
      finish(keys, work, tile, warpgroup);
      release(shared.keys_empty[at_keys.stage]);
    }
  }
};

// Grid: persistent CTAs, at most one per tile of keys.
template <class Tile, class Kernel = BwdKernel<Tile>>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    cosine_attn_bwd_sm90(const __grid_constant__ BwdTmaParams params) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  auto& shared = aligned_shared<typename Tile::Shared>();
  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  if (threadIdx.x == 0) {
    constexpr int kWarps = 4 * Tile::kConsumers;
    for (int i = 0; i < Tile::kKeyStages; ++i) {
      shared.k_full[i].init(1);
      shared.v_full[i].init(1);
      shared.keys_empty[i].init(kWarps);
    }
    shared.ds_full.init(Tile::kDsWarps);
    for (int i = 0; i < Tile::kStages; ++i) {
      shared.q_full[i].init(1);
      shared.dout_full[i].init(1);
      shared.q_empty[i].init(kWarps);
      shared.dout_empty[i].init(kWarps);
    }
    ptx::fence_mbarrier_init();
  }
  ptx::wait_for_prerequisite_grids();
  __syncthreads();
  Kernel kernel(params, shared);
  if (warpgroup == 0) {
    ptx::fewer_registers<Tile::kProducerRegisters>();
    if (threadIdx.x < 32) kernel.produce();
  } else {
    ptx::more_registers<Tile::kConsumerRegisters>();
    kernel.consume(warpgroup - 1);
  }
#endif
}

}  // namespace jca::sm90
