// Unit rows made where a tile of raw rows lies, in shared memory with the 128-byte swizzle.
#pragma once

#include "kernels/rows.h"
#include "kernels/sm80/tile.h"
#include "ptx/tma.h"

namespace jca::sm90 {

// Eight lanes that hold a row, 8 elements of each chunk.
template <int kChunks>
struct ChunkLanes : RowLanes<8> {
  static constexpr int kElems = 8 * kChunks;
};

// Raw rows become unit rows, as normalize_rows does it, for one group. kThreads of which this is number
// `thread` share out kCount rows from `first` on; lanes hold columns in whichever order the swizzle has them,
// and all of a thread's rows are in flight together. keep(row, inverse norm) is told of each, by the first of
// its lanes.
template <int kThreads, int kCount, class T, int kChunks, int kRows, class Keep>
__device__ inline void normalize_tile(T (&tile)[kChunks][kRows][64], int first, int thread, Keep keep) {
  using Lanes = ChunkLanes<kChunks>;
  constexpr int kRowsApart = kThreads / 8, kEach = kCount / kRowsApart;
  float x[kEach][Lanes::kElems], inverse_norms[kEach];
  const auto row_of = [&](int each) { return first + thread / 8 + each * kRowsApart; };
  const auto for_eights = [&](auto f) {
#pragma unroll
    for (int each = 0; each < kEach; ++each) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        f(reinterpret_cast<uint4*>(tile[c][row_of(each)])[thread % 8], x[each] + 8 * c);
      }
    }
  };
  for_eights([](const uint4& eight, float* to) {
    const uint4 pairs = eight;
#pragma unroll
    for (const uint32_t pair : {pairs.x, pairs.y, pairs.z, pairs.w}) {
      const float2 both = sm80::Half16<T>::unpack(pair);
      *to++ = both.x;
      *to++ = both.y;
    }
  });
  normalize_slices<T, float, Lanes>(x, 1.f, inverse_norms, [](int) { return true; });
#pragma unroll
  for (int each = 0; each < kEach; ++each) {
    if (thread % 8 == 0) keep(row_of(each), inverse_norms[each]);
  }
  for_eights([](uint4& eight, const float* from) {
    const auto pack = [&](int e) { return sm80::Half16<T>::pack(from[e], from[e + 1]); };
    eight = {pack(0), pack(2), pack(4), pack(6)};
  });
  ptx::fence_async_shared();
}

}  // namespace jca::sm90
