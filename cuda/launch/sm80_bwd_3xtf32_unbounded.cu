#include "launch/instantiate_sm80.h"

namespace jca {

InstanceRow sm80_bwd_3xtf32_unbounded() {
  return bwd_row<sm80::Tf32<true>, true>(Arithmetic::kThreeTf32);
}

}  // namespace jca
