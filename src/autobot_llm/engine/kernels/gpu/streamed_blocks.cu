// y = x W^T for up to 128 rows of x: numbers of 8 or 4 bits, as packed.py lays them out, on Hopper's matrix units.
//
// As in streamed_rows.cu W goes through a ring in shared memory, which is filled from before the previous kernel's end on;
// here x does, too, and one thread copies both. A warpgroup multiplies 64 rows of W. Where a product has too few outputs for the device,
// the programs of a cluster share a tile's inputs, and sum up in each other's shared memory.
//
// Rounded, both sides are multiplied where they lie. Otherwise the matrix units take W from registers, where it becomes
// numbers on its way: a thread takes 16 neighbouring bytes of W, where the instruction would have it take them from all
// over 64, and arrange.py has put the inputs of x in that order. Source of instructions and layouts: the PTX manual, on wgmma.

#include "hopper.cuh"
#include "matrix_units.cuh"
#include "numbers.cuh"

// Constants of a compilation, defined by streamed_blocks.py: FORMAT, ROUNDED (x is in W's 8 bits, not in bfloat16), INPUTS,
// GROUP and OFFSETS (of 4 bits), GATED, ROWS (of x, of a tile: 32, 64 or 128), X_TILES, UNITS (of 64 rows of W, of a tile), WARPGROUPS,
// COLUMNS (rows of x of a product), MOVES_REGISTERS (a whole warpgroup copies, and leaves its registers to the others), PARTS (programs that share a tile's inputs), SEGMENT (bytes of a row in a stage: 128, or 64 if
// not ROUNDED), STAGES, RESIDENT.
constexpr int HALVES = GATED ? 2 : 1;
constexpr int WARPS = 4 * WARPGROUPS;
constexpr int THREADS = 32 * WARPS;  // that multiply
constexpr int COPYING_THREADS = MOVES_REGISTERS ? 128 : 32;
constexpr int MOST_REGISTERS = WARPGROUPS == 2 ? 240 : WARPGROUPS == 3 ? 160 : 112;
constexpr int TILE_ROWS = 64 * UNITS;  // of W
constexpr int OWN_UNITS = (UNITS + WARPGROUPS - 1) / WARPGROUPS;  // of a warpgroup
constexpr int TILE_OUTPUTS = TILE_ROWS / HALVES;
constexpr int BOX_ROWS = TILE_ROWS / 2;  // of a stage's two copies: gate and up if GATED
constexpr int ROW_BYTES = FORMAT == INT4 ? INPUTS / 2 : INPUTS;
constexpr int SEGMENTS = ROW_BYTES / SEGMENT / PARTS;  // of a program
constexpr int X_SIZE = ROUNDED ? 1 : 2;
constexpr int PIECES = FORMAT == INT4 ? 2 : 1;  // of x in a stage: what the low and the high bits are multiplied with
constexpr int CHUNK = 64;  // bytes of a row of W that a thread has a quarter of

// A stage: W, then x, then scales and offsets of its groups.
constexpr int X_AT = TILE_ROWS * SEGMENT;
constexpr int PIECE_BYTES = SEGMENT * ROWS * X_SIZE;
constexpr int SCALES_AT = X_AT + PIECES * PIECE_BYTES;
constexpr int SCALE_BYTES = FORMAT == INT4 ? 2 * TILE_ROWS * 2 : 0;
constexpr int STAGE_BYTES = (SCALES_AT + SCALE_BYTES * (1 + OFFSETS) + 1023) / 1024 * 1024;
constexpr int SUMS_STRIDE = TILE_ROWS + 4;  // of a row of x; what is more keeps a warp's stores in different banks
constexpr int SUM_BYTES = ROWS * SUMS_STRIDE * 4;  // where the ring was
constexpr int BARRIERS_AT = STAGES * STAGE_BYTES > SUM_BYTES ? STAGES * STAGE_BYTES : SUM_BYTES;

