#include "launch/instantiate_sm80.h"

namespace jca {

InstanceRow sm80_fwd_float16_unbounded() {
  using namespace sm80;
  return fwd_row<Half16<__half>, Half16<__half>, true>(Arithmetic::kFloat16);
}

}  // namespace jca
