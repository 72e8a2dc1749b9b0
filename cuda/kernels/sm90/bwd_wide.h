// Backward on Hopper for rows of up to 256 elements: dk and dv of 64 keys fill the registers of a warpgroup
// each. One warpgroup has S^T, P^T and dv, the other dP^T, dS^T and dk; each makes half of dQ. P goes from
// thread to thread through shared memory, dS as in bwd.h, whose producer and formulas serve here too.
#pragma once

#include "kernels/sm90/bwd.h"

namespace jca::sm90 {

template <class T_, bool kSums_>
struct WideBwdTile {
  using T = T_;
  using Like = BwdTile<T, 128, kSums_>;
  static constexpr bool kSums = kSums_;
  static constexpr int kHeadDim = 256, kConsumers = 2, kBlockM = 64, kBlockN = 64;
  static constexpr int kStages = 2, kKeyStages = 1, kDsWarps = 4;  // of the warpgroup that makes dS
  static constexpr int kChunks = kHeadDim / 64, kThreads = Like::kThreads;
  static constexpr int kProducerRegisters = Like::kProducerRegisters;
  static constexpr int kConsumerRegisters = Like::kConsumerRegisters;
  static constexpr bool kPackedProduct = !kSums && std::is_same_v<T, __nv_bfloat16>;  // as there

  struct Shared : BwdShared<T, kChunks, kBlockM, kBlockN, kStages, kKeyStages> {
    uint4 weights[kBlockM / 16][128];  // P^T, of thread i
  };
  static constexpr int kSmemBytes = sizeof(Shared);
};

template <class Tile>
struct WideBwdKernel : BwdKernel<Tile> {
  using Base = BwdKernel<Tile>;
  using typename Base::Queries;
  using typename Base::RowSums;
  using typename Base::Step;
  using typename Base::T;
  using typename Base::Work;
  using Base::group, Base::kConsumersBarrier, Base::kConsumerThreads, Base::kH, Base::kM, Base::of_rows;
  using Base::p, Base::params, Base::shared, Base::start_pairs;
  using Base::Base;
  using At = Ring<Tile::kStages>;
  static constexpr int kBlockM = Tile::kBlockM, kBlockN = Tile::kBlockN;
  enum { kWeightsBarrier = Base::kWarpgroupBarrier + Tile::kConsumers };
  static constexpr int kDqColumns = Tile::kHeadDim / 2 / DqTiles::kCols;  // tiles of a warpgroup

  // Of 64 keys.
  struct Sums {
    float x[kH][4];                // dv or dk
    float pairs[kM][4];            // S^T, then P^T; or dP^T
    uint32_t operands[kM / 2][4];  // P^T or dS^T in 16 bits
    float dq[kDqColumns][4];       // of 64 rows and half of the columns
  };

  // dv or dk, from what is in registers.
  __device__ static void start_sum(Sums& sums, const Queries& queries) {
    const uint64_t b = ptx::matrix_descriptor(ptx::smem_address(queries), 1024, sizeof(queries[0]));
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kM / 2; ++i) ptx::wgmma_add<T>(sums.x, sums.operands[i], b + i * 16 * 128 / 16);
    ptx::wgmma_commit();
  }

