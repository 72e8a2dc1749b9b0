#include "launch/instantiate_sm80.h"

namespace jca {

InstanceRow sm80_fwd_tf32() { return fwd_row<sm80::Tf32<false>, sm80::Tf32<false>>(Arithmetic::kTf32); }

}  // namespace jca
