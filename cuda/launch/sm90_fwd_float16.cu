#include "launch/instantiate_sm90.h"

namespace jca {

InstanceRow sm90_fwd_float16() { return sm90_fwd_rows<__half, false>(Arithmetic::kFloat16); }

}  // namespace jca
