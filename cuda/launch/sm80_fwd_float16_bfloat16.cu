#include "launch/instantiate_sm80.h"

namespace jca {

// q^ and k^ in float16 for bfloat16 inputs: unit vectors need no range, and the error of P falls from
// about 0.3 % to 0.04 %.
InstanceRow sm80_fwd_float16_bfloat16() {
  using namespace sm80;
  return fwd_row<Half16<__half>, Half16<__nv_bfloat16>, false>(Arithmetic::kFloat16Bfloat16);
}

}  // namespace jca
