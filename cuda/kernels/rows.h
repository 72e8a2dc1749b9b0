// Row-wise kernels: normalisation, what the backward needs of its query rows, and the last step of dq.
// Memory bound; a row of up to 256 elements is held by kLanes neighbouring lanes, 8 elements each.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "kernels/params.h"
#include "ptx/grid.h"

namespace jca {

constexpr int kRowThreads = 32 * kLeastRowsPerBlock;

template <int kLanes>
struct RowLanes {
  static constexpr int kElems = 8;
  static constexpr int kRowsPerBlock = kRowThreads / kLanes;

  __device__ static int lane() { return threadIdx.x % kLanes; }
  __device__ static int first() { return lane() * kElems; }

  template <typename Real>
  __device__ static Real sum(Real x) {
#pragma unroll
    for (int d = kLanes / 2; d > 0; d /= 2) x += __shfl_xor_sync(0xffffffff, x, d);
    return x;
  }
  // Of several rows together, so that latencies overlap.
  template <typename Real, int kRows>
  __device__ static void sum(Real (&x)[kRows]) {
#pragma unroll
    for (int d = kLanes / 2; d > 0; d /= 2) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) x[row] += __shfl_xor_sync(0xffffffff, x[row], d);
    }
  }
  __device__ static float max(float x) {
#pragma unroll
    for (int d = kLanes / 2; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, d));
    return x;
  }

  template <typename T>
  struct alignas(16) Packed {
    T x[kElems];
  };

  // Zeros past head_dim and for rows that are not there. Rows of a multiple of 8 elements are 16-byte
  // aligned and read as such.
  template <typename T>
  __device__ static Packed<T> load(const T* row, int head_dim, bool valid) {
    const int h0 = first();
    Packed<T> packed;
    if (!valid || h0 >= head_dim) {
#pragma unroll
      for (int e = 0; e < kElems; ++e) packed.x[e] = T(0.f);
    } else if (head_dim % 8 == 0) {
#pragma unroll
      for (int i = 0; i < int(sizeof(packed) / 16); ++i) {
        reinterpret_cast<uint4*>(packed.x)[i] = reinterpret_cast<const uint4*>(row + h0)[i];
      }
    } else {
#pragma unroll
      for (int e = 0; e < kElems; ++e) packed.x[e] = h0 + e < head_dim ? row[h0 + e] : T(0.f);
    }
    return packed;
  }
  template <typename T>
  __device__ static void widen(float (&x)[kElems], const Packed<T>& packed) {
#pragma unroll
    for (int e = 0; e < kElems; ++e) x[e] = static_cast<float>(packed.x[e]);
  }
  template <typename T>
  __device__ static void load(float (&x)[kElems], const T* row, int head_dim, bool valid) {
    widen(x, load(row, head_dim, valid));
  }

  template <typename T>
  __device__ static void store(T* row, const float (&x)[kElems], int head_dim) {
    const int h0 = first();
    if (h0 >= head_dim) return;
    if (head_dim % 8 == 0) {
      alignas(16) T raw[kElems];
#pragma unroll
      for (int e = 0; e < kElems; ++e) raw[e] = static_cast<T>(x[e]);
#pragma unroll
      for (int i = 0; i < int(sizeof(raw) / 16); ++i) {
        reinterpret_cast<uint4*>(row + h0)[i] = reinterpret_cast<const uint4*>(raw)[i];
      }
    } else {
#pragma unroll
      for (int e = 0; e < kElems; ++e) {
        if (h0 + e < head_dim) row[h0 + e] = static_cast<T>(x[e]);
      }
    }
  }

  // Elements of group g among this lane's 8: [from, to).
  struct Slice {
    int from, to;
    __device__ Slice(int g, int group_size)
        : from(g * group_size - first()), to((g + 1) * group_size - first()) {}
    __device__ bool has(int e) const { return e >= from && e < to; }
  };

  // d(x) from d(x^), given x, for x^ = x * inverse_norm per group: r (a - x^ <x^, a>). A zero row has
  // inverse norm 0: x^ = x / kMinNorm, and gradient 0; so has a group of one component, whose x^ is
  // always a sign. In place, of several rows; `dots` become <x^, a> over whole rows. kOneGroup: groups is 1.
  template <bool kOneGroup = false, int kRows>
  __device__ static void norm_backward(float (&a)[kRows][kElems], float (&x)[kRows][kElems],
                                       const float* const (&inverse_norms)[kRows], float (&dots)[kRows],
                                       int groups, int head_dim, bool l2norm) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) dots[row] = 0.f;
    if (!l2norm) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
