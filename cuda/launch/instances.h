// The launch table: every compiled kernel instance of the attention products.
#pragma once

#include <cstddef>
#include <span>

namespace jca {

// kDq and kDbias: what the backward takes beside itself to be deterministic.
enum class Direction { kForward, kBackward, kDecode, kDq, kDbias };

// Element type of q, k, v, and how products are taken. kFloat16Bfloat16: bfloat16 inputs, unit rows in
// float16.
enum class Arithmetic { kFloat16, kBfloat16, kFloat16Bfloat16, kTf32, kThreeTf32 };

inline constexpr int kHeadDims[] = {32, 64, 96, 128, 192, 256};

struct Instance {
  Direction direction;
  Arithmetic arithmetic;
  bool unbounded;  // takes biases; forward: keeps a running maximum
  int head_dim;  // the largest H it takes
  const void* kernel;
  int threads;
  int smem_bytes;
  int block_m, block_n;
};

const char* name(Direction direction);
const char* name(Arithmetic arithmetic);

// All of them; those of one direction in the order unbounded, arithmetic, head_dim, block_m.
std::span<const Instance> instances();

// The smallest instance that holds head_dim and, of decode, all packed rows; null when there is none.
const Instance* find_instance(Direction direction, Arithmetic arithmetic, bool unbounded,
                              int head_dim, int packed_rows);

}  // namespace jca
