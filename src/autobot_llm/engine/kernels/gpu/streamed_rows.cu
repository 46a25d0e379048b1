// y = x W^T for up to 8 rows of x, as fast as W can be read: numbers of 16, 8 or 4 bits, as packed.py lays them out.
//
// One warp of a program copies W into a ring in shared memory, by copies that a barrier counts. It does not wait for the
// previous kernel, which does not write W, so the ring is full when x is there; where x has room beside the ring, it is
// copied once for all tiles. The other warps share a tile's inputs: each multiplies its part of every stage on the matrix
// units and the sums meet in shared memory.
//
// Which of a tile's numbers a thread multiplies is free, as long as it takes the same ones of x: so a thread takes 16
// neighbouring bytes of W, where the instruction's own order would have it take them from all over.
//
// Turning W into bfloat16 would take longer than reading it. So whole numbers are multiplied as int8, and x is what
// changes, once: to 16 bits of fixed point, a high and a low byte, each a column of its own, by scaled_rows.py or scale_x.cuh.
// There is an instruction from float8 to float16, and x is scaled to fit that.

#include "hopper.cuh"
#include "numbers.cuh"

// Constants of a compilation, defined by streamed.py: FORMAT, INPUTS, GROUP and OFFSETS (of 4 bits), GATED, X_ROWS (most
// rows of x: 1 or 8), X_STAYS (in shared memory; otherwise it comes from the cache), SCALES_X (is told of bfloat16, if x
// stays), NORM (before that), WARPS, BLOCKS (of 16 rows of W in a tile), SEGMENT (bytes of a row in a stage), STAGES,
// RESIDENT.
constexpr int HALVES = GATED ? 2 : 1;
constexpr int TILE_OUTPUTS = 16 * BLOCKS / HALVES;
constexpr int ROW_BYTES = FORMAT == BF16 ? 2 * INPUTS : FORMAT == INT4 ? INPUTS / 2 : INPUTS;
constexpr int SEGMENTS = (ROW_BYTES + SEGMENT - 1) / SEGMENT;
constexpr int SEGMENT_INPUTS = FORMAT == BF16 ? SEGMENT / 2 : FORMAT == INT4 ? SEGMENT * 2 : SEGMENT;
constexpr int CHUNK = 64;  // bytes of each of 16 rows that a warp multiplies at a time: 16 to a thread, of two rows
constexpr int CHUNKS = ROW_BYTES / CHUNK;
constexpr int STAGE_CHUNKS = SEGMENT / CHUNK;
constexpr int WARP_CHUNKS = STAGE_CHUNKS / WARPS;
constexpr bool IS_INTEGER = FORMAT == INT8 || FORMAT == INT4;
constexpr int PLANES = IS_INTEGER ? 2 : 1;  // columns that a row of x is
constexpr int X_SIZE = IS_INTEGER ? 1 : 2;  // bytes of one of its numbers
constexpr int X_TILES = (PLANES * X_ROWS + 7) / 8;
constexpr int X_WORDS = FORMAT == BF16 || FORMAT == INT8 ? 4 : 8;  // of a thread, for a chunk of W
constexpr int X_GROUP = 128;  // inputs of a row of x that share a scale, except of bfloat16
// A float16 has as many bits beside a larger one: where programs know rows as wholes, these share one scale.
constexpr bool ROWS_SHARE_SCALES = FORMAT == FLOAT8 && NORM;
constexpr bool HAS_GROUPS = FORMAT != BF16 && !ROWS_SHARE_SCALES;
constexpr float LARGEST_OF_X = 32512.f;  // of a scaled row: 127 * 256
constexpr int GROUP_CHUNKS = FORMAT == INT4 ? GROUP / CHUNK : X_GROUP / CHUNK;  // whose sums are made numbers together
constexpr int TILE_SUMS = IS_INTEGER ? 2 : 4;  // of a thread, in a block and a tile of columns, once planes are one
constexpr int SUM_X_ROWS = IS_INTEGER ? 1 : 2;  // rows of x that these are of
constexpr int SUM_ROWS = (IS_INTEGER ? 4 : 8) * X_TILES;
constexpr int SUMS_STRIDE = IS_INTEGER ? 24 : 20;  // 16, and what keeps a warp's stores in different banks
constexpr int ELEMENTS = (TILE_OUTPUTS * X_ROWS + WARPS * 32 - 1) / (WARPS * 32);  // outputs that a thread finishes

