// Which keys a query row may see, and which blocks of keys a block of rows needs: one definition for
// every kernel. Query i of batch entry b stands at position i + (S_b - T_b) among the keys.
#pragma once

#include "kernels/params.h"

namespace jca {

struct Visible {
  int seqlen_q, seqlen_k;  // T_b, S_b
  int offset;              // S_b - T_b
  bool is_causal;

  __device__ Visible(const Problem& p, int64_t b)
      : seqlen_q(p.q_lengths(b)),
        seqlen_k(p.kv_lengths(b)),
        offset(seqlen_k - seqlen_q),
        is_causal(p.is_causal) {}

  // Structural part only; the key mask comes on top.
  __device__ bool allowed(int i, int j) const {
    return i < seqlen_q && j < seqlen_k && (!is_causal || j <= i + offset);
  }
  // Keys [0, k_end) can be seen by rows [i0, i1).
  __device__ int k_end(int i0, int i1) const {
    const int last = min(i1, seqlen_q) - 1;
    if (i0 > last) return 0;
    return is_causal ? max(0, min(seqlen_k, last + offset + 1)) : seqlen_k;
  }
  // Rows [q_begin, seqlen_q) can see keys [j0, ...).
  __device__ int q_begin(int j0) const {
    if (j0 >= seqlen_k) return seqlen_q;
    return is_causal ? min(seqlen_q, max(0, j0 - offset)) : 0;
  }
  // Every pair of [i0, i1) x [j0, j1) is allowed.
  __device__ bool all_allowed(int i0, int i1, int j0, int j1) const {
    return i1 <= seqlen_q && j1 <= seqlen_k && (!is_causal || j1 - 1 <= i0 + offset);
  }
};

}  // namespace jca
