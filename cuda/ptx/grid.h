// Programmatic dependent launch. PTX ISA, "Parallel Synchronization and Communication Instructions:
// griddepcontrol". Without it, before sm_90, kernels of a stream run one after the other anyhow.
#pragma once

namespace jca::ptx {

// Once all CTAs of this grid have said so or are done, the next kernel may start, if it was launched to
// ("griddepcontrol.launch_dependents").
__device__ inline void launch_dependent_grids() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Waits until the grids before are done and what they wrote is visible ("griddepcontrol.wait").
__device__ inline void wait_for_prerequisite_grids() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace jca::ptx
