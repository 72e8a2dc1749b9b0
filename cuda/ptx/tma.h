// Bulk tensor copies and the barriers they complete on (sm_90). PTX ISA, "Data Movement and Conversion
// Instructions: Tensor copy", "Parallel Synchronization and Communication Instructions: mbarrier".
#pragma once

#include <cuda.h>

#include <cstdint>

#include "ptx/async.h"

namespace jca::ptx {

// A phase completes once `arrivals` threads have arrived and all bytes expected have come; then the next
// one begins. Waiting names the parity of the phase that is to complete, 0 for the first.
struct Mbarrier {
  uint64_t state;

  __device__ uint32_t address() const { return smem_address(&state); }
  __device__ void init(unsigned arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(arrivals) : "memory");
  }
  __device__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address()) : "memory");
  }
  // Without a branch.
  __device__ void arrive_if(bool arrives) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %1, 0; @p mbarrier.arrive.shared::cta.b64 _, [%0];}" ::"r"(address()),
        "r"(int(arrives))
        : "memory");
  }
  __device__ void arrive_and_expect(unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes)
                 : "memory");
  }
  __device__ void wait(unsigned parity) const {
    while (!try_wait(parity)) {}
  }
  // Waits for a while; whether that phase has completed.
  __device__ bool try_wait(unsigned parity) const {
    uint32_t done;
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
        : "=r"(done)
        : "r"(address()), "r"(parity)
        : "memory");
    return done != 0;
  }
  // Whether that phase has completed.
  __device__ bool has_passed(unsigned parity) const {
    uint32_t done;
    asm volatile(
        "{.reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
        : "=r"(done)
        : "r"(address()), "r"(parity)
        : "memory");
    return done != 0;
  }
};

// Makes initialised barriers visible to the copies that complete on them.
__device__ inline void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Orders this thread's accesses to shared memory before those of copies and wgmma ("fence.proxy").
__device__ inline void fence_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The same for global memory.
__device__ inline void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// The map will soon be used ("prefetch").
__device__ inline void prefetch_tensor_map(const CUtensorMap& tensor) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&tensor) : "memory");
}

// A box of a tensor of four axes, from the element at (x0, x1, x2, x3) on, innermost first. What lies
// outside of the tensor is zero. Its bytes count towards the barrier's.
__device__ inline void tensor_load(void* smem, const CUtensorMap& tensor, Mbarrier& full, int x0, int x1,
                                   int x2, int x3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5, %6}], [%2];" ::"r"(smem_address(smem)),
      "l"(&tensor), "r"(full.address()), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
      : "memory");
}

// Plain bytes, a multiple of 16 ("cp.async.bulk").
__device__ inline void bulk_load(void* smem, const void* gmem, unsigned bytes, Mbarrier& full) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          smem_address(smem)),
      "l"(gmem), "r"(bytes), "r"(full.address())
      : "memory");
}

// The tensor copy in the other direction; elements outside of the tensor are dropped.
__device__ inline void tensor_store(const CUtensorMap& tensor, const void* smem, int x0, int x1, int x2,
                                    int x3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
          &tensor),
      "r"(smem_address(smem)), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
      : "memory");
}
__device__ inline void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until this thread's stores have read shared memory.
__device__ inline void store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
// Until they are done.
__device__ inline void store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Four 8 x 8 matrices of 16-bit elements; lane l passes the address of row l % 8 of matrix l / 8
// ("stmatrix").
__device__ inline void stmatrix_x4(uint32_t smem, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(r0),
               "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

// Barrier `id` among `threads` threads ("barrier.cta"); 0 is that of __syncthreads.
__device__ inline void named_barrier(int id, int threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Arrives for those that wait, and does not wait itself.
__device__ inline void named_barrier_arrive(int id, int threads) {
  asm volatile("barrier.cta.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Waits as named_barrier does; whether any thread says so.
__device__ inline bool named_barrier_or(int id, int threads, bool says) {
  int any;
  asm volatile(
      "{.reg .pred p, q; setp.ne.b32 p, %3, 0; barrier.cta.red.or.pred q, %1, %2, p; "
      "selp.b32 %0, 1, 0, q;}"
      : "=r"(any)
      : "r"(id), "r"(threads), "r"(int(says))
      : "memory");
  return any;
}

// Registers of a thread, for all of a warpgroup ("setmaxnreg").
template <int kRegisters>
__device__ inline void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace jca::ptx
