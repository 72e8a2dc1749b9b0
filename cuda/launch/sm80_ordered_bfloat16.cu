#include "launch/instantiate_sm80.h"

namespace jca {

InstanceRow sm80_ordered_bfloat16() {
  return ordered_row<sm80::Half16<__nv_bfloat16>>(Arithmetic::kBfloat16);
}

}  // namespace jca
