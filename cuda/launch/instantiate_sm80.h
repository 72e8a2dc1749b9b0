// Builds the rows of the launch table for one arithmetic; included by the sm80_*.cu files alone, one
// per row so that they compile side by side.
#pragma once

#include "kernels/sm80/bwd.h"
#include "kernels/sm80/decode.h"
#include "kernels/sm80/fwd.h"
#include "kernels/sm80/ordered.h"
#include "launch/instance_rows.h"

namespace jca {

template <class Tile>
Instance make_instance(Direction direction, Arithmetic arithmetic, const void* kernel) {
  return {direction, arithmetic,     Family::kSm80,    Tile::kUnbounded, Tile::kSmall, Tile::kHeadDim,
          kernel,    Tile::kThreads, Tile::kSmemBytes, Tile::kBlockM,    Tile::kBlockN};
}
template <class Tile>
Instance fwd_instance(Arithmetic arithmetic) {
  return make_instance<Tile>(Direction::kForward, arithmetic,
                             reinterpret_cast<const void*>(&sm80::cosine_attn_fwd_sm80<Tile>));
}
template <class Tile>
Instance bwd_instance(Arithmetic arithmetic) {
  return make_instance<Tile>(Direction::kBackward, arithmetic,
                             reinterpret_cast<const void*>(&sm80::cosine_attn_bwd_sm80<Tile>));
}
template <class Tile>
Instance decode_instance(Arithmetic arithmetic) {
  return make_instance<Tile>(Direction::kDecode, arithmetic,
                             reinterpret_cast<const void*>(&sm80::cosine_attn_decode_sm80<Tile>));
}
template <class Tile>
Instance dq_instance(Arithmetic arithmetic) {
  return make_instance<Tile>(Direction::kDq, arithmetic,
                             reinterpret_cast<const void*>(&sm80::cosine_attn_dq_sm80<Tile>));
}
template <class Tile>
Instance dbias_instance(Arithmetic arithmetic) {
  return make_instance<Tile>(Direction::kDbias, arithmetic,
                             reinterpret_cast<const void*>(&sm80::cosine_attn_dbias_sm80<Tile>));
}

template <class OpS, class OpV, bool kUnbounded>
InstanceRow fwd_row(Arithmetic arithmetic) {
  using sm80::FwdTile;
  InstanceRow row = {fwd_instance<FwdTile<OpS, OpV, 32, kUnbounded>>(arithmetic),
                     fwd_instance<FwdTile<OpS, OpV, 64, kUnbounded>>(arithmetic),
                     fwd_instance<FwdTile<OpS, OpV, 96, kUnbounded>>(arithmetic),
                     fwd_instance<FwdTile<OpS, OpV, 128, kUnbounded>>(arithmetic),
                     fwd_instance<FwdTile<OpS, OpV, 192, kUnbounded>>(arithmetic),
                     fwd_instance<FwdTile<OpS, OpV, 256, kUnbounded>>(arithmetic)};
  if constexpr (kUnbounded && sizeof(typename OpV::T) == 4) {
    row.push_back(fwd_instance<FwdTile<OpS, OpV, 128, true, true>>(arithmetic));
    row.push_back(fwd_instance<FwdTile<OpS, OpV, 256, true, true>>(arithmetic));
  }
  return row;
}

template <class Op, bool kUnbounded>
InstanceRow bwd_row(Arithmetic arithmetic) {
  using sm80::BwdTile;
  InstanceRow row = {bwd_instance<BwdTile<Op, 32, kUnbounded>>(arithmetic),
                     bwd_instance<BwdTile<Op, 64, kUnbounded>>(arithmetic),
                     bwd_instance<BwdTile<Op, 96, kUnbounded>>(arithmetic),
                     bwd_instance<BwdTile<Op, 128, kUnbounded>>(arithmetic),
                     bwd_instance<BwdTile<Op, 192, kUnbounded>>(arithmetic),
                     bwd_instance<BwdTile<Op, 256, kUnbounded>>(arithmetic)};
  if constexpr (kUnbounded) {
    if constexpr (sizeof(typename Op::T) == 4) {
      row.push_back(bwd_instance<BwdTile<Op, 64, true, true>>(arithmetic));
    }
    row.push_back(bwd_instance<BwdTile<Op, 128, true, true>>(arithmetic));
    row.push_back(bwd_instance<BwdTile<Op, 256, true, true>>(arithmetic));
  }
  return row;
}

// In a team of four, warps without rows only load. H 256 has no teams of one warp: they spill.
template <class Op>
InstanceRow decode_row(Arithmetic arithmetic) {
  using sm80::DecodeTile;
  return {decode_instance<DecodeTile<Op, 64, 1>>(arithmetic),
          decode_instance<DecodeTile<Op, 64, 4>>(arithmetic),
          decode_instance<DecodeTile<Op, 128, 1>>(arithmetic),
          decode_instance<DecodeTile<Op, 128, 4>>(arithmetic),
          decode_instance<DecodeTile<Op, 256, 4>>(arithmetic)};
}

template <class Op>
InstanceRow ordered_row(Arithmetic arithmetic) {
  using sm80::DqTile, sm80::DbiasTile;
  InstanceRow row = {dq_instance<DqTile<Op, 64>>(arithmetic), dq_instance<DqTile<Op, 128>>(arithmetic),
                     dq_instance<DqTile<Op, 256>>(arithmetic)};
  if constexpr (sizeof(typename Op::T) == 4) {
    row.push_back(dq_instance<DqTile<Op, 256, true>>(arithmetic));
  }
  row.push_back(dbias_instance<DbiasTile<Op, 64>>(arithmetic));
  row.push_back(dbias_instance<DbiasTile<Op, 256>>(arithmetic));
  return row;
}

}  // namespace jca
