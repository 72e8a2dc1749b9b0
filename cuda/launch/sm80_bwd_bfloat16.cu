#include "launch/instantiate_sm80.h"

namespace jca {

InstanceRow sm80_bwd_bfloat16() {
  return bwd_row<sm80::Half16<__nv_bfloat16>, false>(Arithmetic::kBfloat16);
}

}  // namespace jca