// A stage: rows of W, then scales and offsets of its groups, for each block. Behind the stages, if X_STAYS: columns of x, then
// scales of its rows; then the warps' sums, and barriers. Strides keep a warp's loads in different banks.
constexpr int W_STRIDE = SEGMENT + 64;
constexpr int SCALES_AT = 16 * BLOCKS * W_STRIDE;
constexpr int STAGE_GROUPS = FORMAT == INT4 ? 2 * SEGMENT / GROUP : 0;
constexpr int BLOCK_SCALE_BYTES = STAGE_GROUPS * 32;
constexpr int SCALE_BYTES = BLOCKS * BLOCK_SCALE_BYTES;
constexpr int STAGE_BYTES = (SCALES_AT + SCALE_BYTES * (1 + OFFSETS) + 127) / 128 * 128;
constexpr int X_AT = STAGES * STAGE_BYTES;
constexpr int X_STRIDE = INPUTS * X_SIZE + (FORMAT == FLOAT8 ? 16 : 64);
constexpr int X_SCALES_AT = X_AT + PLANES * X_ROWS * X_STRIDE;
constexpr int X_SCALES = FORMAT == BF16 ? 0 : (INPUTS / X_GROUP + 3) / 4 * 4;  // of a row

constexpr int SUMS_AT = X_STAYS ? X_SCALES_AT + X_ROWS * X_SCALES * 4 : X_AT;
constexpr int BARRIERS_AT = SUMS_AT + WARPS * BLOCKS * SUM_ROWS * SUMS_STRIDE * 4;

static_assert(WARP_CHUNKS % GROUP_CHUNKS == 0 && CHUNKS % GROUP_CHUNKS == 0, "a warp multiplies whole groups");

__device__ __forceinline__ int input_of(int chunk) {
  if (FORMAT == BF16) return chunk * (CHUNK / 2);
  if (FORMAT == INT4) return chunk * CHUNK / GROUP * (2 * GROUP) + chunk * CHUNK % GROUP;
  return chunk * CHUNK;
}

// --- sums of a group, as the matrix units have them: of 16 rows of W and 8 columns of x ------------------------------

#if FORMAT == INT8 || FORMAT == INT4
typedef int Sum;

__device__ __forceinline__ void product(Sum (&sums)[4], const u32 (&w)[4], u32 x0, u32 x1) {
  multiply_bytes(sums, w[0], w[1], w[2], w[3], x0, x1);
}

// A thread has both planes of a row of x, of rows g (0) and g + 8 (1) of W.
__device__ __forceinline__ float sum_of(const Sum (&sums)[4], int i) { return (float)(sums[2 * i] * 256 + sums[2 * i + 1]); }

__device__ __forceinline__ void clear(Sum (&sums)[4], int i) { sums[2 * i] = sums[2 * i + 1] = 0; }
#else
typedef float Sum;

__device__ __forceinline__ void product(Sum (&sums)[4], const u32 (&w)[4], u32 x0, u32 x1) {
  if (FORMAT == BF16)
    multiply(sums, w[0], w[1], w[2], w[3], x0, x1);
  else
    multiply_halves(sums, w[0], w[1], w[2], w[3], x0, x1);
}

__device__ __forceinline__ float sum_of(const Sum (&sums)[4], int i) { return sums[i]; }

__device__ __forceinline__ void clear(Sum (&sums)[4], int i) { sums[i] = 0.f; }
#endif

// --- the kernel ------------------------------------------------------------------------------------------------------

