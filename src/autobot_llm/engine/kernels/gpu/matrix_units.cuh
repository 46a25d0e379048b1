// Hopper's matrix units: wgmma as streamed_blocks.cu uses it. Needs FORMAT, ROUNDED and ROWS, of x.

#pragma once

#include "numbers.cuh"

#if ROUNDED && FORMAT == INT8
typedef int Sum;
#else
typedef float Sum;
#endif
constexpr int SUMS = ROWS / 2;  // of a thread: 64 rows of W times ROWS over 128 threads

// 64 rows of W are multiplied with ROWS rows of x, 32 bytes of each row of x at a time, and added up; begun, and not ended. Of
// W this thread's numbers in `w`, or the matrices of both in shared memory. The first ones of new sums add to nothing.
__device__ void multiply_block(Sum (&sums)[SUMS], const u32 (&w)[4], u64 x);
__device__ void multiply_first(Sum (&sums)[SUMS], const u32 (&w)[4], u64 x);
__device__ void multiply_block(Sum (&sums)[SUMS], u64 w, u64 x);
__device__ void begin_products(Sum (&sums)[SUMS]);
__device__ void commit_products(Sum (&sums)[SUMS]);  // those begun so far are one group
__device__ void end_products(Sum (&sums)[SUMS]);
__device__ void end_older_products(Sum (&sums)[SUMS]);  // of all groups but the last one

#ifndef INSTRUCTIONS
#if ROUNDED && FORMAT == INT8
#define KEPT(i) "+r"(sums[i])
#define OPERATION(shape) shape "k32.s32.s8.s8 "
#define SIGNS ";"
#elif ROUNDED
#define KEPT(i) "+f"(sums[i])
#define OPERATION(shape) shape "k32.f32.e4m3.e4m3 "
#define SIGNS ", 1, 1;"
#else
#define KEPT(i) "+f"(sums[i])
#define OPERATION(shape) shape "k16.f32.bf16.bf16 "
#define SIGNS ", 1, 1, 0;"
#endif
#define KEPT_4(i) KEPT(i), KEPT(i + 1), KEPT(i + 2), KEPT(i + 3)
#define KEPT_16(i) KEPT_4(i), KEPT_4(i + 4), KEPT_4(i + 8), KEPT_4(i + 12)
#define NAMES_16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define NAMES_32 NAMES_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES_64 \
  NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47" \
           ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#if ROWS == 16
#define ALL_KEPT KEPT_4(0), KEPT_4(4)
#define INTO_SUMS OPERATION("m64n16") "{%0,%1,%2,%3,%4,%5,%6,%7}, "
#define FROM_REGISTERS "{%8,%9,%10,%11}, %12, "
#define FROM_MEMORY "%8, %9, "
#elif ROWS == 32
#define ALL_KEPT KEPT_16(0)
#define INTO_SUMS OPERATION("m64n32") "{" NAMES_16 "}, "
#define FROM_REGISTERS "{%16,%17,%18,%19}, %20, "
#define FROM_MEMORY "%16, %17, "
#elif ROWS == 64
#define ALL_KEPT KEPT_16(0), KEPT_16(16)
#define INTO_SUMS OPERATION("m64n64") "{" NAMES_32 "}, "
#define FROM_REGISTERS "{%32,%33,%34,%35}, %36, "
#define FROM_MEMORY "%32, %33, "
#else
#define ALL_KEPT KEPT_16(0), KEPT_16(16), KEPT_16(32), KEPT_16(48)
#define INTO_SUMS OPERATION("m64n128") "{" NAMES_64 "}, "
#define FROM_REGISTERS "{%64,%65,%66,%67}, %68, "
#define FROM_MEMORY "%64, %65, "
#endif

#if ROUNDED
__device__ __forceinline__ void multiply_block(Sum (&sums)[SUMS], u64 w, u64 x) {
  asm volatile("wgmma.mma_async.sync.aligned." INTO_SUMS FROM_MEMORY "1" SIGNS : ALL_KEPT : "l"(w), "l"(x));
}
#else
#define MULTIPLY_REGISTERS(added)                                                   \
  asm volatile("wgmma.mma_async.sync.aligned." INTO_SUMS FROM_REGISTERS added SIGNS \
               : ALL_KEPT                                                           \
               : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "l"(x))
__device__ __forceinline__ void multiply_block(Sum (&sums)[SUMS], const u32 (&w)[4], u64 x) { MULTIPLY_REGISTERS("1"); }
__device__ __forceinline__ void multiply_first(Sum (&sums)[SUMS], const u32 (&w)[4], u64 x) { MULTIPLY_REGISTERS("0"); }
#endif

__device__ __forceinline__ void begin_products(Sum (&sums)[SUMS]) {
  asm volatile("wgmma.fence.sync.aligned;" : ALL_KEPT : : "memory");
}

__device__ __forceinline__ void commit_products(Sum (&sums)[SUMS]) {
  asm volatile("wgmma.commit_group.sync.aligned;" : ALL_KEPT : : "memory");
}

__device__ __forceinline__ void end_products(Sum (&sums)[SUMS]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" : ALL_KEPT : : "memory");
}

__device__ __forceinline__ void end_older_products(Sum (&sums)[SUMS]) {
  asm volatile("wgmma.wait_group.sync.aligned 1;" : ALL_KEPT : : "memory");
}
#endif

// Rows of 128 bytes in shared memory, as the matrix units are told of them: where, how far blocks of 8 lie apart, and that
// pieces of 16 bytes have changed places as copies have it.
__device__ __forceinline__ u64 rows_at(const u8* start) {
  return (u64)(shared_address(start) >> 4 & 0x3fff) | (u64)(16 >> 4) << 16 | (u64)(8 * 128 >> 4) << 32 | (u64)1 << 62;
}