constexpr int QUADS = TILE_OUTPUTS / 4;  // a thread finishes four outputs at a time, of every so many rows of x
constexpr int ROWS_AT_ONCE = THREADS / QUADS;  // by so many threads; what is over stands aside
constexpr int PART_ROWS = ROWS / PARTS;  // that one of a tile's programs finishes
constexpr int ELEMENTS = (PART_ROWS + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;

static_assert(ROW_BYTES % (SEGMENT * PARTS) == 0 && STAGES >= 2 && FORMAT != BF16, "");
static_assert(ROUNDED ? SEGMENT == 128 : FORMAT != INT4 || GROUP % SEGMENT == 0, "");
static_assert(FORMAT == INT4 || (OWN_UNITS == 1 && COLUMNS == ROWS), "");

// --- the kernel ------------------------------------------------------------------------------------------------------

struct Product {
  const u8* x;            // as arrange.py has it; if ROUNDED, the kernel has a map of its rows
  const float* x_scales;  // [num_rows], read if ROUNDED and of 4 bits
  const void* scales;     // float [outputs] of 8 bits, bfloat16 [groups, outputs] of 4
  const u16* offsets;     // as the scales, read if OFFSETS: added to each number of a group, before its scale
  const u16* bias;        // or null
  const u16* residual;    // or null
  long long residual_stride;
  u16* out;
  long long out_stride;
  int num_rows;
  int num_outputs;        // of one half, if GATED
};

__device__ __forceinline__ void fill_ring(const Matrix& w, const Matrix& x, const Product& p, u8* ring, u64* full, u64* empty,
                                          int tile, int x_tile, int first) {
  const u64 policy = read_once();
  auto copy_x = [&](int slot, int s) {
    u8* to = ring + slot * STAGE_BYTES + X_AT;
    const int byte = (first + s) * SEGMENT;
    if (ROUNDED) {
      copy_box(to, x, byte, x_tile * ROWS, &full[slot]);
      return;
    }
    const int input = x_tile * INPUTS + (FORMAT == INT4 ? byte / GROUP * (2 * GROUP) + byte % GROUP : byte);
    for (int i = 0; i < PIECES; ++i)
      copy(to + i * PIECE_BYTES, p.x + (long long)(input + i * GROUP) * (ROWS * X_SIZE), PIECE_BYTES, &full[slot]);
  };
  int slot = 0, parity = 1;
  for (int s = 0; s < SEGMENTS; ++s) {
    if (s == STAGES) {
      wait_for_previous_kernel();
      for (int i = 0; i < STAGES; ++i) copy_x(i, i);
    }
    wait(&empty[slot], parity);
    u8* to = ring + slot * STAGE_BYTES;
    expect(&full[slot], TILE_ROWS * SEGMENT + PIECES * PIECE_BYTES + SCALE_BYTES * (1 + OFFSETS));
    for (int box = 0; box < 2; ++box) {
      const int row = GATED ? box * p.num_outputs + tile * BOX_ROWS : tile * TILE_ROWS + box * BOX_ROWS;
      copy_box_once(to + box * BOX_ROWS * SEGMENT, w, (first + s) * SEGMENT, row, &full[slot], policy);
      for (int i = 0; i < (FORMAT == INT4 ? 2 : 0); ++i) {  // the groups of the low and the high bits
        const long long at = (long long)((first + s) * SEGMENT / GROUP * 2 + i) * (p.num_outputs * HALVES) + row;
        u8* scales = to + SCALES_AT + (i * TILE_ROWS + box * BOX_ROWS) * 2;
        copy(scales, (const u16*)p.scales + at, BOX_ROWS * 2, &full[slot]);
        if (OFFSETS) copy(scales + SCALE_BYTES, p.offsets + at, BOX_ROWS * 2, &full[slot]);
      }
    }
    if (s >= STAGES) copy_x(slot, s);
    if (++slot == STAGES) {
      slot = 0;
      parity ^= 1;
    }
  }
  if (SEGMENTS <= STAGES) {
    wait_for_previous_kernel();
    for (int s = 0; s < SEGMENTS; ++s) copy_x(s, s);
  }
}

// 16 bytes of a row of a stage, where the copy has put them: in another order in each row, in different banks.
__device__ __forceinline__ uint4 bytes_of(const u8* stage, int row, int i) {
  const int place = SEGMENT == 128 ? i ^ (row & 7) : i ^ (row >> 1 & 3);
  return *(const uint4*)(stage + row * SEGMENT + place * 16);
}

constexpr int CHUNKS = SEGMENT / CHUNK;
constexpr int OPERANDS = 4 * CHUNKS;  // of a piece of a stage's x: 32 bytes of each of its rows are the other side

#if FORMAT == INT4
// Numbers of 4 bits become whole numbers of float16; their scale is for the sums of their group. In the fraction of 1024.0 there is
// room for the high bits, too, which then count 16 times as much. The inputs of x are in the order of the even and the odd bytes.
struct Row {
  float scale;
  u32 less;  // in both halves of a word
};

__device__ __forceinline__ Row row_of(const u8* stage, int piece, int row) {
  const u8* at = stage + SCALES_AT + (piece * TILE_ROWS + row) * 2;
  const u32 less = narrow_to_half((OFFSETS ? wide(*(const u16*)(at + SCALE_BYTES)) : 0.f) - (piece ? 72.f : 1032.f));
  return {wide(*(const u16*)at), less | less << 16};
}

template <int PIECE>
__device__ __forceinline__ void numbers_of(u32 (&a)[OPERANDS][4], const u8* stage, int row, int t, u32 magic, u32 less, u32 less_8) {
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    const uint4 bytes = bytes_of(stage, row, chunk * 4 + t), bytes_8 = bytes_of(stage, row + 8, chunk * 4 + t);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k) {  // even bytes of both rows, then odd ones
        const u32 bits = word(k % 2 ? bytes_8 : bytes, i) >> (k < 2 ? 0 : 8);
        a[chunk * 4 + i][k] = multiply_add_halves(merge<PIECE ? 0x00f000f0u : 0x000f000fu>(bits, magic),
                                                  PIECE ? 0x2c002c00u : 0x3c003c00u, k % 2 ? less_8 : less);
      }
  }
}

