#include "launch/instantiate_sm80.h"

namespace jca {

InstanceRow sm80_bwd_tf32_unbounded() {
  return bwd_row<sm80::Tf32<false>, true>(Arithmetic::kTf32);
}

}  // namespace jca
