// Warpgroup-level matrix multiply-accumulate (sm_90a). PTX ISA, "Asynchronous Warpgroup Level Matrix
// Multiply-Accumulate Instructions".
//
// Accumulators are [64, 8 kBlocks] float32: block n of warp w holds rows 16 w ... 16 w + 15, laid out as
// those of mma.m16n8 (section "Register Fragments for wgmma.mma_async.m64nNk16").
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace jca::ptx {

// Orders this warpgroup's register accesses before the products that follow.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most kPending groups are in flight.
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// A matrix of 16-bit elements in shared memory with the 128-byte swizzle, in bytes: `group` between groups
// of 8 rows, `chunk` between chunks of 64 columns, used where the columns are the product's outer axis
// (section "Matrix-Descriptor Format"). Offsets are added in units of 16 bytes.
__device__ inline uint64_t matrix_descriptor(uint32_t smem, int group, int chunk) {
  return uint64_t{1} << 62 | uint64_t(group / 16) << 32 | uint64_t(chunk / 16) << 16 |
         (smem & 0x3ffff) / 16;
}

#define JCA_BLOCK(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define JCA_BLOCKS_4(n) JCA_BLOCK(n), JCA_BLOCK(n + 1), JCA_BLOCK(n + 2), JCA_BLOCK(n + 3)
#define JCA_BLOCKS_8 JCA_BLOCKS_4(0), JCA_BLOCKS_4(4)
#define JCA_BLOCKS_12 JCA_BLOCKS_8, JCA_BLOCKS_4(8)
#define JCA_BLOCKS_16 JCA_BLOCKS_12, JCA_BLOCKS_4(12)
#define JCA_BLOCKS_32 \
  JCA_BLOCKS_16, JCA_BLOCKS_4(16), JCA_BLOCKS_4(20), JCA_BLOCKS_4(24), JCA_BLOCKS_4(28)
#define JCA_TEXT_8                                                                                \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25," \
  "%26,%27,%28,%29,%30,%31"
#define JCA_TEXT_12 JCA_TEXT_8 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define JCA_TEXT_16 JCA_TEXT_12 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define JCA_TEXT_32                                                                                   \
  JCA_TEXT_16 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84," \
              "%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104," \
              "%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121," \
              "%122,%123,%124,%125,%126,%127"
#define JCA_SHAPE(columns, type) "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " "

// d (+)= a b^T for a [64, 16] and b [8 kBlocks, 16], both with k innermost or, kOuter, both with k outermost.
// A ... D: numbers of the operands after d.
#define JCA_PRODUCT(type, columns, text, blocks, A, B, C, D)                                            \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" #C ", 0; " JCA_SHAPE(columns, type) "{" text "}, %" #A \
               ", %" #B ", p, 1, 1, %" #D ", %" #D ";}"                                                 \
               : blocks                                                                                 \
               : "l"(a), "l"(b), "n"(int(kAccumulate)), "n"(int(kOuter)))

template <class T, bool kAccumulate, bool kOuter = false, int kBlocks>
__device__ inline void wgmma(float (&d)[kBlocks][4], uint64_t a, uint64_t b) {
  static_assert(kBlocks == 8 || kBlocks == 16);
  if constexpr (std::is_same_v<T, __half>) {
    if constexpr (kBlocks == 8) JCA_PRODUCT("f16", 64, JCA_TEXT_8, JCA_BLOCKS_8, 32, 33, 34, 35);
    if constexpr (kBlocks == 16) JCA_PRODUCT("f16", 128, JCA_TEXT_16, JCA_BLOCKS_16, 64, 65, 66, 67);
  } else {
    if constexpr (kBlocks == 8) JCA_PRODUCT("bf16", 64, JCA_TEXT_8, JCA_BLOCKS_8, 32, 33, 34, 35);
    if constexpr (kBlocks == 16) JCA_PRODUCT("bf16", 128, JCA_TEXT_16, JCA_BLOCKS_16, 64, 65, 66, 67);
  }
}

// d += a b for a [64, 16] in registers, the fragment that two neighbouring blocks of accumulators make, and
// b [16, 8 kBlocks] with the columns innermost.
#define JCA_PRODUCT_OF_REGISTERS(type, columns, text, blocks, A0, A1, A2, A3, B)                        \
  asm volatile("{.reg .pred p; setp.eq.b32 p, 0, 0; " JCA_SHAPE(columns, type) "{" text "}, {%" #A0 ",%" \
               #A1 ",%" #A2 ",%" #A3 "}, %" #B ", p, 1, 1, 1;}"                                         \
               : blocks                                                                                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define JCA_PRODUCTS_OF_REGISTERS(type)                                                             \
  if constexpr (kBlocks == 8)                                                                       \
    JCA_PRODUCT_OF_REGISTERS(type, 64, JCA_TEXT_8, JCA_BLOCKS_8, 32, 33, 34, 35, 36);               \
  if constexpr (kBlocks == 12)                                                                      \
    JCA_PRODUCT_OF_REGISTERS(type, 96, JCA_TEXT_12, JCA_BLOCKS_12, 48, 49, 50, 51, 52);             \
  if constexpr (kBlocks == 16)                                                                      \
    JCA_PRODUCT_OF_REGISTERS(type, 128, JCA_TEXT_16, JCA_BLOCKS_16, 64, 65, 66, 67, 68);            \
  if constexpr (kBlocks == 32)                                                                      \
    JCA_PRODUCT_OF_REGISTERS(type, 256, JCA_TEXT_32, JCA_BLOCKS_32, 128, 129, 130, 131, 132)

template <class T, int kBlocks>
__device__ inline void wgmma_add(float (&d)[kBlocks][4], const uint32_t (&a)[4], uint64_t b) {
  static_assert(kBlocks == 8 || kBlocks == 12 || kBlocks == 16 || kBlocks == 32);
  if constexpr (std::is_same_v<T, __half>) {
    JCA_PRODUCTS_OF_REGISTERS("f16");
  } else {
    JCA_PRODUCTS_OF_REGISTERS("bf16");
  }
}

#undef JCA_PRODUCTS_OF_REGISTERS
#undef JCA_PRODUCT_OF_REGISTERS
#undef JCA_PRODUCT
#undef JCA_SHAPE
#undef JCA_TEXT_32
#undef JCA_TEXT_16
#undef JCA_TEXT_12
#undef JCA_TEXT_8
#undef JCA_BLOCKS_32
#undef JCA_BLOCKS_16
#undef JCA_BLOCKS_12
#undef JCA_BLOCKS_8
#undef JCA_BLOCKS_4
#undef JCA_BLOCK

}  // namespace jca::ptx
