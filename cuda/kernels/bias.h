// bias and relative_bias in the kernels: added to a fragment of logits, and their gradients.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/visible.h"

namespace jca {

// -inf means masked, also where the logit is NaN.
__device__ inline void add_bias(float& s, float bias) {
  s = bias == -INFINITY ? -INFINITY : s + bias;
}

template <typename T, int kM, int kN>
__device__ inline void add_dense_bias(float (&s)[kM][kN][4], const Problem& p, int b, int head,
                                      FragmentAt at) {
  const Bias& bias = p.bias;
  const T* data = static_cast<const T*>(bias.data) + bias.batch(b) * bias.stride_batch +
                  head * bias.stride_head;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const T* row = data + min(at.row_of(m, 2 * half), p.seqlen_q - 1) * bias.stride_row;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          const int j = min(at.col_of(n, e), p.seqlen_k - 1);
          add_bias(s[m][n][e], static_cast<float>(row[j * bias.stride_col]));
        }
      }
    }
  }
}

template <typename T>
__device__ inline bool is_masked_by(const Bias& bias, int b, int head, int i, int j) {
  const T* data = static_cast<const T*>(bias.data) + bias.batch(b) * bias.stride_batch +
                  head * bias.stride_head;
  return static_cast<float>(data[i * bias.stride_row + j * bias.stride_col]) == -INFINITY;
}

// Whether row i may attend key j, biases considered too: for a few pairs only.
__device__ inline bool is_allowed(const Problem& p, const Visible& visible, int head, int i, int j) {
  const int b = visible.b;
  if (!visible.is_allowed(p, head, i, j)) return false;
  if (p.relative_bias.data != nullptr) {
    const RelativeBias& relative = p.relative_bias;
    const float* data =
        relative.data + relative.batch(b) * relative.stride_batch + head * relative.stride_head;
    if (data[i - j + visible.first_relative(p)] == -INFINITY) return false;
  }
  if (p.bias.data == nullptr) return true;
  switch (p.bias.type) {
    case FloatType::kFloat16:
      return !is_masked_by<__half>(p.bias, b, head, i, j);
    case FloatType::kBfloat16:
      return !is_masked_by<__nv_bfloat16>(p.bias, b, head, i, j);
    default:
      return !is_masked_by<float>(p.bias, b, head, i, j);
  }
}

// Both biases, to a warp's fragment.
template <int kM, int kN>
__device__ inline void add_biases(float (&s)[kM][kN][4], const Problem& p, const Visible& visible,
                                  int head, FragmentAt at) {
  if (p.bias.data != nullptr) {
    switch (p.bias.type) {
      case FloatType::kFloat16:
        add_dense_bias<__half>(s, p, visible.b, head, at);
        break;
      case FloatType::kBfloat16:
        add_dense_bias<__nv_bfloat16>(s, p, visible.b, head, at);
        break;
      case FloatType::kFloat32:
        add_dense_bias<float>(s, p, visible.b, head, at);
        break;
    }
  }
  if (p.relative_bias.data != nullptr) {
    const RelativeBias& relative = p.relative_bias;
    const float* data = relative.data + relative.batch(visible.b) * relative.stride_batch +
                        head * relative.stride_head;
    const int zero = visible.first_relative(p), last = p.seqlen_q + p.seqlen_k - 2;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int entry = at.row_of(m, e) - at.col_of(n, e) + zero;
          add_bias(s[m][n][e], data[max(0, min(entry, last))]);
        }
      }
    }
  }
}

__device__ inline void add_to(const BiasGradient& gradient, int64_t at, float x) {
  if (gradient.wide != nullptr) {
    atomicAdd(gradient.wide + at, double(x));
  } else {
    atomicAdd(gradient.data + at, x);
  }
}

// dbias += ds, a warp's fragment, summed within the warp over the axes that bias does not have.
template <int kM, int kN>
__device__ inline void add_to_dbias(const BiasGradient& dbias, const float (&ds)[kM][kN][4],
                                    const Visible& visible, int head, FragmentAt at) {
  const int lane = threadIdx.x % 32;
  const int64_t first = visible.b % dbias.batch * dbias.stride_batch + head * dbias.stride_head;
  if (dbias.stride_row != 0 && dbias.stride_col != 0) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = at.row_of(m, e), j = at.col_of(n, e);
          if (i < visible.seqlen_q && j < visible.seqlen_k) {
            add_to(dbias, first + i * dbias.stride_row + j, ds[m][n][e]);
          }
        }
      }
    }
  } else if (dbias.stride_col != 0) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float sum = 0.f;
#pragma unroll
        for (int m = 0; m < kM; ++m) sum += ds[m][n][e] + ds[m][n][2 + e];
        for (int d = 4; d < 32; d *= 2) sum += __shfl_xor_sync(0xffffffff, sum, d);
        const int j = at.col_of(n, e);
        if (lane < 4 && j < visible.seqlen_k) add_to(dbias, first + j, sum);
      }
    }
  } else {
    float total = 0.f;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = 0.f;
#pragma unroll
        for (int n = 0; n < kN; ++n) sum += ds[m][n][half * 2] + ds[m][n][half * 2 + 1];
        sum += __shfl_xor_sync(0xffffffff, sum, 1);
        sum += __shfl_xor_sync(0xffffffff, sum, 2);
        const int i = at.row_of(m, half * 2);
        if (dbias.stride_row != 0 && lane % 4 == 0 && i < visible.seqlen_q) {
          add_to(dbias, first + i * dbias.stride_row, sum);
        }
        total += sum;
      }
    }
    if (dbias.stride_row == 0) {
      for (int d = 4; d < 32; d *= 2) total += __shfl_xor_sync(0xffffffff, total, d);
      if (lane == 0) add_to(dbias, first, total);
    }
  }
}

// drelative_bias += the sums of dS over the diagonals of a tile whose first row and key are m0 and n0.
template <class Tile>
__device__ inline void add_to_drelative_bias(const BiasGradient& drelative, const Tile& ds,
                                             const Problem& p, const Visible& visible, int head,
                                             int m0, int n0) {
  const int64_t first =
      visible.b % drelative.batch * drelative.stride_batch + head * drelative.stride_head;
  const int zero = m0 - n0 + visible.first_relative(p);
  for (int d = int(threadIdx.x) - (Tile::kCols - 1); d < Tile::kRows; d += blockDim.x) {
    float sum = 0.f;
    for (int r = max(0, d); r < min(Tile::kRows, d + Tile::kCols); ++r) {
      sum += static_cast<float>(*ds.at(r, r - d));
    }
    const int entry = d + zero;  // outside only for pairs past the end, whose dS is 0
    if (entry >= 0 && entry < p.seqlen_q + p.seqlen_k - 1) add_to(drelative, first + entry, sum);
  }
}

}  // namespace jca
