// lse of a row in two floats.
#pragma once

namespace jca {

// c + log(l) as a float32, and what rounding took from it: the backward's weights are exp(S - lse), and
// half an ulp of lse shows in a whole row of them. Two-sum: Knuth, TAOCP 2, 4.2.2.
struct SplitLog {
  float high, low;
};
__device__ inline SplitLog log_of_sum(float l, float c) {
  const float log_l = logf(l);
  const float high = c + log_l, from_log = high - c;
  const float low = (c - (high - from_log)) + (log_l - from_log) + (l * expf(-log_l) - 1.f);
  // Where c and log(l) cancel, low may be larger than half an ulp.
  const float sum = high + low;
  return {sum, low - (sum - high)};
}

}  // namespace jca