struct Product {
  const u8* x;             // [PLANES * num_rows, INPUTS]: as scaled_rows.py has it, or bfloat16
  long long x_stride;      // bytes
  const float* x_scales;   // [num_rows, INPUTS / X_GROUP], not of bfloat16
  long long x_scales_stride;  // a multiple of 4, as far as there is memory
  const u16* norm;         // of RMSNorm before the product if NORM
  float eps;
  const u8* weight;        // [num_outputs, INPUTS]; twice as many rows if GATED
  long long weight_stride; // bytes
  const float* scales;     // [outputs], of 8 bits
  const u16* bias;         // or null
  const u16* residual;     // or null
  long long residual_stride;  // numbers, as that of out
  u16* out;
  long long out_stride;
  int num_rows;
  int num_outputs;         // of one half, if GATED
};

// `scales` and `offsets` of 4 bits are bfloat16 [groups, outputs]; offsets are added to each number of a group, before its scale.
__device__ __forceinline__ void fill_ring(const Product& p, const Matrix& scales, const Matrix& offsets, u8* ring, u64* full,
                                          u64* empty, u64* x_full, int lane) {
  const u64 policy = read_once();
  const int num_tiles = p.num_outputs / TILE_OUTPUTS;
  auto segment_bytes = [](int s) { return SEGMENT * (s + 1) > ROW_BYTES ? ROW_BYTES - SEGMENT * s : SEGMENT; };
  int slot = 0, parity = 1, num_filled = 0;
  bool has_x = !X_STAYS || SCALES_X;
  auto copy_x = [&] {  // a segment's columns have a barrier of their own, so that its products need not wait for all
    wait_for_previous_kernel();
    const int num_columns = PLANES * p.num_rows;
    for (int s = 0; s < SEGMENTS; ++s) {
      const int first = s * SEGMENT_INPUTS * X_SIZE, bytes = min(SEGMENT_INPUTS * X_SIZE, INPUTS * X_SIZE - first);
      if (lane == 0) expect(&x_full[s], num_columns * bytes + (s == 0 ? p.num_rows * X_SCALES * 4 : 0));
      __syncwarp();
      if (lane < num_columns) copy(ring + X_AT + lane * X_STRIDE + first, p.x + lane * p.x_stride + first, bytes, &x_full[s]);
      if (FORMAT != BF16 && s == 0 && lane < p.num_rows)
        copy(ring + X_SCALES_AT + lane * X_SCALES * 4, (const u8*)(p.x_scales + lane * p.x_scales_stride), X_SCALES * 4, &x_full[s]);
    }
    has_x = true;
  };
  for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
    auto output_of = [&](int block) {  // the first row of W in a block
      return GATED ? (tile * (BLOCKS / 2) + block % (BLOCKS / 2)) * 16 + block / (BLOCKS / 2) * p.num_outputs
                   : tile * TILE_OUTPUTS + block * 16;
    };
    for (int s = 0; s < SEGMENTS; ++s) {
      if (!has_x && num_filled++ == STAGES) copy_x();
      wait(&empty[slot], parity);
      u8* to = ring + slot * STAGE_BYTES;
      const int bytes = segment_bytes(s);
      if (lane == 0)
        expect(&full[slot], 16 * BLOCKS * bytes + SCALE_BYTES * (1 + OFFSETS));
      __syncwarp();
      for (int row = lane; row < 16 * BLOCKS; row += 32)
        copy_once(to + row * W_STRIDE, p.weight + (output_of(row / 16) + row % 16) * p.weight_stride + s * SEGMENT, bytes,
                  &full[slot], policy);
      if (FORMAT == INT4 && lane < BLOCKS) {
        u8* const at = to + SCALES_AT + lane * BLOCK_SCALE_BYTES;
        copy_box_once(at, scales, output_of(lane) * 2, s * STAGE_GROUPS, &full[slot], policy);
        if (OFFSETS) copy_box_once(at + SCALE_BYTES, offsets, output_of(lane) * 2, s * STAGE_GROUPS, &full[slot], policy);
      }
      if (++slot == STAGES) {
        slot = 0;
        parity ^= 1;
      }
    }
  }
  if (!has_x) copy_x();
}

