// CTAs of a cluster and their shared memory (sm_90). PTX ISA, "Parallel Synchronization and Communication
// Instructions: barrier.cluster, mbarrier.arrive", "Data Movement and Conversion Instructions: mapa,
// st.async".
#pragma once

#include <cstdint>

#include "ptx/tma.h"

namespace jca::ptx {

// This CTA's place in its cluster, and how many there are ("%cluster_ctarank", "%cluster_nctarank").
__device__ inline int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ inline int cluster_size() {
  int size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// All threads of all CTAs of the cluster meet.
__device__ inline void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
}

// The place in shared memory of another CTA that has this address in this one ("mapa").
__device__ inline uint32_t remote_address(uint32_t smem, int rank) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(smem), "r"(rank));
  return remote;
}

// Writes 16 bytes there, which count towards those that a barrier of that CTA expects ("st.async").
__device__ inline void store_remote_x4(uint32_t remote, const float (&x)[4], uint32_t remote_full) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
          remote),
      "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]), "r"(remote_full)
      : "memory");
}

// Without a branch. Orders what this thread has read of shared memory, and no other memory, before what the
// barrier's CTA does next.
__device__ inline void arrive_remote_if(bool arrives, uint32_t remote_barrier) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %1, 0; "
      "@p mbarrier.arrive.shared::cluster.b64 _, [%0];}" ::"r"(remote_barrier),
      "r"(int(arrives))
      : "memory");
}

}  // namespace jca::ptx
