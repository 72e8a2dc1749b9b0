#include "launch/instantiate_sm80.h"

namespace jca {

InstanceRow sm80_ordered_3xtf32() { return ordered_row<sm80::Tf32<true>>(Arithmetic::kThreeTf32); }

}  // namespace jca