#include "scale_x.cuh"

extern "C" __global__ void __launch_bounds__(WARPS * 32 + 32, RESIDENT)
    streamed_rows(const __grid_constant__ Matrix scales, const __grid_constant__ Matrix offsets, const Product p, u32 magic) {
  let_next_kernel_start();
  u8* const ring = dynamic_shared;
  float* const sums = (float*)(ring + SUMS_AT);  // [WARPS, BLOCKS, SUM_ROWS, SUMS_STRIDE]
  u64* const full = (u64*)(ring + BARRIERS_AT);
  u64* const empty = full + STAGES;
  u64* const x_full = empty + STAGES;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int g = lane >> 2, t = lane & 3;  // a thread's rows of W are g and g + 8, its column of x is g
  const int first_chunk = warp * WARP_CHUNKS;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      init(&full[i], 1);
      init(&empty[i], WARPS);
    }
    for (int s = 0; s < SEGMENTS; ++s) init(&x_full[s], 1);
    publish_barriers();
  }
  __syncthreads();
  if (warp == WARPS) {
    fill_ring(p, scales, offsets, ring, full, empty, x_full, lane);
    return;
  }
  if (SCALES_X)
    scale_x(p, ring, sums, warp, lane);
  else
    wait_for_previous_kernel();

  u32 xs[X_TILES][X_WORDS];
  auto read_x = [&](u32(&to)[X_TILES][X_WORDS], const u8* from, long long stride) {
#pragma unroll
    for (int n = 0; n < X_TILES; ++n)
#pragma unroll
      for (int i = 0; i < X_WORDS / 4; ++i) {
        const u8* at = from + n * 8 * stride + i * (FORMAT == INT4 ? GROUP : 16);
        const uint4 v = g + 8 * n < PLANES * p.num_rows ? *(const uint4*)at : make_uint4(0, 0, 0, 0);
        to[n][4 * i] = v.x, to[n][4 * i + 1] = v.y, to[n][4 * i + 2] = v.z, to[n][4 * i + 3] = v.w;
      }
  };
  constexpr int X_THREAD = FORMAT == FLOAT8 ? 32 : 16;
  const u8* x_thread = p.x + g * p.x_stride + X_THREAD * t;
  auto fetch_x = [&](u32(&to)[X_TILES][X_WORDS], int chunk) {
    read_x(to, x_thread + X_SIZE * input_of(min(chunk, CHUNKS - 1)), p.x_stride);
  };
  if (!X_STAYS) fetch_x(xs, first_chunk);

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
        scale[e] = p.scales[output];
        if (GATED) up_scale[e] = p.scales[p.num_outputs + output];
      }
      if (p.bias) {
        bias[e] = wide(p.bias[output]);
        if (GATED) up_bias[e] = wide(p.bias[p.num_outputs + output]);
      }
      if (p.residual) residual[e] = wide(p.residual[row * p.residual_stride + output]);
    }

    float y[BLOCKS][X_TILES][TILE_SUMS] = {};
    // Of a group's inputs, or of all if there are no groups, unscaled: of 4 bits two groups, from the low and the high halves
    // of the bytes, and sums of their x.
    Sum low[BLOCKS][X_TILES][4] = {}, high[BLOCKS][X_TILES][4] = {};
    Sum low_x[X_TILES][4] = {}, high_x[X_TILES][4] = {};
