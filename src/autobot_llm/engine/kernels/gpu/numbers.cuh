// Numbers of 8 and 4 bits as bfloat16, two at a time. Needs FORMAT, one of these.

#pragma once

#include "hopper.cuh"

#define BF16 0
#define INT8 1
#define FLOAT8 2
#define INT4 3

__device__ __forceinline__ float wide(u16 v) { return __uint_as_float((u32)v << 16); }

__device__ __forceinline__ u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Two int8 in the low bytes of a word's halves. The fraction of 128.0 has 7 bits: with the low bits of a number in it it is
// 128 more than they say; 128.0 with the number's sign in the last bit of the exponent is 128 or 256. The difference is it.
__device__ __forceinline__ u32 int8_pair(u32 a, u32 magic) {
  return multiply_add(merge<0x00800080u>(a, magic), 0xbf80bf80u, merge<0x007f007fu>(a, magic));
}

// Two float8 (e4m3) in the high bytes: exponent and fraction moved to where bfloat16 has them, then 2^120 for the bias.
__device__ __forceinline__ u32 float8_pair(u32 a) {
  return multiply_add(merge<0x07f007f0u>(a >> 4, a & 0x80008000u), 0x7b807b80u, 0x80008000u);
}

// The four numbers in the high halves of bytes, less 8, as int8 and INT4_UNIT times as large. `magic` is 8 in each of them.
constexpr u32 INT4_UNIT = 16;
__device__ __forceinline__ u32 int4_bytes(u32 a, u32 magic) { return flip<0xf0f0f0f0u>(a, magic); }
