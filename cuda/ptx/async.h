// Asynchronous copies and reductions. PTX ISA, "cp.async", "red", "ex2".
#pragma once

#include <cstdint>

namespace jca::ptx {

// A 32-bit shared-window address, as ldmatrix and cp.async take it.
__device__ inline uint32_t smem_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes global -> shared, past L1; the destination is zero-filled when !valid, and gmem is then
// not read ("cp.async", src-size 0).
__device__ inline void cp_async_16(uint32_t smem, const void* gmem, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(gmem), "r"(bytes)
               : "memory");
}

__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's latest groups are in flight.
template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Whoever acquires the sum sees what this thread saw before ("red", .release).
__device__ inline void red_add_release(int* gmem, int x) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(gmem), "r"(x) : "memory");
}
__device__ inline int load_acquire(const int* gmem) {
  int x;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(gmem) : "memory");
  return x;
}

// Two adjacent reductions in L2; of float32 one instruction from sm_90 on ("red", .v2).
__device__ inline void red_add_x2(float* gmem, float x, float y) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(gmem), "f"(x), "f"(y) : "memory");
#else
  atomicAdd(gmem, x);
  atomicAdd(gmem + 1, y);
#endif
}
__device__ inline void red_add_x2(double* gmem, double x, double y) {
  atomicAdd(gmem, x);
  atomicAdd(gmem + 1, y);
}

// Four of float32, 16 aligned bytes (sm_90).
__device__ inline void red_add_x4(float* gmem, const float (&x)[4]) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(gmem), "f"(x[0]), "f"(x[1]), "f"(x[2]),
               "f"(x[3])
               : "memory");
}

// 2^x, relative error 2^-22, 2^-inf = 0 ("ex2.approx.ftz").
__device__ inline float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace jca::ptx
