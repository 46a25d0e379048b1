// y = x W^T for up to 128 rows of x: numbers of 8 or 4 bits, as packed.py lays them out, on Hopper's matrix units.
//
// As in streamed_rows.cu W goes through a ring in shared memory, which is filled from before the previous kernel's end on;
// here x does, too, and one thread copies both. A warpgroup multiplies 64 rows of W. Where a product has too few outputs
// for the device, its rows of x are two tiles, or the programs of a cluster share a tile's inputs, and sum up in each
// other's shared memory.
//
// Rounded, both sides are multiplied where they lie. Otherwise the matrix units take W from registers, where it becomes
// numbers on its way: a thread takes 16 neighbouring bytes of W, where the instruction would have it take them from all
// over 64, and arrange.py has put the inputs of x in that order. Numbers of 4 bits become whole ones, and the sums of each
// group meet its scales. Source of instructions and layouts: the PTX manual, on wgmma.

#include "hopper.cuh"
#include "matrix_units.cuh"
#include "numbers.cuh"

// Constants of a compilation, defined by streamed_blocks.py: FORMAT, ROUNDED (x is in W's 8 bits, not in bfloat16), INPUTS,
// GROUP and OFFSETS (of 4 bits), GATED, ROWS (of x, of a tile: 16 to 128), X_TILES, WARPGROUPS, TURNS (warpgroups that
// take a tile's stages in turns), COPYING_THREADS, PARTS (programs that share a tile's inputs), SEGMENT (bytes of a row in
// a stage: 128, or 64 if not ROUNDED), STAGES, RESIDENT, ARRANGES (outputs: as arrange.py would, for the next product).
constexpr int HALVES = GATED ? 2 : 1;
constexpr int WARPS = 4 * WARPGROUPS;
constexpr int THREADS = 32 * WARPS;  // that multiply
constexpr bool MOVES_REGISTERS = COPYING_THREADS == 128;  // to those, from a whole warpgroup of which one thread copies
constexpr int TILE_ROWS = 64 * WARPGROUPS / TURNS;  // of W
constexpr int TILE_OUTPUTS = TILE_ROWS / HALVES;
constexpr int BOX_ROWS = TILE_ROWS / 2;  // of a stage's two copies: gate and up if GATED
constexpr int ROW_BYTES = FORMAT == INT4 ? INPUTS / 2 : INPUTS;
constexpr int SEGMENTS = ROW_BYTES / SEGMENT / PARTS;  // of a program
constexpr int X_SIZE = ROUNDED ? 1 : 2;
constexpr int CHUNK = 64;  // bytes of a row of W that a thread has a quarter of; so many bfloat16 of x are one copy
constexpr int CHUNKS = SEGMENT / CHUNK;
constexpr int PIECES = FORMAT == INT4 ? 2 : 1;  // of x in a stage: what the low and the high bits are multiplied with
constexpr int X_COPIES = ROUNDED ? 1 : PIECES * CHUNKS;
constexpr int X_COPY_BYTES = 128 * ROWS;

// A stage: W, then x, then scales and offsets of its groups.
constexpr int X_AT = TILE_ROWS * SEGMENT;
constexpr int SCALES_AT = X_AT + X_COPIES * X_COPY_BYTES;
constexpr int SCALE_BYTES = FORMAT == INT4 ? 2 * TILE_ROWS * 2 : 0;
constexpr int STAGE_BYTES = (SCALES_AT + SCALE_BYTES * (1 + OFFSETS) + 1023) / 1024 * 1024;
constexpr int SUMS_STRIDE = TILE_ROWS + 4;  // of a row of x; what is more keeps a warp's stores in different banks
constexpr int SUM_BYTES = TURNS * ROWS * SUMS_STRIDE * 4;  // where the ring was
constexpr int BARRIERS_AT = STAGES * STAGE_BYTES > SUM_BYTES ? STAGES * STAGE_BYTES : SUM_BYTES;

