#include "launch/instantiate_sm80.h"

namespace jca {

InstanceRow sm80_bwd_3xtf32() {
  return bwd_row<sm80::Tf32<true>, false>(Arithmetic::kThreeTf32);
}

}  // namespace jca