#pragma unroll
        for (int e = 0; e < kElems; ++e) dots[row] += x[row][e] * a[row][e];
      }
      sum(dots);
      return;
    }
    const int group_size = kOneGroup ? head_dim : head_dim / groups;
    for (int g = 0; g < (kOneGroup ? 1 : groups); ++g) {
      const Slice slice(g, group_size);
      const auto has = [&](int e) { return kOneGroup || slice.has(e); };
      float r[kRows], dot[kRows];
#pragma unroll
      for (int row = 0; row < kRows; ++row) r[row] = inverse_norms[row][g];
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        dot[row] = 0.f;
#pragma unroll
        for (int e = 0; e < kElems; ++e) {
          if (has(e)) {
            x[row][e] *= r[row] != 0.f ? r[row] : 1.f / kMinNorm;
            dot[row] += x[row][e] * a[row][e];
          }
        }
      }
      sum(dot);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        dots[row] += dot[row];
        const bool has_gradient = r[row] != 0.f && group_size > 1;
#pragma unroll
        for (int e = 0; e < kElems; ++e) {
          if (has(e)) {
            a[row][e] = has_gradient ? r[row] * (a[row][e] - x[row][e] * dot[row]) : 0.f;
          }
        }
      }
    }
  }

  // The same of one row; returns <x^, a>.
  __device__ static float norm_backward(float (&a)[kElems], float (&x)[kElems], const float* inverse_norm,
                                        int groups, int head_dim, bool l2norm) {
    float dots[1];
    norm_backward<false, 1>(reinterpret_cast<float(&)[1][kElems]>(a),
                            reinterpret_cast<float(&)[1][kElems]>(x), {inverse_norm}, dots, groups, head_dim,
                            l2norm);
    return dots[0];
  }
};

// One block: kRowsPerBlock rows of one (batch, head), kEach times; x = heads * row blocks * batch. The head
// runs fastest: rows of one position are neighbours in memory in one of the layouts.
struct RowBlock {
  int b, head, row;

  template <int kLanes, int kEach = 1>
  __device__ static RowBlock of_thread(int rows, int heads) {
    constexpr int kRows = RowLanes<kLanes>::kRowsPerBlock * kEach;
    const unsigned blocks = (rows + kRows - 1) / kRows, id = blockIdx.x;
    return {int(id / heads / blocks), int(id % heads),
            int(id / heads % blocks) * kRows + int(threadIdx.x) / kLanes};
  }
};

// Whether a sum of float32 squares lost nothing to overflow or underflow. Not if it is NaN.
__device__ inline bool squares_are_safe(float x) { return x > 1e-20f && x < 1e30f; }

// A power of two that brings x near 1: squares taken after it do not overflow for 1e30, and it rounds
// nothing.
__device__ inline float exact_scale(float x) {
  return __int_as_float((254 - min(__float_as_int(x) >> 23, 253)) << 23);
}

// The elements of rows of T for which has(e) become those of the unit vector times fold. inverse_norms: 0 of
// zero rows.
template <typename T, typename Real, class L, int kRows, class Has>
__device__ inline void normalize_slices(float (&x)[kRows][L::kElems], Real fold,
                                        float (&inverse_norms)[kRows], Has has) {
  Real squares[kRows];
  float scale[kRows];
  const auto sum_squares = [&] {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      squares[row] = 0;
#pragma unroll
      for (int e = 0; e < L::kElems; ++e) {
        if (has(e)) squares[row] += Real(x[row][e] * scale[row]) * Real(x[row][e] * scale[row]);
      }
    }
    L::sum(squares);
  };
#pragma unroll
  for (int row = 0; row < kRows; ++row) scale[row] = 1.f;
  sum_squares();
  if constexpr (!std::is_same_v<T, __half>) {  // its squares are safe, or 0
    bool safe = true;
#pragma unroll
    for (int row = 0; row < kRows; ++row) safe &= squares_are_safe(squares[row]);
    if (__any_sync(0xffffffff, !safe)) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        float largest = 0.f;
#pragma unroll
        for (int e = 0; e < L::kElems; ++e) {
          if (has(e)) largest = fmaxf(largest, fabsf(x[row][e]));
        }
        scale[row] = exact_scale(L::max(largest));
      }
      sum_squares();
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const Real least = Real(kMinNorm) * scale[row];
    const bool live = squares[row] >= least * least;
    const Real inverse = rsqrt(squares[row]) * scale[row];
    const Real factor = live ? inverse * fold : fold / Real(kMinNorm);
