#include "launch/instantiate_sm80.h"

namespace jca {

InstanceRow sm80_fwd_3xtf32() { return fwd_row<sm80::Tf32<true>, sm80::Tf32<true>>(Arithmetic::kThreeTf32); }

}  // namespace jca
