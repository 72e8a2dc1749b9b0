#include "launch/instantiate_sm90.h"

namespace jca {

InstanceRow sm90_bwd_float16() { return sm90_bwd_row<__half>(Arithmetic::kFloat16); }

}  // namespace jca
