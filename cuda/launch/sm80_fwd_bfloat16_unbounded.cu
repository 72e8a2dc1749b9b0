#include "launch/instantiate_sm80.h"

namespace jca {

InstanceRow sm80_fwd_bfloat16_unbounded() {
  using namespace sm80;
  return fwd_row<Half16<__nv_bfloat16>, Half16<__nv_bfloat16>, true>(Arithmetic::kBfloat16);
}

}  // namespace jca
