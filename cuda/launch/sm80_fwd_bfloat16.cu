#include "launch/instantiate_sm80.h"

namespace jca {

// q^ and k^ in bfloat16, as in the backward: at large scales P of differently rounded rows would not
// sum to one there.
InstanceRow sm80_fwd_bfloat16() {
  using namespace sm80;
  return fwd_row<Half16<__nv_bfloat16>, Half16<__nv_bfloat16>, false>(Arithmetic::kBfloat16);
}

}  // namespace jca