// Adds the products of a unit with one piece of a stage's x.
template <int PIECE>
__device__ __forceinline__ void add_piece(float (&y)[ROWS / 2], float (&sums)[SUMS], const u8* stage, int row, int t, u32 magic) {
  const Row of = row_of(stage, PIECE, row), of_8 = row_of(stage, PIECE, row + 8);
  u32 a[OPERANDS][4];
  numbers_of<PIECE>(a, stage, row, t, magic, of.less, of_8.less);
#pragma unroll
  for (int first = 0; first < ROWS; first += COLUMNS) {
    const u64 inputs = arranged_at(stage + X_AT + PIECE * PIECE_BYTES + first * 16);
    begin_products(sums);
    multiply_first(sums, a[0], inputs);
#pragma unroll
    for (int i = 1; i < OPERANDS; ++i) multiply_block(sums, a[i], inputs + i * (32 * ROWS >> 4));
    commit_products(sums);
    end_products(sums);
#pragma unroll
    for (int i = 0; i < SUMS; ++i) y[first / 2 + i] += sums[i] * (i & 2 ? of_8.scale : of.scale);
  }
}
#elif !ROUNDED
// A thread's numbers of a stage, of rows `row` and `row` + 8, in the order of the stage's x.
__device__ __forceinline__ void numbers_of(u32 (&a)[OPERANDS][4], const u8* stage, int row, int t, u32 magic) {
#pragma unroll
  for (int i = 0; i < OPERANDS; ++i) {
    const int chunk = i / 4;
    const uint4 bytes = bytes_of(stage, row, chunk * 4 + t), bytes_8 = bytes_of(stage, row + 8, chunk * 4 + t);
    widen(word(bytes, i % 4), magic, a[i][0], a[i][2]);
    widen(word(bytes_8, i % 4), magic, a[i][1], a[i][3]);
  }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS + COPYING_THREADS, RESIDENT)
    streamed_blocks(const __grid_constant__ Matrix w, const __grid_constant__ Matrix x, const Product p, u32 magic) {
  let_next_kernel_start();
  u8* const ring = dynamic_shared;
  float* const sums = (float*)ring;  // [ROWS, SUMS_STRIDE], once the ring is empty for good
  u64* const full = (u64*)(ring + BARRIERS_AT);
  u64* const empty = full + STAGES;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int part = PARTS > 1 ? rank_in_cluster() : 0, tile = blockIdx.x / (PARTS * X_TILES);
  const int x_tile = blockIdx.x / PARTS % X_TILES, num_rows = min(p.num_rows - x_tile * ROWS, ROWS);
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      init(&full[i], 1);
      init(&empty[i], WARPS);
    }
    publish_barriers();
  }
  __syncthreads();
  if (warp >= WARPS) {
    if (MOVES_REGISTERS) keep_registers<24>();
    if (threadIdx.x == THREADS) fill_ring(w, x, p, ring, full, empty, tile, x_tile, part * SEGMENTS);
    return;
  }
  if (MOVES_REGISTERS) take_registers<MOST_REGISTERS>();
  wait_for_previous_kernel();

  // Rows of the tile, of a thread's first unit; it has row + 8, too.
  const int g = lane >> 2, t = lane & 3, row = warp * 16 + g;
  const int quad = threadIdx.x % QUADS, turn = threadIdx.x / QUADS, first_row = turn < ROWS_AT_ONCE ? part * PART_ROWS + turn : ROWS;
  const int before = x_tile * ROWS;  // rows of x

  // Asked for now, used when the sums are there.
  const int output = tile * TILE_OUTPUTS + quad * 4;
  float4 scale = make_float4(1.f, 1.f, 1.f, 1.f), up_scale = scale;
  if (FORMAT != INT4) {
    scale = *(const float4*)((const float*)p.scales + output);
    if (GATED) up_scale = *(const float4*)((const float*)p.scales + p.num_outputs + output);
  }
  float x_scale[ELEMENTS];
  uint2 residual[ELEMENTS];
  auto ask_for_rows = [&]() {
#pragma unroll
    for (int e = 0; e < ELEMENTS; ++e) {
      const int n = first_row + e * ROWS_AT_ONCE;
      x_scale[e] = 1.f, residual[e] = make_uint2(0, 0);
      if (n >= num_rows) continue;
      if (ROUNDED || FORMAT == INT4) x_scale[e] = p.x_scales[before + n];
      if (!GATED && p.residual) residual[e] = *(const uint2*)(p.residual + (before + n) * p.residual_stride + output);
    }
  };
  if (FORMAT != INT4) ask_for_rows();  // whose registers are needed for sums

  Sum y[OWN_UNITS][ROWS / 2];
