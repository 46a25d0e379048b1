// y = x W^T for up to 16 rows of x, as fast as W can be read: numbers of 16, 8 or 4 bits, as packed.py lays them out.
//
// One warp of a program copies W into a ring in shared memory, by copies that a barrier counts. It does not wait for the
// previous kernel, which does not write W, so the ring is full when x is there. The other warps share a tile's inputs:
// each multiplies its part of every stage on the matrix units and the sums meet in shared memory.
//
// Which of a tile's numbers a thread multiplies is free, as long as it takes the same ones of x: so a thread takes 16
// neighbouring bytes of W, where the instruction's own order would have it take them from all over.

#include "hopper.cuh"
#include "numbers.cuh"

// Constants of a compilation, defined by streamed.py: FORMAT, INPUTS, GROUP and OFFSETS (of 4 bits), GATED, X_ROWS (most
// rows of x), X_IN_RING, WARPS, BLOCKS (of 16 rows of W in a tile), SEGMENT (bytes of a row in a stage), STAGES, RESIDENT.
constexpr int HALVES = GATED ? 2 : 1;
constexpr int TILE_OUTPUTS = 16 * BLOCKS / HALVES;
constexpr int ROW_BYTES = FORMAT == BF16 ? 2 * INPUTS : FORMAT == INT4 ? INPUTS / 2 : INPUTS;
constexpr int SEGMENTS = (ROW_BYTES + SEGMENT - 1) / SEGMENT;
constexpr int SEGMENT_INPUTS = FORMAT == BF16 ? SEGMENT / 2 : FORMAT == INT4 ? SEGMENT * 2 : SEGMENT;
constexpr int CHUNK = 64;  // bytes of each of 16 rows that a warp multiplies at a time: 16 to a thread, of two rows
constexpr int CHUNKS = ROW_BYTES / CHUNK;
constexpr int STAGE_CHUNKS = SEGMENT / CHUNK;
constexpr int WARP_CHUNKS = STAGE_CHUNKS / WARPS;
constexpr int X_TILES = (X_ROWS + 7) / 8;
constexpr int X_WORDS = FORMAT == BF16 ? 4 : FORMAT == INT4 ? 16 : 8;  // of a thread, for a chunk: two numbers each
constexpr int SUMS_STRIDE = 20;  // 16, and what keeps a warp's stores in different banks
constexpr int ELEMENTS = (TILE_OUTPUTS * X_ROWS + WARPS * 32 - 1) / (WARPS * 32);  // outputs that a thread finishes

// A stage: rows of W, then scales and offsets of its groups, then rows of x. Strides keep a warp's loads in different banks.
constexpr int W_STRIDE = SEGMENT + 64;
constexpr int SCALES_AT = 16 * BLOCKS * W_STRIDE;
constexpr int STAGE_GROUPS = FORMAT == INT4 ? 2 * SEGMENT / GROUP : 0;
constexpr int SCALE_BYTES = STAGE_GROUPS * BLOCKS * 32;
constexpr int X_AT = SCALES_AT + SCALE_BYTES * (1 + OFFSETS);
constexpr int X_STRIDE = SEGMENT_INPUTS * 2 + (FORMAT == BF16 ? 64 : 16);
constexpr int STAGE_BYTES = (X_AT + (X_IN_RING ? X_ROWS * X_STRIDE : 0) + 127) / 128 * 128;

__device__ __forceinline__ int input_of(int chunk) {
  if (FORMAT == BF16) return chunk * (CHUNK / 2);
  if (FORMAT == INT4) return chunk * CHUNK / GROUP * (2 * GROUP) + chunk * CHUNK % GROUP;
  return chunk * CHUNK;
}

// --- the kernel ------------------------------------------------------------------------------------------------------

struct Product {
  const u16* x;            // [num_rows, INPUTS]
  long long x_stride;      // numbers between rows, as all strides of x, residual and out
  const u8* weight;        // [num_outputs, INPUTS]; twice as many rows if GATED
  long long weight_stride; // bytes
  const void* scales;      // float [outputs] of 8 bits, bfloat16 [groups, outputs] of 4
  const u16* offsets;      // as the scales, read if OFFSETS: added to each number of a group, before its scale
  const u16* bias;         // or null
  const u16* residual;     // or null
  long long residual_stride;
  u16* out;
  long long out_stride;
  int num_rows;
  int num_outputs;         // of one half, if GATED
};

