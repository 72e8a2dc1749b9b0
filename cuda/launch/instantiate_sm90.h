// Builds the rows of the launch table for Hopper; included by the sm90_*.cu files alone. A build for tuning
// has candidates too, tiles that benchmarks/tune.py times beside the shipped ones.
#pragma once

#include "kernels/sm90/bwd.h"
#include "kernels/sm90/bwd_wide.h"
#include "kernels/sm90/fwd.h"
#include "launch/instance_rows.h"

namespace jca {

template <class Tile>
Instance sm90_fwd_instance(Arithmetic arithmetic, int candidate = 0) {
  return {.direction = Direction::kForward,
          .arithmetic = arithmetic,
          .family = Family::kSm90,
          .unbounded = false,
          .small = false,
          .head_dim = Tile::kHeadDim,
          .kernel = reinterpret_cast<const void*>(&sm90::cosine_attn_fwd_sm90<Tile>),
          .threads = Tile::kThreads,
          .smem_bytes = Tile::kSmemBytes,
          .block_m = Tile::kBlockM,
          .block_n = Tile::kBlockN,
          .raw = Tile::kRaw,
          .makes_keys = Tile::kMakesKeys,
          .stages = Tile::kStages,
          .candidate = candidate};
}

// TS: of q and k, TV: of v.
template <class TS, class TV, bool kShifted>
InstanceRow sm90_fwd_row(Arithmetic arithmetic) {
  using sm90::FwdShape, sm90::FwdTile;
  return {sm90_fwd_instance<FwdTile<TS, TV, 64, kShifted>>(arithmetic),
#ifdef JAX_COSINE_ATTN_TUNE
          sm90_fwd_instance<FwdTile<TS, TV, 64, kShifted, false, FwdShape{4, 64, 6, 2}>>(arithmetic, 1),
          sm90_fwd_instance<FwdTile<TS, TV, 64, kShifted, false, FwdShape{3, 64, 8, 2}>>(arithmetic, 2),
          sm90_fwd_instance<FwdTile<TS, TV, 64, kShifted, false, FwdShape{3, 128, 4, 2}>>(arithmetic, 3),
          sm90_fwd_instance<FwdTile<TS, TV, 64, kShifted, false, FwdShape{2, 128, 4, 2}>>(arithmetic, 4),
#endif
          sm90_fwd_instance<FwdTile<TS, TV, 96, kShifted>>(arithmetic),
          sm90_fwd_instance<FwdTile<TS, TV, 128, kShifted>>(arithmetic),
#ifdef JAX_COSINE_ATTN_TUNE
          sm90_fwd_instance<FwdTile<TS, TV, 128, kShifted, false, FwdShape{2, 64, 4, 2}>>(arithmetic, 1),
          sm90_fwd_instance<FwdTile<TS, TV, 128, kShifted, false, FwdShape{2, 64, 5, 1}>>(arithmetic, 2),
#endif
          sm90_fwd_instance<FwdTile<TS, TV, 256, kShifted>>(arithmetic)};
}

// Those of rows of one type, raw keys first.
template <class T, bool kShifted>
InstanceRow sm90_fwd_rows(Arithmetic arithmetic) {
  using sm90::FwdTile;
  InstanceRow rows{sm90_fwd_instance<FwdTile<T, T, 64, kShifted, true>>(arithmetic),
                   sm90_fwd_instance<FwdTile<T, T, 96, kShifted, true>>(arithmetic),
                   sm90_fwd_instance<FwdTile<T, T, 128, kShifted, true>>(arithmetic)};
  const InstanceRow others = sm90_fwd_row<T, T, kShifted>(arithmetic);
  rows.insert(rows.end(), others.begin(), others.end());
  return rows;
}

// TileOfSums: of the kernel that adds up rows for dscale too.
template <class Tile, class TileOfSums, template <class> class Kernel = sm90::BwdKernel>
Instance sm90_bwd_instance(Arithmetic arithmetic, int candidate = 0) {
  static_assert(Tile::kSmemBytes == TileOfSums::kSmemBytes);
  return {.direction = Direction::kBackward,
          .arithmetic = arithmetic,
          .family = Family::kSm90,
          .unbounded = false,
          .small = false,
          .head_dim = Tile::kHeadDim,
          .kernel = reinterpret_cast<const void*>(&sm90::cosine_attn_bwd_sm90<Tile, Kernel<Tile>>),
          .threads = Tile::kThreads,
          .smem_bytes = Tile::kSmemBytes,
          .block_m = Tile::kBlockM,
          .block_n = Tile::kBlockN,
          .kernel_of_sums =
              reinterpret_cast<const void*>(&sm90::cosine_attn_bwd_sm90<TileOfSums, Kernel<TileOfSums>>),
          .stages = Tile::kStages,
          .key_stages = Tile::kKeyStages,
          .candidate = candidate};
}

// kStages: of a candidate, of queries and of keys.
template <class T, int kHeadDim, int... kStages>
Instance sm90_narrow_bwd_instance(Arithmetic arithmetic, int candidate = 0) {
  return sm90_bwd_instance<sm90::BwdTile<T, kHeadDim, false, kStages...>,
                           sm90::BwdTile<T, kHeadDim, true, kStages...>>(arithmetic, candidate);
}

template <class T>
InstanceRow sm90_bwd_row(Arithmetic arithmetic) {
  return {sm90_narrow_bwd_instance<T, 64>(arithmetic),
#ifdef JAX_COSINE_ATTN_TUNE
          sm90_narrow_bwd_instance<T, 64, 2, 1>(arithmetic, 1),
          sm90_narrow_bwd_instance<T, 64, 3, 1>(arithmetic, 2),
#endif
          sm90_narrow_bwd_instance<T, 128>(arithmetic),
#ifdef JAX_COSINE_ATTN_TUNE
          sm90_narrow_bwd_instance<T, 128, 2, 2>(arithmetic, 1),
          sm90_narrow_bwd_instance<T, 128, 3, 1>(arithmetic, 2),
#endif
          sm90_bwd_instance<sm90::WideBwdTile<T, false>, sm90::WideBwdTile<T, true>, sm90::WideBwdKernel>(
              arithmetic),
  };
}

}  // namespace jca