#pragma unroll
  for (int i = 0; i < OWN_UNITS * ROWS / 2; ++i) y[i / (ROWS / 2)][i % (ROWS / 2)] = 0;
#if FORMAT == INT4
  float sums_of_group[SUMS];
#pragma unroll
  for (int i = 0; i < SUMS; ++i) sums_of_group[i] = 0;
#endif
  int slot = 0, parity = 0;
  auto release = [&](int slot) {
    __syncwarp();
    if (lane == 0) arrive(&empty[slot]);
  };
#pragma unroll 1
  for (int s = 0; s < SEGMENTS; ++s) {
    wait(&full[slot], parity);
    const u8* stage = ring + slot * STAGE_BYTES;
#if FORMAT == INT4
#pragma unroll
    for (int u = 0; u < OWN_UNITS; ++u) {
      if (UNITS % WARPGROUPS && u == OWN_UNITS - 1 && warp / 4 >= UNITS % WARPGROUPS) break;
      add_piece<0>(y[u], sums_of_group, stage, row + u * 64 * WARPGROUPS, t, magic);
      add_piece<1>(y[u], sums_of_group, stage, row + u * 64 * WARPGROUPS, t, magic);
    }
    release(slot);
#elif ROUNDED
    const u64 w_rows = rows_at(stage + warp / 4 * 64 * SEGMENT), x_rows = rows_at(stage + X_AT);
    begin_products(y[0]);
#pragma unroll
    for (int i = 0; i < SEGMENT / 32; ++i) multiply_block(y[0], w_rows + 2 * i, x_rows + 2 * i);  // 32 bytes farther
    commit_products(y[0]);
    end_older_products(y[0]);  // a stage's are begun before those of the one before have ended
    if (s > 0) release(slot ? slot - 1 : STAGES - 1);
#else
    u32 a[OPERANDS][4];
    numbers_of(a, stage, row, t, magic);
    const u64 inputs = arranged_at(stage + X_AT);
    begin_products(y[0]);
#pragma unroll
    for (int i = 0; i < OPERANDS; ++i) multiply_block(y[0], a[i], inputs + i * (32 * ROWS >> 4));
    commit_products(y[0]);
    end_products(y[0]);
    release(slot);
#endif
    if (++slot == STAGES) {
      slot = 0;
      parity ^= 1;
    }
  }
