#include "launch/instantiate_sm80.h"

namespace jca {

InstanceRow sm80_fwd_3xtf32_unbounded() {
  using namespace sm80;
  return fwd_row<Tf32<true>, Tf32<true>, true>(Arithmetic::kThreeTf32);
}

}  // namespace jca