#pragma unroll 1
    for (int s = 0; s < SEGMENTS; ++s) {
      const int first = s * STAGE_CHUNKS + warp * WARP_CHUNKS;
      if (X_STAYS && !SCALES_X && tile == blockIdx.x) wait(&x_full[s], 0);
      wait(&full[slot], parity);
      const u8* stage = ring + slot * STAGE_BYTES;
      const u8* w_thread = stage + g * W_STRIDE + warp * (WARP_CHUNKS * CHUNK) + t * 16;
      float low_scales[X_TILES][SUM_X_ROWS], high_scales[X_TILES][SUM_X_ROWS];  // of x
#pragma unroll
      for (int n = 0; n < X_TILES; ++n)
#pragma unroll
        for (int r = 0; r < SUM_X_ROWS; ++r) low_scales[n][r] = 1.f, high_scales[n][r] = 0.f;
#pragma unroll
      for (int c = 0; c < WARP_CHUNKS; ++c) {
        u32 next_xs[X_TILES][X_WORDS];
        if (X_STAYS)
          read_x(xs, ring + X_AT + g * X_STRIDE + X_THREAD * t + X_SIZE * input_of(min(first + c, CHUNKS - 1)), X_STRIDE);
        else
          fetch_x(next_xs, c + 1 < WARP_CHUNKS ? first + c + 1 : s + 1 < SEGMENTS ? first + STAGE_CHUNKS : first_chunk);
        if (CHUNKS % STAGE_CHUNKS == 0 || first + c < CHUNKS) {
          if (HAS_GROUPS && c % GROUP_CHUNKS == 0) {  // asked for now, used at the group's end
            auto x_scale = [&](int row, int input) {
              if (row >= p.num_rows) return 0.f;
              if (X_STAYS) return ((const float*)(ring + X_SCALES_AT))[row * X_SCALES + input / X_GROUP];
              return p.x_scales[row * p.x_scales_stride + input / X_GROUP];
            };
            const int input = input_of(first + c);
#pragma unroll
            for (int n = 0; n < X_TILES; ++n)
#pragma unroll
              for (int r = 0; r < SUM_X_ROWS; ++r) {
                const int row = IS_INTEGER ? 4 * n + t : 8 * n + 2 * t + r;
                low_scales[n][r] = x_scale(row, input);
                if (FORMAT == INT4) high_scales[n][r] = x_scale(row, input + GROUP);
              }
          }
#pragma unroll
          for (int b = 0; b < BLOCKS; ++b) {
            const uint4 w = *(const uint4*)(w_thread + b * 16 * W_STRIDE + c * CHUNK);
            const uint4 w_8 = *(const uint4*)(w_thread + (b * 16 + 8) * W_STRIDE + c * CHUNK);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const u32 a[4] = {word(w, 2 * j), word(w_8, 2 * j), word(w, 2 * j + 1), word(w_8, 2 * j + 1)};
              u32 first[4], second[4];  // what meets the low groups' inputs, or the chunk's only ones, and what the high ones'
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                first[i] = FORMAT == INT4 ? int4_bytes(a[i] << 4, magic) : a[i];
                second[i] = FORMAT == INT4 ? int4_bytes(a[i], magic) : 0;
              }
              if (FORMAT == FLOAT8) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                  widen_float8(a[i], first[i], first[i + 2]);
                  widen_float8(a[i + 2], second[i], second[i + 2]);
                }
              }
#pragma unroll
              for (int n = 0; n < X_TILES; ++n) {
                if (FORMAT == FLOAT8) {
                  product(low[b][n], first, xs[n][4 * j], xs[n][4 * j + 1]);
                  product(low[b][n], second, xs[n][4 * j + 2], xs[n][4 * j + 3]);
                } else {
                  product(low[b][n], first, xs[n][2 * j], xs[n][2 * j + 1]);
                  if (FORMAT == INT4) product(high[b][n], second, xs[n][X_WORDS / 2 + 2 * j], xs[n][X_WORDS / 2 + 2 * j + 1]);
                }
              }
            }
          }
          if (OFFSETS) {
            constexpr u32 one = INT4_UNIT * 0x01010101u, ones[4] = {one, one, one, one};
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
              for (int n = 0; n < X_TILES; ++n) {
                product(low_x[n], ones, xs[n][2 * j], xs[n][2 * j + 1]);
                product(high_x[n], ones, xs[n][X_WORDS / 2 + 2 * j], xs[n][X_WORDS / 2 + 2 * j + 1]);
              }
          }
          if (HAS_GROUPS && (c + 1) % GROUP_CHUNKS == 0) {
            const u8* groups = stage + SCALES_AT + (warp * WARP_CHUNKS + c) / GROUP_CHUNKS * 64 + g * 2;
#pragma unroll
            for (int n = 0; n < X_TILES; ++n)
#pragma unroll
              for (int i = 0; i < TILE_SUMS; ++i) {
                const int r = IS_INTEGER ? 0 : i % 2;
#pragma unroll
                for (int b = 0; b < BLOCKS; ++b) {
                  float l = sum_of(low[b][n], i), u = sum_of(high[b][n], i);
                  if (FORMAT == INT4) {
                    const u8* at = groups + b * BLOCK_SCALE_BYTES + i * 16;  // of rows g and g + 8
                    if (OFFSETS) {
                      l += wide(*(const u16*)(at + SCALE_BYTES)) * sum_of(low_x[n], i);
                      u += wide(*(const u16*)(at + SCALE_BYTES + 32)) * sum_of(high_x[n], i);
                    }
                    l *= wide(*(const u16*)at), u *= wide(*(const u16*)(at + 32));
                  }
                  y[b][n][i] += low_scales[n][r] * l + high_scales[n][r] * u;
                  clear(low[b][n], i), clear(high[b][n], i);
                }
                clear(low_x[n], i), clear(high_x[n], i);
              }
          }
        }
        if (!X_STAYS) {
#pragma unroll
          for (int n = 0; n < X_TILES; ++n)
#pragma unroll
            for (int i = 0; i < X_WORDS; ++i) xs[n][i] = next_xs[n][i];
        }
      }
      end_reads();
      __syncwarp();
      if (lane == 0) arrive(&empty[slot]);
      if (++slot == STAGES) {
        slot = 0;
        parity ^= 1;
      }
    }

    if (!HAS_GROUPS) {
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
        for (int n = 0; n < X_TILES; ++n)
#pragma unroll
          for (int i = 0; i < TILE_SUMS; ++i) y[b][n][i] = sum_of(low[b][n], i);
    }
    meet(WARPS * 32);  // the tile before has been read
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
      for (int n = 0; n < X_TILES; ++n) {
        const int row = IS_INTEGER ? 4 * n + t : 8 * n + 2 * t;
        float* to = sums + ((warp * BLOCKS + b) * SUM_ROWS + row) * SUMS_STRIDE + g;
#pragma unroll
        for (int i = 0; i < TILE_SUMS; ++i)
          to[IS_INTEGER ? 8 * i : i % 2 * SUMS_STRIDE + i / 2 * 8] = y[b][n][i];
      }
    meet(WARPS * 32);
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
      const int i = threadIdx.x + e * WARPS * 32, row = i / TILE_OUTPUTS, output = i % TILE_OUTPUTS;
      if (row >= p.num_rows) continue;
      float sum = 0.f, up = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) {
        auto of = [&](int block) { return sums[((w * BLOCKS + block) * SUM_ROWS + row) * SUMS_STRIDE + output % 16]; };
        sum += of(output / 16);
        if (GATED) up += of(BLOCKS / 2 + output / 16);
      }
      if (ROWS_SHARE_SCALES) {
        const float x_scale = ((const float*)(ring + X_SCALES_AT))[row * X_SCALES];
        sum *= x_scale, up *= x_scale;
      }
      sum = sum * scale[e] + bias[e];
      if (GATED) sum = sum / (1.f + __expf(-sum)) * (up * up_scale[e] + up_bias[e]);
      p.out[row * p.out_stride + tile * TILE_OUTPUTS + output] = narrow(sum + residual[e]);
    }
  }
}
