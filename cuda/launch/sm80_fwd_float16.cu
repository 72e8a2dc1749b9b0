#include "launch/instantiate_sm80.h"

namespace jca {

InstanceRow sm80_fwd_float16() { return fwd_row<sm80::Half16<__half>, sm80::Half16<__half>>(Arithmetic::kFloat16); }

}  // namespace jca
