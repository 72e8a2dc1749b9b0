// Entry points: what the FFI handlers call.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "kernels/params.h"
#include "launch/instances.h"

namespace jca {

// Empty message = success.
struct Status {
  std::string message;
  bool ok() const { return message.empty(); }
};

struct ForwardCall {
  Problem problem;
  Arithmetic arithmetic;
  float shift;                    // c of P = exp(S - c); unused where unbounded
  Rows q, k, v;                   // raw
  // Scratch [B, N, T, Hp], [Bk, K, S, Hp] and [Bv, K, S, Hp], the last used when H is not a multiple of 8.
  // With a list of keys v_padded may be used for every H, and with one for each entry Bk and Bv are B.
  Rows q_hat, k_hat, v_padded;
  Rows out;
  float* lse;
  float* lse_low;
  bool unbounded;                 // Instance::unbounded
  // Scratch of the kernel for sm_90, [kCounters + Bk K S / kCountedKeys], the quotient rounded up.
  int* counters;
  int splits;                     // CTAs of a (batch, kv head) of the decode kernel; 0: the other
  float* partials;                // scratch of DecodeParams
};
// What decode takes beside what the forward does: 16-bit rows of a multiple of 8 elements, at most
// kMaxPackedRows queries for a kv head, bounded logits, and keys with one norm or none. q_hat, k_hat and
// v_padded are unused.
constexpr int kMaxPackedRows = 64;
Status launch_forward(cudaStream_t stream, ForwardCall call);

struct BackwardCall {
  Problem problem;
  Arithmetic arithmetic;
  Rows q, k, v, out, dout;        // raw
  const float* lse;
  const float* lse_low;
  const float* dlse;              // or null
  Rows q_hat, k_hat;              // scratch, in the inputs' dtype; or dq and dk, which come last
  Rows v_padded, dout_padded;     // scratch, as above
  float* q_inverse_norm;          // scratch [B, N, T, groups]
  float* k_inverse_norm;          // scratch [Bk, K, S, groups]
  RowStats stats;                 // scratch
  // Scratch [B, N, T rounded up to whole DqTiles, Hp], float32; float64 with three passes.
  void* dq_accum;
  int* next_tile;                 // scratch of the kernel for sm_90
  float2* row_sums;               // scratch [B, N, T], with dscale of whole rows; or null
  Rows dq, dk, dv;
  float* dscale;                  // [dscale_batch, N] or null
  int dscale_batch;
  float* dscale_partials;         // scratch [B, N, row blocks of finish_dq], with dscale
  BiasGradient dbias, drelative_bias;
  int64_t dbias_size, drelative_bias_size;
  bool unbounded;
  bool deterministic;             // every sum in one order; wants unbounded
  float* dbias_partials;          // scratch, dbias_slices times dbias; with more than one slice
  int dbias_slices;               // deterministic: CTAs that share out the sum of a block of dbias
  float* diagonal_partials;       // scratch of DbiasParams; deterministic, with drelative_bias
};
Status launch_backward(cudaStream_t stream, BackwardCall call);

}  // namespace jca
