#include "launch/instantiate_sm90.h"

namespace jca {

InstanceRow sm90_fwd_float16() { return sm90_fwd_row<__half, __half, false>(Arithmetic::kFloat16); }

}  // namespace jca
