#include "launch/instantiate_sm90.h"

namespace jca {

InstanceRow sm90_fwd_bfloat16() { return sm90_fwd_rows<__nv_bfloat16, true>(Arithmetic::kBfloat16); }

}  // namespace jca