  __device__ void start_dq(Sums& sums, int buffer, int warpgroup) const {
    const auto& columns = shared.keys[0].k[warpgroup * Tile::kChunks / 2];
    const uint64_t a = ptx::matrix_descriptor(ptx::smem_address(shared.ds[buffer][0]), 1024, 16);
    const uint64_t b = ptx::matrix_descriptor(ptx::smem_address(columns), 1024, sizeof(columns));
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kBlockN / 16; ++i) {
      if (i == 0) {
        ptx::wgmma<T, false, true>(sums.dq, a, b);
      } else {
        ptx::wgmma<T, true, true>(sums.dq, a + i * 16 * 128 / 16, b + i * 16 * 128 / 16);
      }
    }
    ptx::wgmma_commit();
  }

  __device__ void add_dq(const Sums& sums, const Step& step, int warpgroup) const {
    const int columns = p.head_dim_padded / DqTiles::kCols, first = warpgroup * kDqColumns;
    const int row = int(threadIdx.x) / 32 % 4 * DqTiles::kRows;
    const int inside = step.m0 + row < p.seqlen_q ? columns - first : 0;
    const int tile = row / DqTiles::kRows * columns + first;
    float* const dq = step.dq + tile * DqTiles::kSize + threadIdx.x % 32 * 4;
    if (inside >= kDqColumns) {
#pragma unroll
      for (int n = 0; n < kDqColumns; ++n) ptx::red_add_x4(dq + n * DqTiles::kSize, sums.dq[n]);
    } else {
#pragma unroll
      for (int n = 0; n < kDqColumns; ++n) {
        if (n < inside) ptx::red_add_x4(dq + n * DqTiles::kSize, sums.dq[n]);
      }
    }
  }

  // One of the two sums over keys, of dS or of P S.
  __device__ void add_row_sums(const RowSums& sums, const Step& step, int b, int which) const {
    const int lane = threadIdx.x % 32;
    const int first = step.m0 + lane / 4 * (kM / 8) * 8 + 2 * (lane % 4);
    float2* const to = params.row_sums + (int64_t(b) * p.num_heads + step.head) * p.seqlen_q;
#pragma unroll
    for (int n = 0; n < kM / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int i = first + 8 * n + c;
        if (i < p.seqlen_q) atomicAdd(&to[i].x + which, sums.x[n][c]);
      }
    }
  }

  // dQ of a step, which is the same for both warpgroups, and the end of it.
  __device__ void end_step(Sums& sums, const Step& step, At at, int warpgroup) const {
    pin(sums.dq);
    add_dq(sums, step, warpgroup);
    ptx::wgmma_wait<0>();
    release(shared.dout_empty[at.stage]);
    release(shared.q_empty[at.stage]);
  }

  // A block of queries: P^T, dv and half of dQ. kPartial: some of its pairs are forbidden.
  template <bool kPartial>
  __device__ void take_weights(Sums& sums, const Work& work, At at, unsigned parity) const {
    RowSums logit_sums;
    shared.q_full[at.stage].wait(at.parity);
    if constexpr (kPartial) {
      shared.dout_full[at.stage].wait(at.parity);
      this->clear_dead_rows(at.stage);
    }
    start_pairs(sums.pairs, shared.keys[0].k, 0, shared.q[at.stage]);
    ptx::wgmma_wait<0>();
    pin(sums.pairs);
    if constexpr (kPartial) {
      const int first_key = int(threadIdx.x) / 32 % 4 * 16;
      hide_transposed(sums.pairs, p, work.visible, shared.step[at.stage].head,
                      FragmentAt(work.n_block * kBlockN + first_key, shared.step[at.stage].m0));
    }
#pragma unroll
    for (int n = 0; n < kM; ++n) {
      const float2 lse = of_rows(shared.lse[at.stage], n);
      float weights[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float logit = sums.pairs[n][e];
        weights[e] = logit - (e % 2 == 0 ? lse.x : lse.y);
        asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(weights[e]));
        if constexpr (Tile::kSums) {
          // P = 0 silences a hidden logit, if it is finite.
          const float finite = kPartial ? fmaxf(logit, -1e30f) : logit;
          float& sum = logit_sums.x[n][e % 2];
          sum = e < 2 ? weights[e] * finite : fmaf(weights[e], finite, sum);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sums.operands[n / 2][n % 2 * 2 + half] =
            sm80::Half16<T>::pack(weights[2 * half], weights[2 * half + 1]);
      }
    }
#pragma unroll
    for (int i = 0; i < kM / 2; ++i) {
      const uint32_t(&x)[4] = sums.operands[i];
      shared.weights[i][threadIdx.x % 128] = {x[0], x[1], x[2], x[3]};
    }
    ptx::fence_async_shared();  // lse has been read, and is refilled through the async proxy
    ptx::named_barrier_arrive(kWeightsBarrier, kConsumerThreads);
    if constexpr (!kPartial) shared.dout_full[at.stage].wait(at.parity);
    start_sum(sums, shared.dout[at.stage]);
    const Step step = shared.step[at.stage];
    if constexpr (Tile::kSums) {
      logit_sums.reduce();
      add_row_sums(logit_sums, step, work.b, 1);
    }
    shared.ds_full.wait(parity);
    start_dq(sums, parity, 0);
    ptx::wgmma_wait<0>();
    end_step(sums, step, at, 0);
  }

  // The same block: dS^T, dk and the other half of dQ.
  template <bool kPartial>
  __device__ void take_ds(Sums& sums, const Work& work, At at, unsigned parity) const {
    const int lane = threadIdx.x % 32, row = int(threadIdx.x) / 32 % 4 * 16 + lane % 16;
    RowSums ds_sums;
    if constexpr (kPartial) {
      shared.q_full[at.stage].wait(at.parity);
      shared.dout_full[at.stage].wait(at.parity);
      this->clear_dead_rows(at.stage);
    } else {
      shared.dout_full[at.stage].wait(at.parity);
    }
    start_pairs(sums.pairs, shared.keys[0].v, 0, shared.dout[at.stage]);
    ptx::named_barrier(kWeightsBarrier, kConsumerThreads);
    ptx::wgmma_wait<0>();
    pin(sums.pairs);
#pragma unroll
    for (int i = 0; i < kM / 2; ++i) {
      const uint4 packed = shared.weights[i][threadIdx.x % 128];
      const uint32_t weights[4] = {packed.x, packed.y, packed.z, packed.w};
      uint32_t(&ds)[4] = sums.operands[i];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int n = 2 * i + j / 2, half = j % 2;
        const float2 delta = of_rows(shared.delta[at.stage], n);
        const float x0 = sums.pairs[n][2 * half] - delta.x, x1 = sums.pairs[n][2 * half + 1] - delta.y;
        if constexpr (Tile::kPackedProduct) {
          const uint32_t x = sm80::Half16<T>::pack(x0, x1);
          asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(ds[j]) : "r"(weights[j]), "r"(x));
        } else {
          const float2 weight = sm80::Half16<T>::unpack(weights[j]);
          const float ds0 = weight.x * x0, ds1 = weight.y * x1;
          ds[j] = sm80::Half16<T>::pack(ds0, ds1);
          if constexpr (Tile::kSums) {
            ds_sums.x[n][0] = half == 0 ? ds0 : ds_sums.x[n][0] + ds0;
            ds_sums.x[n][1] = half == 0 ? ds1 : ds_sums.x[n][1] + ds1;
          }
        }
      }
      T* const to = shared.ds[parity][0][row] + ((2 * i + lane / 16) ^ (row % 8)) * 8;
      ptx::stmatrix_x4(ptx::smem_address(to), ds[0], ds[1], ds[2], ds[3]);
    }
    ptx::fence_async_shared();
    release(shared.ds_full);
    const Step step = shared.step[at.stage];
    if constexpr (!kPartial) shared.q_full[at.stage].wait(at.parity);
    shared.ds_full.wait(parity);
    start_dq(sums, parity, 1);
    start_sum(sums, shared.q[at.stage]);
    if constexpr (Tile::kSums) {
      ds_sums.reduce();
      add_row_sums(ds_sums, step, work.b, 0);
    }
    ptx::wgmma_wait<1>();
    end_step(sums, step, at, 1);
  }

  // dv, or dk as the gradient of raw k, of this warp's 16 keys; four lanes hold a row.
  __device__ void finish(Sums& sums, const Work& work, int warpgroup) const {
    const int lane = threadIdx.x % 32, first = int(threadIdx.x) / 32 % 4 * 16 + lane / 4;
    const Visible& visible = work.visible;
    const bool raw_k = this->k_is_raw(visible);
    const int end_key = this->end_of_gradients(visible);
    const auto gK = params.k_raw.template head<const T>(work.b, work.head_kv);
    const auto gX = (warpgroup == 0 ? params.dv : params.dk).template head<T>(work.b, work.head_kv);
    const int64_t norm_row = (params.k_batch(work.b) * p.num_heads_kv + work.head_kv) * p.seqlen_k;
    const auto column_of = [&](int n) { return 8 * n + 2 * (lane % 4); };
    const auto over_row = [](float x) {
      x += __shfl_xor_sync(0xffffffff, x, 1);
      return x + __shfl_xor_sync(0xffffffff, x, 2);
    };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = work.n_block * kBlockN + first + 8 * half;
      const bool exists = key < end_key;
      const int position = exists ? visible.position(key) : 0;
      if (warpgroup == 1) {
        float magnitude = 0.f;
#pragma unroll
        for (int n = 0; n < kH; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            sums.x[n][2 * half + c] *= kLn2;  // q^ carries log2 e
            magnitude += fabsf(sums.x[n][2 * half + c]);
          }
        }
        // A dead key may hold NaN; its gradient, and that of no other key but by accident, is zero here.
        const bool live = over_row(magnitude) != 0.f;
        uint32_t raw[kH];
#pragma unroll
        for (int n = 0; n < kH; ++n) {
          const T* const at = gK.row(position) + column_of(n);
          raw[n] = exists && live && column_of(n) < p.head_dim ? *reinterpret_cast<const uint32_t*>(at) : 0;
        }
        const int group_size = p.head_dim / p.groups;
#pragma unroll 1
        for (int g = 0; p.l2norm && g < p.groups; ++g) {
          const float r = raw_k
                              ? shared.k_inverse_norm[first + 8 * half]
                              : params.k_inverse_norm[(norm_row + min(key, p.seqlen_k - 1)) * p.groups + g];
          const float unit = r != 0.f ? r : 1.f / kMinNorm;
          const auto in_group = [&](int column) {
            return p.groups == 1 || (column >= g * group_size && column < (g + 1) * group_size);
          };
          const auto unit_of = [&](int n, int c) {
            const float2 pair = sm80::Half16<T>::unpack(raw[n]);
            return (c == 0 ? pair.x : pair.y) * unit;
          };
          float dot = 0.f;
#pragma unroll
          for (int n = 0; n < kH; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              if (in_group(column_of(n) + c)) dot += unit_of(n, c) * sums.x[n][2 * half + c];
            }
          }
          dot = over_row(dot);
          const float factor = group_size > 1 ? r : 0.f;
#pragma unroll
          for (int n = 0; n < kH; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              float& a = sums.x[n][2 * half + c];
              if (in_group(column_of(n) + c)) a = factor * (a - unit_of(n, c) * dot);
            }
          }
        }
      }
      if (!exists) continue;
