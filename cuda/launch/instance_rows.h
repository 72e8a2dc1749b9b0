// The rows of the launch table, one per direction, arithmetic and bound, each from a source file of its
// own.
#pragma once

#include <vector>

#include "launch/instances.h"

namespace jca {

using InstanceRow = std::vector<Instance>;

InstanceRow sm80_fwd_float16();
InstanceRow sm80_fwd_bfloat16();
InstanceRow sm80_fwd_float16_bfloat16();
InstanceRow sm80_fwd_tf32();
InstanceRow sm80_fwd_3xtf32();
InstanceRow sm80_fwd_float16_unbounded();
InstanceRow sm80_fwd_bfloat16_unbounded();
InstanceRow sm80_fwd_tf32_unbounded();
InstanceRow sm80_fwd_3xtf32_unbounded();
InstanceRow sm80_bwd_float16();
InstanceRow sm80_bwd_bfloat16();
InstanceRow sm80_bwd_tf32();
InstanceRow sm80_bwd_3xtf32();
InstanceRow sm80_bwd_float16_unbounded();
InstanceRow sm80_bwd_bfloat16_unbounded();
InstanceRow sm80_bwd_tf32_unbounded();
InstanceRow sm80_bwd_3xtf32_unbounded();
InstanceRow sm80_decode_float16();
InstanceRow sm80_decode_bfloat16();
InstanceRow sm80_ordered_float16();
InstanceRow sm80_ordered_bfloat16();
InstanceRow sm80_ordered_tf32();
InstanceRow sm80_ordered_3xtf32();

InstanceRow sm90_fwd_float16();
InstanceRow sm90_fwd_bfloat16();
InstanceRow sm90_fwd_float16_bfloat16();
InstanceRow sm90_bwd_float16();
InstanceRow sm90_bwd_bfloat16();

}  // namespace jca
