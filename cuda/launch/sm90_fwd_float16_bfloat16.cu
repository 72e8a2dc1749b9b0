#include "launch/instantiate_sm90.h"

namespace jca {

InstanceRow sm90_fwd_float16_bfloat16() {
  return sm90_fwd_row<__half, __nv_bfloat16, false>(Arithmetic::kFloat16Bfloat16);
}

}  // namespace jca
