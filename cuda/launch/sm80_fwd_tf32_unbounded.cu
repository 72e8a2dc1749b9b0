#include "launch/instantiate_sm80.h"

namespace jca {

InstanceRow sm80_fwd_tf32_unbounded() {
  using namespace sm80;
  return fwd_row<Tf32<false>, Tf32<false>, true>(Arithmetic::kTf32);
}

}  // namespace jca
