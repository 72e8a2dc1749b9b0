// Builds the rows of the launch table for Hopper; included by the sm90_*.cu files alone.
#pragma once

#include "kernels/sm90/bwd.h"
#include "kernels/sm90/fwd.h"
#include "launch/instance_rows.h"

namespace jca {

template <class Tile>
Instance sm90_fwd_instance(Arithmetic arithmetic) {
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
          .raw = Tile::kRaw};
}

// TS: of q^ and k^, TV: of v.
template <class TS, class TV, bool kShifted>
InstanceRow sm90_fwd_row(Arithmetic arithmetic) {
  return {sm90_fwd_instance<sm90::FwdTile<TS, TV, 64, kShifted, true>>(arithmetic),
          sm90_fwd_instance<sm90::FwdTile<TS, TV, 96, kShifted, true>>(arithmetic),
          sm90_fwd_instance<sm90::FwdTile<TS, TV, 128, kShifted, true>>(arithmetic),
          sm90_fwd_instance<sm90::FwdTile<TS, TV, 64, kShifted>>(arithmetic),
          sm90_fwd_instance<sm90::FwdTile<TS, TV, 96, kShifted>>(arithmetic),
          sm90_fwd_instance<sm90::FwdTile<TS, TV, 128, kShifted>>(arithmetic),
          sm90_fwd_instance<sm90::FwdTile<TS, TV, 256, kShifted>>(arithmetic)};
}

template <class T, int kHeadDim>
Instance sm90_bwd_instance(Arithmetic arithmetic) {
  using Tile = sm90::BwdTile<T, kHeadDim, false>;
  using TileOfSums = sm90::BwdTile<T, kHeadDim, true>;
  static_assert(Tile::kSmemBytes == TileOfSums::kSmemBytes);
  return {.direction = Direction::kBackward,
          .arithmetic = arithmetic,
          .family = Family::kSm90,
          .unbounded = false,
          .small = false,
          .head_dim = Tile::kHeadDim,
          .kernel = reinterpret_cast<const void*>(&sm90::cosine_attn_bwd_sm90<Tile>),
          .threads = Tile::kThreads,
          .smem_bytes = Tile::kSmemBytes,
          .block_m = Tile::kBlockM,
          .block_n = Tile::kBlockN,
          .kernel_of_sums = reinterpret_cast<const void*>(&sm90::cosine_attn_bwd_sm90<TileOfSums>)};
}

template <class T>
InstanceRow sm90_bwd_row(Arithmetic arithmetic) {
  return {sm90_bwd_instance<T, 64>(arithmetic), sm90_bwd_instance<T, 128>(arithmetic)};
}

}  // namespace jca
