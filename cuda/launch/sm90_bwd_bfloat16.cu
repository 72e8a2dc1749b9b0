#include "launch/instantiate_sm90.h"

namespace jca {

InstanceRow sm90_bwd_bfloat16() { return sm90_bwd_row<__nv_bfloat16>(Arithmetic::kBfloat16); }

}  // namespace jca
