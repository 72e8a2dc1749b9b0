#include "launch/instantiate_sm80.h"

namespace jca {

InstanceRow sm80_bwd_float16() {
  return bwd_row<sm80::Half16<__half>, false>(Arithmetic::kFloat16);
}

}  // namespace jca
