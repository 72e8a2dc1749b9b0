#include "launch/instantiate_sm80.h"

namespace jca {

InstanceRow sm80_ordered_tf32() { return ordered_row<sm80::Tf32<false>>(Arithmetic::kTf32); }

}  // namespace jca
