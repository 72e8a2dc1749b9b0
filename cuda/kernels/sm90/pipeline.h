// What the Hopper kernels share: rings of tiles between a producer warp and warpgroups that consume them, and
// the walk over blocks by kind.
#pragma once

#include <climits>
#include <type_traits>

#include "kernels/visible.h"
#include "ptx/tma.h"
#include "ptx/wgmma.h"

namespace jca::sm90 {

constexpr int kTileAlignment = 1024;  // of swizzled tiles

// Position in a ring of kSize stages: `parity` of the phase in which the stage is filled.
template <int kSize>
struct Ring {
  int stage = 0;
  unsigned parity = 0;
  __device__ void advance() {
    if (++stage == kSize) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Which block of which (batch, head) a tile is, of `blocks` in each of `heads`. Tiles of a section, so many
// neighbouring heads, are neighbours, all first blocks first.
struct TilePlace {
  int block, head;

  __device__ TilePlace(int tile, int section, int blocks, int heads) {
    const int first_head = tile / (section * blocks) * section, in_section = tile % (section * blocks);
    const int size = min(section, heads - first_head);
    block = in_section / size;
    head = first_head + in_section % size;
  }
};

// A warp is done with a stage, all of its lanes.
__device__ inline void release(ptx::Mbarrier& empty) {
  __syncwarp();
  empty.arrive_if(threadIdx.x % 32 == 0);
}

// Accesses to x stay below.
template <int kM>
__device__ inline void pin(float (&x)[kM][4]) {
#pragma unroll
  for (int n = 0; n < kM; ++n) {
    asm volatile("" : "+f"(x[n][0]), "+f"(x[n][1]), "+f"(x[n][2]), "+f"(x[n][3])::"memory");
  }
}

// How many blocks hold forbidden and allowed pairs, how many allowed ones alone, and between which they are.
struct BlockCounts {
  int partial = 0, full = 0;
  int first = INT_MAX, last = 0;  // [first, last)

  // Those of begin ... end - 1, by a warp.
  template <class KindOf>
  __device__ void add(int begin, int end, KindOf kind_of) {
    for (int first = begin; first < end; first += 32) {
      const int block = first + int(threadIdx.x) % 32;
      const BlockKind kind = block < end ? kind_of(block) : BlockKind{false, false};
      partial += __popc(__ballot_sync(0xffffffff, kind.any && !kind.all));
      full += __popc(__ballot_sync(0xffffffff, kind.all));
      if (const unsigned some = __ballot_sync(0xffffffff, kind.any)) {
        this->first = min(this->first, first + __ffs(some) - 1);
        last = max(last, first + 32 - __clz(some));
      }
    }
  }
  __device__ int of(bool all) const { return all ? full : partial; }
};

// A warp visits the blocks that are full, or those that are partial.
template <class KindOf, class Visit>
__device__ inline void for_each_block(BlockWindow& window, int begin, int end, bool all, KindOf kind_of,
                                      Visit visit) {
  const auto chosen = [&](int block) {
    const BlockKind kind = kind_of(block);
    return BlockKind{all ? kind.all : kind.any && !kind.all, false};
  };
  for (int block = window.seek(begin, end, chosen); block >= 0; block = window.next(block, chosen)) {
    visit(block);
  }
}

// Whether one of 8 elements is not finite: its exponent's bits are all set.
template <class T>
__device__ inline bool has_nonfinite(uint4 x) {
  constexpr uint32_t kExponent = std::is_same_v<T, __half> ? 0x7c00 : 0x7f80;
  bool found = false;
#pragma unroll
  for (const uint32_t pair : {x.x, x.y, x.z, x.w}) {
    found |= (pair & kExponent) == kExponent || (pair >> 16 & kExponent) == kExponent;
  }
  return found;
}

// The struct that a kernel keeps in dynamic shared memory, whose tiles come first.
template <class Shared>
__device__ inline Shared& aligned_shared() {
  extern __shared__ __align__(kTileAlignment) char tiles[];
  if (ptx::smem_address(tiles) % kTileAlignment != 0) __trap();
  return *reinterpret_cast<Shared*>(tiles);
}

}  // namespace jca::sm90
