// The launch table: every compiled kernel instance of the attention products.
#pragma once

#include <cstdint>
#include <span>

namespace jca {

// kDq and kDbias: what the backward takes beside itself to be deterministic.
enum class Direction { kForward, kBackward, kDecode, kDq, kDbias };

// Element type of q, k, v, and how products are taken. kFloat16Bfloat16: bfloat16 inputs, unit rows in
// float16.
enum class Arithmetic { kFloat16, kBfloat16, kFloat16Bfloat16, kTf32, kThreeTf32 };

// The oldest GPUs that run it: all from compute capability 8.0 on, or 9.0 alone.
enum class Family { kSm80, kSm90 };

inline constexpr int kMaxHeadDim = 256;

inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

struct Instance {
  Direction direction;
  Arithmetic arithmetic;
  Family family;
  bool unbounded;  // takes biases; forward: keeps a running maximum
  bool small;      // for GPUs with 99 KB of shared memory
  int head_dim;    // the largest H it takes
  const void* kernel;
  int threads;
  int smem_bytes;
  int block_m, block_n;
  const void* kernel_of_sums = nullptr;  // where another takes backward calls that want dscale
  bool raw = false;   // forward on Hopper: takes k as it comes, with one norm a row
  bool makes_keys = false;  // forward on Hopper: can make k^ of it
  int stages = 0;     // on Hopper, of the rings of k and v, or of q^ and dO
  int key_stages = 0;  // of that of k and v in the backward
  int candidate = 0;  // the shipped one; in a build for tuning others follow it, numbered from 1
};

const char* name(Direction direction);
const char* name(Arithmetic arithmetic);
const char* name(Family family);

// All of them; those of one direction in the order family (the newest first), unbounded, arithmetic, small,
// raw ones first, head_dim, block_m; candidates follow the shipped one.
std::span<const Instance> instances();

// The smallest instance that holds head_dim and, of decode, all packed rows, and that the current device
// runs and has shared memory for, of kSm90 where there is one; null when there is none. Small ones are
// unbounded: they take any call.
const Instance* find_instance(Direction direction, Arithmetic arithmetic, bool unbounded,
                              int head_dim, int packed_rows = 0, bool raw = false);

// For tests: finds instances as on a GPU that grants a CTA this many bytes; 0: as the device says.
void limit_shared_memory(int bytes);

// For benchmarks/tune.py: finds this candidate where there is one that fits; 0: the shipped instances.
void select_candidate(int number);

}  // namespace jca