#pragma unroll
    for (int e = 0; e < L::kElems; ++e) {
      if (has(e)) x[row][e] = float(x[row][e] * factor);
    }
    inverse_norms[row] = live ? float(inverse) : 0.f;
  }
}

// The same for a row, by its slices; keep(g, inverse norm) is told of each.
template <typename T, typename Real, class L, class Keep>
__device__ inline void normalize_row(float (&x)[1][L::kElems], Real fold, const Problem& p, bool l2norm,
                                     Keep keep) {
  const auto normalize = [&](int g, auto has) {
    float inverse_norm[1];
    normalize_slices<T, Real, L>(x, fold, inverse_norm, has);
    keep(g, inverse_norm[0]);
  };
  if (!l2norm) {
#pragma unroll
    for (int e = 0; e < L::kElems; ++e) x[0][e] = float(x[0][e] * fold);
  } else if (p.groups == 1) {
    normalize(0, [](int) { return true; });
  } else {
    const int group_size = p.head_dim / p.groups;
    for (int g = 0; g < p.groups; ++g) {
      const typename L::Slice slice(g, group_size);
      normalize(g, [&](int e) { return slice.has(e); });
    }
  }
}

// float32 rows go through double and are rounded once: an error of the norm or of the fold would be
// common to all logits of a row, and grows with the scale.
template <typename T>
using NormReal = std::conditional_t<std::is_same_v<T, float>, double, float>;

// The scale of q^, with log2 e where logits are in its units.
template <typename Real>
__device__ inline Real fold_of(const HeadScale& scale, bool log2_units, int b, int head) {
  return Real(scale(b, head)) * (log2_units ? Real(1.4426950408889634) : Real(1));
}

constexpr int kNormRowsEach = 4;  // rows of a thread: loads in flight, and indices shared
constexpr int kMostKeysPerBlock = 128;