#if ROUNDED
  end_products(y[0]);  // of the last stage
#endif
  if (FORMAT == INT4) ask_for_rows();

  meet(THREADS);  // everybody is done with the ring
#pragma unroll
  for (int u = 0; u < OWN_UNITS; ++u) {
    if (UNITS % WARPGROUPS && u == OWN_UNITS - 1 && warp / 4 >= UNITS % WARPGROUPS) break;
#pragma unroll
    for (int i = 0; i < ROWS / 8; ++i) {
      float* to = sums + (8 * i + 2 * t) * SUMS_STRIDE + row + u * 64 * WARPGROUPS;
      to[0] = y[u][4 * i], to[SUMS_STRIDE] = y[u][4 * i + 1];
      to[8] = y[u][4 * i + 2], to[SUMS_STRIDE + 8] = y[u][4 * i + 3];
    }
  }
  if (PARTS > 1) {
    arrive_at_cluster();
    wait_for_cluster();
  } else {
    meet(THREADS);
  }
#pragma unroll
  for (int e = 0; e < ELEMENTS; ++e) {
    const int n = first_row + e * ROWS_AT_ONCE;
    if (n >= num_rows || n >= (part + 1) * PART_ROWS) continue;
    float of[4] = {}, up[4] = {};
#pragma unroll
    for (int i = 0; i < PARTS; ++i) {
      auto add = [&](float(&to)[4], const float* from) {
        const float4 v = PARTS > 1 ? read_from(i, from) : *(const float4*)from;
        to[0] += v.x, to[1] += v.y, to[2] += v.z, to[3] += v.w;
      };
      add(of, sums + n * SUMS_STRIDE + quad * 4);
      if (GATED) add(up, sums + n * SUMS_STRIDE + BOX_ROWS + quad * 4);
    }
    u16 narrowed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u32 both = i < 2 ? residual[e].x : residual[e].y;
      float v = of[i] * (&scale.x)[i] * x_scale[e];
      if (p.bias) v += wide(p.bias[output + i]);
      if (GATED) {
        float u = up[i] * (&up_scale.x)[i] * x_scale[e];
        if (p.bias) u += wide(p.bias[p.num_outputs + output + i]);
        v = v / (1.f + __expf(-v)) * u;
      }
      narrowed[i] = narrow(v + wide(i % 2 ? both >> 16 : both & 0xffff));
    }
    *(uint2*)(p.out + (before + n) * p.out_stride + output) =
        make_uint2(narrowed[0] | (u32)narrowed[1] << 16, narrowed[2] | (u32)narrowed[3] << 16);
  }
  if (PARTS > 1) {  // a program that ended would take its sums along
    arrive_at_cluster();
    wait_for_cluster();
  }
}
