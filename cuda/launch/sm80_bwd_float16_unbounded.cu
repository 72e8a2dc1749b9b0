#include "launch/instantiate_sm80.h"

namespace jca {

InstanceRow sm80_bwd_float16_unbounded() {
  return bwd_row<sm80::Half16<__half>, true>(Arithmetic::kFloat16);
}

}  // namespace jca