#pragma unroll
      for (int n = 0; n < kH; ++n) {
        if (column_of(n) < p.head_dim) {
          *reinterpret_cast<uint32_t*>(gX.row(position) + column_of(n)) =
              sm80::Half16<T>::pack(sums.x[n][2 * half], sums.x[n][2 * half + 1]);
        }
      }
    }
  }

  __device__ void consume(int warpgroup) {
    const bool has_dead_keys = may_leave_dead_keys(p) || p.kv_lengths.data != nullptr || params.listed;
    typename Base::KeyRing at_keys;
    typename Base::WorkRing at_work;
    At at;
    unsigned parity = 0;  // of a step; its buffer of dS too
    Sums sums;
    for (;; at_keys.advance(), at_work.advance()) {
      shared.k_full[0].wait(at_keys.parity);
      const Work& work = shared.work[at_work.stage];
      if (work.n_block < 0) break;
#pragma unroll
      for (int n = 0; n < kH; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums.x[n][e] = 0.f;
      }
      if (this->k_is_raw(work.visible) && p.l2norm) {
        normalize_tile<kConsumerThreads, kBlockN>(
            shared.keys[0].k, 0, threadIdx.x - 128,
            [&](int row, float inverse_norm) { shared.k_inverse_norm[row] = inverse_norm; });
        ptx::named_barrier(kConsumersBarrier, kConsumerThreads);
      }
      shared.v_full[0].wait(at_keys.parity);
      // Every key is seen in a full block.
      if (has_dead_keys && work.counts.partial > 0 && work.counts.full == 0) {
        this->clear_dead_keys(work, shared.keys[0]);
      }
      const auto walk = [&](auto take_partial, auto take_full) {
#pragma unroll 1
        for (int i = work.counts.partial; i > 0; --i, at.advance(), parity ^= 1) take_partial();
#pragma unroll 1
        for (int i = work.counts.full; i > 0; --i, at.advance(), parity ^= 1) take_full();
      };
      if (warpgroup == 0) {
        walk([&] { take_weights<true>(sums, work, at, parity); },
             [&] { take_weights<false>(sums, work, at, parity); });
      } else {
        walk([&] { take_ds<true>(sums, work, at, parity); },
             [&] { take_ds<false>(sums, work, at, parity); });
      }
      pin(sums.x);
      finish(sums, work, warpgroup);
      release(shared.keys_empty[0]);
    }
  }
};

}  // namespace jca::sm90