constexpr int QUADS = TILE_OUTPUTS / 4;  // a thread finishes four outputs at a time, of every so many rows of x
constexpr int ROWS_AT_ONCE = THREADS / QUADS;
constexpr int PART_ROWS = ROWS / PARTS;  // that one of a tile's programs finishes
constexpr int ELEMENTS = (PART_ROWS + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;

static_assert(ROW_BYTES % (SEGMENT * PARTS) == 0 && STAGES >= 2 && FORMAT != BF16, "");
// Were a stage now one warpgroup's and now another's, one could wait for it while it is filled for the other (copies end in
// any order), and a barrier's parity would tell the one before the last from the next.
static_assert(STAGES % TURNS == 0 && (TURNS == 1 || !ROUNDED), "");
static_assert(!MOVES_REGISTERS || WARPGROUPS == 2, "");
static_assert(ROUNDED ? SEGMENT == 128 : FORMAT != INT4 || GROUP % SEGMENT == 0, "");

// --- the kernel ------------------------------------------------------------------------------------------------------

struct Product {
  const float* x_scales;  // [num_rows], read if ROUNDED
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
    const int byte = (first + s) * SEGMENT, input = FORMAT == INT4 ? byte / GROUP * (2 * GROUP) + byte % GROUP : byte;
    for (int i = 0; i < X_COPIES; ++i) {
      const int from = input + i / CHUNKS * GROUP + i % CHUNKS * CHUNK;
      copy_box(to + i * X_COPY_BYTES, x, from * X_SIZE, x_tile * ROWS, &full[slot]);
    }
  };
  int slot = 0, parity = 1;
  for (int s = 0; s < SEGMENTS; ++s) {
    if (s == STAGES) {
      wait_for_previous_kernel();
      for (int i = 0; i < STAGES; ++i) copy_x(i, i);
    }
    wait(&empty[slot], parity);
    u8* to = ring + slot * STAGE_BYTES;
    expect(&full[slot], TILE_ROWS * SEGMENT + X_COPIES * X_COPY_BYTES + SCALE_BYTES * (1 + OFFSETS));
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

#if !ROUNDED
constexpr int OPERANDS = 4 * CHUNKS;  // of a piece of a stage's x: 32 bytes of each of its rows are the other side

// Two numbers: the even bytes of a word of W, or the odd ones, and of 4 bits the low or the high half of each.
template <int PIECE>
__device__ __forceinline__ u32 pair_of(u32 bytes, bool odd, u32 magic, u32 less) {
  if (FORMAT == INT8) return int8_pair(odd ? bytes >> 8 : bytes, magic);
  if (FORMAT == FLOAT8) return float8_pair(odd ? bytes : bytes << 8);
  return multiply_add(merge<0x000f000fu>(bytes >> (odd ? 8 : 0) + 4 * PIECE, magic), 0x3f803f80u, less);
}

// Adds a stage's products with one piece of x to those of a thread's rows, `row` and `row` + 8; of 4 bits, to nothing.
template <int PIECE>
__device__ __forceinline__ void multiply_piece(float (&sums)[SUMS], const u8* stage, int row, int t, u32 magic, u32 less,
                                               u32 less_8) {
  u32 a[OPERANDS][4];
#pragma unroll
  for (int i = 0; i < OPERANDS; ++i) {
    const int place = i / 4 * 4 + t;
    const u32 bytes = word(bytes_of(stage, row, place), i % 4), bytes_8 = word(bytes_of(stage, row + 8, place), i % 4);
#pragma unroll
    for (int k = 0; k < 4; ++k) a[i][k] = pair_of<PIECE>(k % 2 ? bytes_8 : bytes, k >= 2, magic, k % 2 ? less_8 : less);
  }
  begin_products(sums);
#pragma unroll
  for (int i = 0; i < OPERANDS; ++i) {
    const u64 inputs = rows_at(stage + X_AT + (PIECE * CHUNKS + i / 4) * X_COPY_BYTES) + i % 4 * 2;  // 32 bytes farther
    if (FORMAT == INT4 && i == 0) {
      multiply_first(sums, a[i], inputs);
    } else {
      multiply_block(sums, a[i], inputs);
    }
  }
  commit_products(sums);
  if (PIECE == PIECES - 1) end_reads();
  end_products(sums);
}
#endif

#if FORMAT == INT4
// In the fraction of 128.0 a number is 136 more than it stands for, if its group has no offset.
__device__ __forceinline__ u32 less_of(const u8* scale) {
  const u32 less = narrow((OFFSETS ? wide(*(const u16*)(scale + SCALE_BYTES)) : 0.f) - 136.f);
  return less | less << 16;
}

// Adds a group's products with one piece of x.
template <int PIECE>
__device__ __forceinline__ void add_piece(float (&y)[SUMS], float (&sums)[SUMS], const u8* stage, int row, int t, u32 magic) {
  const u8* of_row = stage + SCALES_AT + (PIECE * TILE_ROWS + row) * 2;
  const u8* of_row_8 = of_row + 8 * 2;
  const float scale = wide(*(const u16*)of_row), scale_8 = wide(*(const u16*)of_row_8);
  multiply_piece<PIECE>(sums, stage, row, t, magic, less_of(of_row), less_of(of_row_8));
#pragma unroll
  for (int i = 0; i < SUMS; ++i) y[i] += sums[i] * (i & 2 ? scale_8 : scale);
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS + COPYING_THREADS, RESIDENT)
    streamed_blocks(const __grid_constant__ Matrix w, const __grid_constant__ Matrix x, const Product p, u32 magic) {
  let_next_kernel_start();
  u8* const ring = dynamic_shared;
  float* const sums = (float*)ring;  // [TURNS, ROWS, SUMS_STRIDE], once the ring is empty for good
  u64* const full = (u64*)(ring + BARRIERS_AT);
  u64* const empty = full + STAGES;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int part = PARTS > 1 ? rank_in_cluster() : 0, tile = blockIdx.x / (PARTS * X_TILES);
  const int x_tile = blockIdx.x / PARTS % X_TILES, first_x = x_tile * ROWS, num_rows = min(p.num_rows - first_x, ROWS);
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      init(&full[i], 1);
      init(&empty[i], WARPS / TURNS);
    }
    publish_barriers();
  }
  __syncthreads();
  if (warp >= WARPS) {
    if (MOVES_REGISTERS) keep_registers<24>();
    if (threadIdx.x == THREADS) fill_ring(w, x, p, ring, full, empty, tile, x_tile, part * SEGMENTS);
    return;
  }
  if (MOVES_REGISTERS) take_registers<240>();
  wait_for_previous_kernel();

  const int g = lane >> 2, t = lane & 3, row = (warp * 16 + g) % TILE_ROWS;  // of the tile; a thread has row + 8, too
  const int turn = uniform(warp * 16 / TILE_ROWS);
  const int quad = threadIdx.x % QUADS, first_row = part * PART_ROWS + threadIdx.x / QUADS;

  // Asked for now, used when the sums are there.
  const int output = tile * TILE_OUTPUTS + quad * 4;
  float4 scale = make_float4(1.f, 1.f, 1.f, 1.f), up_scale = scale;
  if (FORMAT != INT4) {
    scale = *(const float4*)((const float*)p.scales + output);
    if (GATED) up_scale = *(const float4*)((const float*)p.scales + p.num_outputs + output);
  }
  float x_scale[ELEMENTS];
  uint2 residual[ELEMENTS];
#pragma unroll
  for (int e = 0; e < ELEMENTS; ++e) {
    const int n = first_row + e * ROWS_AT_ONCE;
    x_scale[e] = 1.f, residual[e] = make_uint2(0, 0);
    if (n >= num_rows) continue;
    if (ROUNDED) x_scale[e] = p.x_scales[first_x + n];
    if (!GATED && p.residual) residual[e] = *(const uint2*)(p.residual + (first_x + n) * p.residual_stride + output);
  }

  Sum y[SUMS];
#pragma unroll
  for (int i = 0; i < SUMS; ++i) y[i] = 0;
#if FORMAT == INT4
  float of_group[SUMS];
#pragma unroll
  for (int i = 0; i < SUMS; ++i) of_group[i] = 0;
#endif
  int slot = turn, parity = 0;
  auto release = [&](int slot) {
    __syncwarp();
    if (lane == 0) arrive(&empty[slot]);
  };
#pragma unroll 1
  for (int s = turn; s < SEGMENTS; s += TURNS) {
    wait(&full[slot], parity);
    const u8* stage = ring + slot * STAGE_BYTES;
#if FORMAT == INT4
    add_piece<0>(y, of_group, stage, row, t, magic);
    add_piece<1>(y, of_group, stage, row, t, magic);
    release(slot);
#elif ROUNDED
    const u64 w_rows = rows_at(stage + warp / 4 * 64 * SEGMENT), x_rows = rows_at(stage + X_AT);
    begin_products(y);
#pragma unroll
    for (int i = 0; i < SEGMENT / 32; ++i) multiply_block(y, w_rows + 2 * i, x_rows + 2 * i);  // 32 bytes farther
    commit_products(y);
    end_older_products(y);  // a stage's are begun before those of the one before have ended
    if (s > 0) release(slot ? slot - 1 : STAGES - 1);
#else
    multiply_piece<0>(y, stage, row, t, magic, 0, 0);
    release(slot);
#endif
    if ((slot += TURNS) >= STAGES) {
      slot -= STAGES;
      parity ^= 1;
    }
  }
#if ROUNDED
  end_products(y);  // of the last stage
#endif

  meet(THREADS);  // everybody is done with the ring
#pragma unroll
  for (int i = 0; i < SUMS / 4; ++i) {
    float* to = sums + (turn * ROWS + 8 * i + 2 * t) * SUMS_STRIDE;
    to[row] = y[4 * i], to[SUMS_STRIDE + row] = y[4 * i + 1];
    to[row + 8] = y[4 * i + 2], to[SUMS_STRIDE + row + 8] = y[4 * i + 3];
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
    for (int i = 0; i < PARTS * TURNS; ++i) {
      auto add = [&](float(&to)[4], const float* from) {
        from += i % TURNS * ROWS * SUMS_STRIDE;
        const float4 v = PARTS > 1 ? read_from(i / TURNS, from) : *(const float4*)from;
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
    u16* const to = p.out + (first_x + n) * p.out_stride;
    if (ARRANGES) {  // a thread's word of W are these four outputs: two even and two odd bytes
      const int thread = output % 64 / 16, word = output % 16 / 4;
      u32* const even = (u32*)(to + output / 64 * 64 + word * 16 + thread * 2);
      even[0] = narrowed[0] | (u32)narrowed[2] << 16, even[4] = narrowed[1] | (u32)narrowed[3] << 16;
    } else {
      *(uint2*)(to + output) = make_uint2(narrowed[0] | (u32)narrowed[1] << 16, narrowed[2] | (u32)narrowed[3] << 16);
    }
  }
  if (PARTS > 1) leave_cluster();  // a program that ended would take its sums along
}
