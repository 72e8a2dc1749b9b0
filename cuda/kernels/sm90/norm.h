// Unit rows made where a tile of raw rows lies, in shared memory with the 128-byte swizzle.
#pragma once

#include "kernels/rows.h"
#include "kernels/sm80/tile.h"

namespace jca::sm90 {

// A row held by lanes l and l + 16.
template <int kElems_>
struct TwoLanes {
  static constexpr int kElems = kElems_;
  __device__ static float sum(float x) { return x + __shfl_xor_sync(0xffffffff, x, 16); }
  __device__ static float max(float x) { return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 16)); }
};

// The 16 rows of a warp from `first` on become unit rows. Chunks of 8 rows are in different banks, whichever
// column they are of. Fences are the caller's.
template <class T, int kChunks, int kRows>
__device__ inline void normalize_tile(T (&tile)[kChunks][kRows][64], float (&inverse_norms)[kRows],
                                      int first) {
  using L = TwoLanes<32 * kChunks>;
  constexpr int kPieces = L::kElems / 8;  // of 16 bytes
  const int lane = threadIdx.x % 32, row = first + lane % 16;
  const auto at = [&](int i) {
    const int piece = lane / 16 * kPieces + i;
    return reinterpret_cast<uint4*>(tile[piece / 8][row]) + (piece % 8 ^ row % 8);
  };
  float x[L::kElems];
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const uint4 piece = *at(i);
    const uint32_t pairs[] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 pair = sm80::Half16<T>::unpack(pairs[j]);
      x[8 * i + 2 * j] = pair.x;
      x[8 * i + 2 * j + 1] = pair.y;
    }
  }
  const float inverse_norm = normalize_slice<float, L>(x, 1.f, [](int) { return true; });
  if (lane < 16) inverse_norms[row] = inverse_norm;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const auto pack = [&](int j) { return sm80::Half16<T>::pack(x[8 * i + 2 * j], x[8 * i + 2 * j + 1]); };
    *at(i) = {pack(0), pack(1), pack(2), pack(3)};
  }
}

}  // namespace jca::sm90
