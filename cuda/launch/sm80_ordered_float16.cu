#include "launch/instantiate_sm80.h"

namespace jca {

InstanceRow sm80_ordered_float16() { return ordered_row<sm80::Half16<__half>>(Arithmetic::kFloat16); }

}  // namespace jca
