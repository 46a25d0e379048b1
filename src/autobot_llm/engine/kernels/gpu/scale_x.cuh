// Rows of x, scaled by the programs of streamed_rows.cu that multiply them. Needs its constants and `Product`.

#pragma once

// What scaled_rows.py does to rows, by the warps that multiply: one kernel less to wait for. A thread has 16 neighbouring
// inputs of every so many, eight threads a group.
__device__ __forceinline__ void scale_x(const Product& p, u8* ring, float* sums, int warp, int lane) {
#if SCALES_X
  constexpr int THREADS = WARPS * 32, SPAN = 16, MOST = (INPUTS + THREADS * SPAN - 1) / (THREADS * SPAN);
  uint4 weight[MOST][2], x[X_ROWS][MOST][2];
  auto load = [&](uint4(&to)[MOST][2], const u8* from, bool exists) {
#pragma unroll
    for (int i = 0; i < MOST; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int input = (i * THREADS + warp * 32 + lane) * SPAN + 8 * j;
        to[i][j] = exists && input < INPUTS ? *(const uint4*)(from + input * 2) : make_uint4(0, 0, 0, 0);
      }
  };
  if (NORM) load(weight, (const u8*)p.norm, true);
  wait_for_previous_kernel();
#pragma unroll
  for (int r = 0; r < X_ROWS; ++r) load(x[r], p.x + r * p.x_stride, r < p.num_rows);
  auto number = [&](const uint4(&of)[2], int i) {
    const u32 pair = word(of[i / 8], i % 8 / 2);
    return __uint_as_float(i % 2 ? pair & 0xffff0000u : pair << 16);
  };
  if (NORM) {
#pragma unroll
    for (int r = 0; r < X_ROWS; ++r) {
      float squares = 0.f, largest = 0.f;
#pragma unroll
      for (int i = 0; i < MOST; ++i)
#pragma unroll
        for (int j = 0; j < SPAN; ++j) {
          squares += number(x[r][i], j) * number(x[r][i], j);
          if (ROWS_SHARE_SCALES) largest = larger(largest, fabsf(number(x[r][i], j) * number(weight[i], j)));
        }
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        squares += other_lane(squares, distance);
        if (ROWS_SHARE_SCALES) largest = larger(largest, other_lane(largest, distance));
      }
      if (lane == 0) sums[r * WARPS + warp] = squares;
      if (lane == 0 && ROWS_SHARE_SCALES) sums[(X_ROWS + r) * WARPS + warp] = largest;
    }
    meet(THREADS);
  }
#pragma unroll
  for (int r = 0; r < X_ROWS; ++r) {
    if (r >= p.num_rows) break;
    float factor = 0.f, of_row = 0.f;
    if (NORM) {
#pragma unroll
      for (int w = 0; w < WARPS; ++w) {
        factor += sums[r * WARPS + w];
        if (ROWS_SHARE_SCALES) of_row = larger(of_row, sums[(X_ROWS + r) * WARPS + w]);
      }
      factor = rsqrtf(factor / INPUTS + p.eps);
      of_row *= factor;
    }
    u8* const columns = ring + X_AT + r * PLANES * X_STRIDE;
#pragma unroll
    for (int i = 0; i < MOST; ++i) {
      float v[SPAN], largest = 0.f;
#pragma unroll
      for (int j = 0; j < SPAN; ++j) {
        v[j] = NORM ? number(x[r][i], j) * factor * number(weight[i], j) : number(x[r][i], j);
        if (!ROWS_SHARE_SCALES) largest = larger(largest, fabsf(v[j]));
      }
      if (ROWS_SHARE_SCALES) largest = of_row;
#pragma unroll
      for (int distance = 1; distance < X_GROUP / SPAN && !ROWS_SHARE_SCALES; distance *= 2)
        largest = larger(largest, other_lane(largest, distance));
      const int input = (i * THREADS + warp * 32 + lane) * SPAN;
      if (input >= INPUTS) continue;
      const float inverse = LARGEST_OF_X / fmaxf(largest, 1e-30f);  // NaN times a scale that is none stays that
      u32 words[8];  // high bytes, then low ones; or float16
#pragma unroll
      for (int k = 0; k < SPAN; k += 4) {
        if (IS_INTEGER) {
          u32 whole[4], high[4];  // in the low 16 bits of a float's fraction
#pragma unroll
          for (int j = 0; j < 4; ++j) whole[j] = __float_as_uint(v[k + j] * inverse + 12582912.f), high[j] = whole[j] + 128;
          words[k / 4] = __byte_perm(__byte_perm(high[0], high[1], 0x51), __byte_perm(high[2], high[3], 0x51), 0x5410);
          words[4 + k / 4] = __byte_perm(__byte_perm(whole[0], whole[1], 0x40), __byte_perm(whole[2], whole[3], 0x40), 0x5410);
        } else {
          words[k / 2] = halves(v[k] * inverse, v[k + 1] * inverse);
          words[k / 2 + 1] = halves(v[k + 2] * inverse, v[k + 3] * inverse);
        }
      }
      u8* const to = columns + input * X_SIZE;
      *(uint4*)to = make_uint4(words[0], words[1], words[2], words[3]);
      *(uint4*)(to + (IS_INTEGER ? X_STRIDE : 16)) = make_uint4(words[4], words[5], words[6], words[7]);
      constexpr float unit = (FORMAT == INT4 ? 1.f / INT4_UNIT : 1.f) / LARGEST_OF_X;
      if (input % X_GROUP == 0) ((float*)(ring + X_SCALES_AT))[r * X_SCALES + input / X_GROUP] = largest * unit;
    }
  }
  meet(THREADS);
#endif
}