__device__ __forceinline__ void fill_ring(const Product& p, u8* ring, u64* full, u64* empty, int lane) {
  const u64 policy = read_once();
  const int num_tiles = p.num_outputs / TILE_OUTPUTS;
  auto segment_bytes = [](int s) { return SEGMENT * (s + 1) > ROW_BYTES ? ROW_BYTES - SEGMENT * s : SEGMENT; };
  auto x_bytes = [](int s) {
    return 2 * (SEGMENT_INPUTS * (s + 1) > INPUTS ? INPUTS - SEGMENT_INPUTS * s : SEGMENT_INPUTS);
  };
  auto copy_x = [&](int slot, int s) {
    if (lane < p.num_rows)
      copy(ring + slot * STAGE_BYTES + X_AT + lane * X_STRIDE, p.x + lane * p.x_stride + s * SEGMENT_INPUTS, x_bytes(s),
           &full[slot]);
  };
  int slot = 0, parity = 1, unreleased = 0;  // stages that lack x, until the previous kernel has ended
  bool released = !X_IN_RING;
  auto release = [&] {
    wait_for_previous_kernel();
    for (int i = 0; i < unreleased; ++i) copy_x(i, i % SEGMENTS);
    released = true;
  };
  for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
    const int row = GATED ? tile * 16 + (lane >> 4) * p.num_outputs + (lane & 15)
                          : tile * TILE_OUTPUTS + (lane & (16 * BLOCKS - 1));
    const u8* from = p.weight + row * p.weight_stride;
    for (int s = 0; s < SEGMENTS; ++s) {
      if (!released && unreleased == STAGES) release();
      wait(&empty[slot], parity);
      u8* to = ring + slot * STAGE_BYTES;
      const int bytes = segment_bytes(s), num_scales = FORMAT == INT4 ? 2 * bytes / GROUP * BLOCKS : 0;
      if (lane == 0)
        expect(&full[slot], 16 * BLOCKS * bytes + num_scales * 32 * (1 + OFFSETS) + (X_IN_RING ? p.num_rows * x_bytes(s) : 0));
      __syncwarp();
      if (lane < 16 * BLOCKS) copy_once(to + lane * W_STRIDE, from + s * SEGMENT, bytes, &full[slot], policy);
      for (int i = lane; i < num_scales; i += 32) {  // of 16 outputs at a time
        const int group = s * STAGE_GROUPS + i / BLOCKS, block = i % BLOCKS;
        const int output = GATED ? tile * 16 + block * p.num_outputs : tile * TILE_OUTPUTS + block * 16;
        const long long at = (long long)group * (p.num_outputs * HALVES) + output;
        copy_once(to + SCALES_AT + i * 32, (const u16*)p.scales + at, 32, &full[slot], policy);
        if (OFFSETS) copy_once(to + SCALES_AT + SCALE_BYTES + i * 32, p.offsets + at, 32, &full[slot], policy);
      }
      if (!released)
        ++unreleased;
      else if (X_IN_RING)
        copy_x(slot, s);
      if (++slot == STAGES) {
        slot = 0;
        parity ^= 1;
      }
    }
  }
  if (!released) release();
}