// x -> x^ (unit slices, times the fold where one is given) in rows of Hp, zeros past H.
template <typename T, typename THat, int kLanes>
__global__ void __launch_bounds__(kRowThreads) normalize_rows(const NormParams params) {
  using L = RowLanes<kLanes>;
  using Real = NormReal<T>;
  const Problem& p = params.problem;
  ptx::launch_dependent_grids();
  if (params.listed) ptx::wait_for_prerequisite_grids();  // for the list
  if (params.zero != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *params.zero = 0;
  const RowBlock at = RowBlock::of_thread<kLanes, kNormRowsEach>(params.seqlen, params.num_heads);
  const auto row_of = [&](int each) { return at.row + each * L::kRowsPerBlock; };
  // Rows that are read, and written: whole blocks, in which 0 * v must be 0.
  int read = params.seqlen, written = params.seqlen;
  const int32_t* keys = nullptr;
  if (params.listed) {
    keys = p.mask.keys_of(at.b);
    read = p.mask.count_of(at.b);
    if (params.skips_prefix && is_prefix(keys, read)) return;
    written = min(written, (read + kMostKeysPerBlock - 1) / kMostKeysPerBlock * kMostKeysPerBlock);
  }

  typename L::template Packed<T> packed[kNormRowsEach];
  const auto rows = params.x.head<T>(at.b, at.head);
#pragma unroll
  for (int each = 0; each < kNormRowsEach; ++each) {
    const bool valid = row_of(each) < read;
    const int row = !valid ? 0 : keys == nullptr ? row_of(each) : keys[row_of(each)];
    packed[each] = L::template load<T>(rows.row(row), p.head_dim, valid);
  }
  Real fold = 1;
  if (params.fold.data != nullptr) fold = fold_of<Real>(params.fold, params.log2_units, at.b, at.head);
  const auto hats = params.hat.head<THat>(at.b, at.head);
  const int64_t first = (int64_t(at.b) * params.num_heads + at.head) * params.seqlen;
#pragma unroll
  for (int each = 0; each < kNormRowsEach; ++each) {
    float x[1][L::kElems];
    L::widen(x[0], packed[each]);
    const int row = row_of(each);
    const bool valid = row < written;
    normalize_row<T, Real, L>(x, fold, p, params.l2norm, [&](int g, float inverse_norm) {
      if (params.inverse_norm != nullptr && valid && L::lane() == 0) {
        params.inverse_norm[(first + row) * p.groups + g] = inverse_norm;
      }
    });
    if (valid) L::store(hats.row(row), x[0], p.head_dim_padded);
  }
}

constexpr int kQueryRowsEach = 2;  // rows of a thread, with three loads each

// What the backward needs of its query rows: q^, and delta = rowsum(dO * O) - dlse and lse, laid out for its
// tiles. Whatever a dead row of dO or dlse holds is dropped here. Zeros for what its CTAs add to, too.
template <typename T, int kLanes>
__global__ void __launch_bounds__(kRowThreads) query_rows(const QueryParams params) {
  using L = RowLanes<kLanes>;
  using Real = NormReal<T>;
  const Problem& p = params.problem;
  ptx::launch_dependent_grids();
  // Rows of a block divide Tp.
  const RowBlock at = RowBlock::of_thread<kLanes, kQueryRowsEach>(params.stats.seqlen_padded, p.num_heads);
  const auto row_of = [&](int each) { return at.row + each * L::kRowsPerBlock; };
  const int64_t bh = int64_t(at.b) * p.num_heads + at.head, first = bh * p.seqlen_q;
  const auto qs = params.q.head<T>(at.b, at.head);
  const auto outs = params.out.head<T>(at.b, at.head), douts = params.dout.head<T>(at.b, at.head);
  const int length = p.q_lengths(at.b);
  typename L::template Packed<T> q[kQueryRowsEach], out[kQueryRowsEach], dout[kQueryRowsEach];
  float lse[kQueryRowsEach];
#pragma unroll
  for (int each = 0; each < kQueryRowsEach; ++each) {
    const int row = row_of(each);
    q[each] = L::load(qs.row(row), p.head_dim, row < p.seqlen_q);
    out[each] = L::load(outs.row(row), p.head_dim, row < length);
    dout[each] = L::load(douts.row(row), p.head_dim, row < length);
    lse[each] = row < length ? params.lse[first + row] : -INFINITY;
  }
  const int64_t threads = int64_t(gridDim.x) * kRowThreads;
  for (int64_t i = int64_t(blockIdx.x) * kRowThreads + threadIdx.x; i < params.zeros; i += threads) {
    params.sums[i] = {0, 0, 0, 0};
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *params.next_tile = 0;

  const Real fold = fold_of<Real>(p.scale, params.log2_units, at.b, at.head);
  const auto hats = params.q_hat.head<T>(at.b, at.head);
  float deltas[kQueryRowsEach];
#pragma unroll
  for (int each = 0; each < kQueryRowsEach; ++each) {
    const int row = row_of(each);
    const bool valid = row < p.seqlen_q;
    float x[1][L::kElems], o[L::kElems], d[L::kElems];
    L::widen(x[0], q[each]);
    normalize_row<T, Real, L>(x, fold, p, p.l2norm, [&](int g, float inverse_norm) {
      if (valid && L::lane() == 0) params.q_inverse_norm[(first + row) * p.groups + g] = inverse_norm;
    });
    if (valid) L::store(hats.row(row), x[0], p.head_dim_padded);
    L::widen(o, out[each]);
    L::widen(d, dout[each]);
    deltas[each] = 0.f;
#pragma unroll
    for (int e = 0; e < L::kElems; ++e) deltas[each] += o[e] * d[e];
  }
  L::sum(deltas);
  if (L::lane() != 0) return;
#pragma unroll
  for (int each = 0; each < kQueryRowsEach; ++each) {
    const int row = row_of(each);
    const bool live = lse[each] != -INFINITY;
    float high = lse[each], low = live ? params.lse_low[first + row] : 0.f;
    if (params.log2_units) {
      high = lse[each] * kLog2e;
      low = fmaf(lse[each], kLog2e, -high) + lse[each] * kLog2eLow + low * kLog2e;
    }
    const float dlse = live && params.dlse != nullptr ? params.dlse[first + row] : 0.f;
    params.stats.row(bh, kLse)[row] = live ? high : INFINITY;
    params.stats.row(bh, kLseLow)[row] = live ? low : 0.f;
    params.stats.row(bh, kDelta)[row] = live ? deltas[each] - dlse : 0.f;
    if (params.row_sums != nullptr && row < p.seqlen_q) params.row_sums[first + row] = {0.f, 0.f};
  }
}

constexpr int kDqRowsEach = 2;  // rows of a thread

// dq = scale r (a - q^ <q^, a>) with a = dS k^, and the block's part of dscale: <q^, a>, less what rounding
// put there: dS of a row sums to dlse, and any excess, from delta or lse, has been multiplied by the row's
// mean cosine. Of a part of a row's keys nobody knows the sum: without row_sums nothing is taken off.
template <typename T, typename TAccum, int kLanes>
__global__ void __launch_bounds__(kRowThreads) finish_dq(const DqParams params) {
  using L = RowLanes<kLanes>;
  constexpr int kRows = L::kRowsPerBlock * kDqRowsEach;
  const Problem& p = params.problem;
  const RowBlock at = RowBlock::of_thread<kLanes, kDqRowsEach>(p.seqlen_q, p.num_heads);
  // Rows i and i + 8 are neighbours in a tile.
  const int thread_row = threadIdx.x / kLanes, in_block = thread_row / 8 * 16 + thread_row % 8;
  const int first = at.row - thread_row + in_block;
  const int64_t bh = int64_t(at.b) * p.num_heads + at.head;
  const auto row_of = [&](int each) { return first + 8 * each; };

  float a[kDqRowsEach][L::kElems], q[kDqRowsEach][L::kElems];
  typename L::template Packed<T> packed[kDqRowsEach];
  const float* inverse_norms[kDqRowsEach];
  int64_t indices[kDqRowsEach];
  bool lives[kDqRowsEach];
  const auto raw = params.q_raw.head<T>(at.b, at.head);
#pragma unroll
  for (int each = 0; each < kDqRowsEach; ++each) {
    const bool exists = row_of(each) < p.seqlen_q;
    const int row = exists ? row_of(each) : 0;
    indices[each] = bh * p.seqlen_q + row;
    inverse_norms[each] = params.q_inverse_norm + indices[each] * p.groups;
    // A dead row may hold NaN in q.
    lives[each] = exists && params.stats.row(bh, kLse)[row] != INFINITY;
    packed[each] = L::template load<T>(raw.row(row), p.head_dim, exists);
  }
  const TAccum* const sums = static_cast<const TAccum*>(params.dq_accum);
  if (params.tiled) {
    const int in_tile = first % DqTiles::kRows;
    const TAccum* const tile =
        sums + DqTiles::before(p, bh, first - in_tile) + L::lane() * DqTiles::kSize;
    const bool inside = first < p.seqlen_q && L::first() < p.head_dim_padded;
    struct alignas(16) Pairs {
      TAccum x[2][2];  // of both rows
    };
#pragma unroll
    for (int pair = 0; pair < L::kElems / 2; ++pair) {
      const TAccum* const at = tile + DqTiles::pair(in_tile, pair);
      const Pairs found = inside ? *reinterpret_cast<const Pairs*>(at) : Pairs{};
#pragma unroll
      for (int each = 0; each < kDqRowsEach; ++each) {
        a[each][2 * pair] = found.x[each][0];
        a[each][2 * pair + 1] = found.x[each][1];
      }
    }
  } else {
#pragma unroll
    for (int each = 0; each < kDqRowsEach; ++each) {
      L::load(a[each], sums + indices[each] * p.head_dim_padded, p.head_dim_padded, lives[each]);
    }
  }
#pragma unroll
  for (int each = 0; each < kDqRowsEach; ++each) L::widen(q[each], packed[each]);
  float dots[kDqRowsEach];
  L::norm_backward(a, q, inverse_norms, dots, p.groups, p.head_dim, p.l2norm);
  const float scale = p.scale(at.b, at.head);
  const auto rows = params.dq.head<T>(at.b, at.head);
#pragma unroll
  for (int each = 0; each < kDqRowsEach; ++each) {
#pragma unroll
    for (int e = 0; e < L::kElems; ++e) a[each][e] = lives[each] ? a[each][e] * scale : 0.f;
    if (row_of(each) < p.seqlen_q) L::store(rows.row(row_of(each)), a[each], p.head_dim);
  }

  if (params.dscale_partials == nullptr) return;
  __shared__ float row_dots[kRows];
  if (L::lane() == 0) {
#pragma unroll
    for (int each = 0; each < kDqRowsEach; ++each) {
      float centred = lives[each] ? dots[each] : 0.f;
      // Without a scale no logit tells the mean cosine.
      if (lives[each] && params.row_sums != nullptr && scale != 0.f) {
        const float2 sums = params.row_sums[indices[each]];
        const float excess = sums.x - (params.dlse ? params.dlse[indices[each]] : 0.f);
        const float mean_logit = params.log2_units ? sums.y * kLn2 : sums.y;
        centred = dots[each] - excess * (mean_logit / scale);
      }
      row_dots[in_block + 8 * each] = centred;
    }
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    float total = 0.f;
    for (int i = threadIdx.x; i < kRows; i += 32) total += row_dots[i];
#pragma unroll
    for (int d = 16; d > 0; d /= 2) total += __shfl_xor_sync(0xffffffff, total, d);
    if (threadIdx.x == 0) {
      const int blocks = (p.seqlen_q + kRows - 1) / kRows;
      params.dscale_partials[bh * blocks + first / kRows] = total;
    }
  }
}

}  // namespace jca