extern "C" __global__ void __launch_bounds__(WARPS * 32 + 32, RESIDENT) streamed_rows(const Product p, u32 magic) {
  let_next_kernel_start();
  u8* const ring = dynamic_shared;
  __shared__ u64 full[STAGES], empty[STAGES];
  __shared__ float sums[WARPS][BLOCKS][8 * X_TILES * SUMS_STRIDE];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int g = lane >> 2, t = lane & 3;  // a thread's rows of W are g and g + 8, its row of x is g
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      init(&full[i], 1);
      init(&empty[i], WARPS);
    }
    publish_barriers();
  }
  __syncthreads();
  if (warp == WARPS) {
    fill_ring(p, ring, full, empty, lane);
    return;
  }
  wait_for_previous_kernel();

  u32 xs[X_TILES][X_WORDS];
  auto read_x = [&](u32(&to)[X_TILES][X_WORDS], const u8* from, long long stride) {
#pragma unroll
    for (int n = 0; n < X_TILES; ++n)
#pragma unroll
      for (int i = 0; i < X_WORDS / 4; ++i) {
        const u8* at = from + n * 8 * stride + (FORMAT == INT4 ? (i & 1) * 16 + (i >> 1) * GROUP * 2 : i * 16);
        const uint4 v = g + 8 * n < p.num_rows ? *(const uint4*)at : make_uint4(0, 0, 0, 0);
        to[n][4 * i] = v.x, to[n][4 * i + 1] = v.y, to[n][4 * i + 2] = v.z, to[n][4 * i + 3] = v.w;
      }
  };
  const u8* x_thread = (const u8*)(p.x + g * p.x_stride) + (FORMAT == BF16 ? 16 : 32) * t;
  auto fetch_x = [&](u32(&to)[X_TILES][X_WORDS], int chunk) {
    read_x(to, x_thread + 2 * input_of(min(chunk, CHUNKS - 1)), 2 * p.x_stride);
  };
  if (!X_IN_RING) fetch_x(xs, warp * WARP_CHUNKS);

  int slot = 0, parity = 0;
  for (int tile = blockIdx.x; tile < p.num_outputs / TILE_OUTPUTS; tile += gridDim.x) {
    // Asked for now, used when the sums are there.
    float scale[ELEMENTS], up_scale[ELEMENTS], bias[ELEMENTS], up_bias[ELEMENTS], residual[ELEMENTS];
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
      const int i = threadIdx.x + e * WARPS * 32, row = i / TILE_OUTPUTS, output = tile * TILE_OUTPUTS + i % TILE_OUTPUTS;
      scale[e] = up_scale[e] = 1.f, bias[e] = up_bias[e] = residual[e] = 0.f;
      if (row >= p.num_rows) continue;
      if (FORMAT == INT8 || FORMAT == FLOAT8) {
        scale[e] = ((const float*)p.scales)[output];
        if (GATED) up_scale[e] = ((const float*)p.scales)[p.num_outputs + output];
      }
      if (p.bias) {
        bias[e] = wide(p.bias[output]);
        if (GATED) up_bias[e] = wide(p.bias[p.num_outputs + output]);
      }
      if (p.residual) residual[e] = wide(p.residual[row * p.residual_stride + output]);
    }

    float y[BLOCKS][X_TILES][4] = {};
#pragma unroll 1
    for (int s = 0; s < SEGMENTS; ++s) {
      const int first = s * STAGE_CHUNKS + warp * WARP_CHUNKS;
      wait(&full[slot], parity);
      const u8* stage = ring + slot * STAGE_BYTES;
      const u8* w_thread = stage + g * W_STRIDE + warp * (WARP_CHUNKS * CHUNK) + t * 16;
      // Of 4 bits: unscaled sums of two groups, from the low and the high halves of the bytes, and the sums of their x.
      float low[BLOCKS][X_TILES][4] = {}, high[BLOCKS][X_TILES][4] = {};
      float low_x[X_TILES][4] = {}, high_x[X_TILES][4] = {};
#pragma unroll
      for (int c = 0; c < WARP_CHUNKS; ++c) {
        u32 next_xs[X_TILES][X_WORDS];
        if (X_IN_RING)
          read_x(xs, stage + X_AT + g * X_STRIDE + (FORMAT == BF16 ? 16 : 32) * t + 2 * input_of(warp * WARP_CHUNKS + c),
                 X_STRIDE);
        else
          fetch_x(next_xs, c + 1 < WARP_CHUNKS ? first + c + 1 : s + 1 < SEGMENTS ? first + STAGE_CHUNKS : warp * WARP_CHUNKS);
        if (CHUNKS % STAGE_CHUNKS == 0 || first + c < CHUNKS) {
#pragma unroll
          for (int b = 0; b < BLOCKS; ++b) {
            const uint4 w = *(const uint4*)(w_thread + b * 16 * W_STRIDE + c * CHUNK);
            const uint4 w_8 = *(const uint4*)(w_thread + (b * 16 + 8) * W_STRIDE + c * CHUNK);
#pragma unroll
            for (int j = 0; j < (FORMAT == BF16 ? 2 : 4); ++j) {
              if (FORMAT == BF16) {
#pragma unroll
                for (int n = 0; n < X_TILES; ++n)
                  multiply(y[b][n], word(w, 2 * j), word(w_8, 2 * j), word(w, 2 * j + 1), word(w_8, 2 * j + 1), xs[n][2 * j],
                           xs[n][2 * j + 1]);
              } else if (FORMAT == INT4) {
                const u32 a = __byte_perm(word(w, j), 0, 0x4140), b_ = __byte_perm(word(w, j), 0, 0x4342);
                const u32 a_8 = __byte_perm(word(w_8, j), 0, 0x4140), b_8 = __byte_perm(word(w_8, j), 0, 0x4342);
#pragma unroll
                for (int n = 0; n < X_TILES; ++n) {
                  multiply(low[b][n], int4_pair(a, magic), int4_pair(a_8, magic), int4_pair(b_, magic), int4_pair(b_8, magic),
                           xs[n][2 * j], xs[n][2 * j + 1]);
                  multiply(high[b][n], int4_pair(a >> 4, magic), int4_pair(a_8 >> 4, magic), int4_pair(b_ >> 4, magic),
                           int4_pair(b_8 >> 4, magic), xs[n][X_WORDS / 2 + 2 * j], xs[n][X_WORDS / 2 + 2 * j + 1]);
                }
              } else {
                u32 a0, a1, a2, a3;
                widen(word(w, j), magic, a0, a2);
                widen(word(w_8, j), magic, a1, a3);
#pragma unroll
                for (int n = 0; n < X_TILES; ++n) multiply(y[b][n], a0, a1, a2, a3, xs[n][2 * j], xs[n][2 * j + 1]);
              }
            }
          }
          if (OFFSETS) {
            const u32 ones = 0x3f803f80u;
#pragma unroll
            for (int j = 0; j < X_WORDS / 4; ++j)
#pragma unroll
              for (int n = 0; n < X_TILES; ++n) {
                multiply(low_x[n], ones, ones, ones, ones, xs[n][2 * j], xs[n][2 * j + 1]);
                multiply(high_x[n], ones, ones, ones, ones, xs[n][X_WORDS / 2 + 2 * j], xs[n][X_WORDS / 2 + 2 * j + 1]);
              }
          }
          if (FORMAT == INT4 && (c + 1) * CHUNK % GROUP == 0) {
            const u8* groups = stage + SCALES_AT + (warp * WARP_CHUNKS + c) * CHUNK / GROUP * (2 * BLOCKS * 32) + g * 2;
#pragma unroll
            for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
              for (int h = 0; h < 2; ++h) {  // rows g and g + 8
                const u8* of_low = groups + b * 32 + h * 16;
                const u8* of_high = of_low + BLOCKS * 32;
                const float low_scale = wide(*(const u16*)of_low), high_scale = wide(*(const u16*)of_high);
                const float low_offset = OFFSETS ? wide(*(const u16*)(of_low + SCALE_BYTES)) : 0.f;
                const float high_offset = OFFSETS ? wide(*(const u16*)(of_high + SCALE_BYTES)) : 0.f;
#pragma unroll
                for (int n = 0; n < X_TILES; ++n)
#pragma unroll
                  for (int i = 2 * h; i < 2 * h + 2; ++i) {
                    const float l = OFFSETS ? low[b][n][i] + low_offset * low_x[n][i] : low[b][n][i];
                    const float u = OFFSETS ? high[b][n][i] + high_offset * high_x[n][i] : high[b][n][i];
                    y[b][n][i] += low_scale * l + high_scale * u;
                    low[b][n][i] = high[b][n][i] = 0.f;
                  }
              }
#pragma unroll
            for (int n = 0; n < X_TILES; ++n)
#pragma unroll
              for (int i = 0; i < 4; ++i) low_x[n][i] = high_x[n][i] = 0.f;
          }
        }
        if (!X_IN_RING) {
#pragma unroll
          for (int n = 0; n < X_TILES; ++n)
#pragma unroll
            for (int i = 0; i < X_WORDS; ++i) xs[n][i] = next_xs[n][i];
        }
      }
      __syncwarp();
      if (lane == 0) arrive(&empty[slot]);
      if (++slot == STAGES) {
        slot = 0;
        parity ^= 1;
      }
    }

    meet(WARPS * 32);  // the tile before has been read
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
      for (int n = 0; n < X_TILES; ++n) {
        float* to = sums[warp][b] + (8 * n + 2 * t) * SUMS_STRIDE + g;
        to[0] = y[b][n][0], to[SUMS_STRIDE] = y[b][n][1], to[8] = y[b][n][2], to[SUMS_STRIDE + 8] = y[b][n][3];
      }
    meet(WARPS * 32);
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
      const int i = threadIdx.x + e * WARPS * 32, row = i / TILE_OUTPUTS, output = i % TILE_OUTPUTS;
      if (row >= p.num_rows) continue;
      float sum = 0.f, up = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) {
        sum += sums[w][output / 16][row * SUMS_STRIDE + output % 16];
        if (GATED) up += sums[w][BLOCKS - 1][row * SUMS_STRIDE + output % 16];
      }
      sum = sum * scale[e] + bias[e];
      if (GATED) sum = sum / (1.f + __expf(-sum)) * (up * up_scale[e] + up_bias[e]);
      p.out[row * p.out_stride + tile * TILE_OUTPUTS + output] = narrow(sum + residual[e]);
    }
  }
}
