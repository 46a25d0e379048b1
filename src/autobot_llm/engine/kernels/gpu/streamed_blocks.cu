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
#include "numbers.cuh"

// Constants of a compilation, defined by streamed_blocks.py: FORMAT, ROUNDED (x is in W's 8 bits, not in bfloat16), INPUTS,
// GROUP and OFFSETS (of 4 bits), GATED, ROWS (of x: 32, 64 or 128), WARPGROUPS, PARTS (programs that share a tile's
// inputs), SEGMENT (bytes of a row in a stage: 128, or 64 if not ROUNDED), STAGES, RESIDENT.
constexpr int HALVES = GATED ? 2 : 1;
constexpr int WARPS = 4 * WARPGROUPS;
constexpr int THREADS = 32 * WARPS;  // that multiply
constexpr int TILE_ROWS = 64 * WARPGROUPS;  // of W
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
constexpr int ROWS_AT_ONCE = THREADS / QUADS;
constexpr int PART_ROWS = ROWS / PARTS;  // that one of a tile's programs finishes
constexpr int ELEMENTS = (PART_ROWS + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;

static_assert(ROW_BYTES % (SEGMENT * PARTS) == 0 && STAGES >= 2 && FORMAT != BF16, "");
static_assert(ROUNDED ? SEGMENT == 128 : FORMAT != INT4 || GROUP % SEGMENT == 0, "");

#if ROUNDED && FORMAT == INT8
typedef int Sum;
#else
typedef float Sum;
#endif
constexpr int SUMS = ROWS / 2;  // of a thread: 64 rows of W times ROWS over 128 threads

// --- the matrix units ------------------------------------------------------------------------------------------------

// 64 rows of W are multiplied with all of x, 32 bytes of each row of x at a time, and added up; begun, and not ended. Of W this
// thread's numbers in `w`, or the matrices of both in shared memory.
__device__ void multiply_block(Sum (&sums)[SUMS], const u32 (&w)[4], u64 x);
__device__ void multiply_block(Sum (&sums)[SUMS], u64 w, u64 x);
__device__ void begin_products(Sum (&sums)[SUMS]);
__device__ void commit_products(Sum (&sums)[SUMS]);  // those begun so far are one group
__device__ void end_products(Sum (&sums)[SUMS]);
__device__ void end_older_products(Sum (&sums)[SUMS]);  // of all groups but the last one

#ifndef INSTRUCTIONS
#if ROUNDED && FORMAT == INT8
#define KEPT(i) "+r"(sums[i])
#define OPERATION(shape) shape "k32.s32.s8.s8 "
#define AFTER "1;"
#elif ROUNDED
#define KEPT(i) "+f"(sums[i])
#define OPERATION(shape) shape "k32.f32.e4m3.e4m3 "
#define AFTER "1, 1, 1;"
#else
#define KEPT(i) "+f"(sums[i])
#define OPERATION(shape) shape "k16.f32.bf16.bf16 "
#define AFTER "1, 1, 1, 0;"
#endif
#define KEPT_4(i) KEPT(i), KEPT(i + 1), KEPT(i + 2), KEPT(i + 3)
#define KEPT_16(i) KEPT_4(i), KEPT_4(i + 4), KEPT_4(i + 8), KEPT_4(i + 12)
#define NAMES_16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define NAMES_32 NAMES_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES_64 \
  NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47" \
           ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#if ROWS == 32
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
  asm volatile("wgmma.mma_async.sync.aligned." INTO_SUMS FROM_MEMORY AFTER : ALL_KEPT : "l"(w), "l"(x));
}
#else
__device__ __forceinline__ void multiply_block(Sum (&sums)[SUMS], const u32 (&w)[4], u64 x) {
  asm volatile("wgmma.mma_async.sync.aligned." INTO_SUMS FROM_REGISTERS AFTER
               : ALL_KEPT
               : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "l"(x));
}
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

// A matrix in shared memory, as the matrix units are told of it: where, how far its blocks lie apart along inputs and along
// rows, and whether pieces of 16 bytes change places as copies of 128 bytes have it.
__device__ __forceinline__ u64 matrix_at(const u8* start, u32 along_inputs, u32 along_rows, bool swizzled) {
  return (u64)(shared_address(start) >> 4 & 0x3fff) | (u64)(along_inputs >> 4) << 16 | (u64)(along_rows >> 4) << 32 |
         (u64)swizzled << 62;
}

// Rows of 128 bytes.
__device__ __forceinline__ u64 rows_at(const u8* start) { return matrix_at(start, 16, 8 * 128, true); }

// As arrange.py has it: 8 rows by 16 bytes lie together, the next rows follow, then the next 16 bytes.
__device__ __forceinline__ u64 arranged_at(const u8* start) { return matrix_at(start, ROWS * 16, 8 * 16, false); }

// --- the kernel ------------------------------------------------------------------------------------------------------

struct Product {
  const u8* x;            // as arrange.py has it; if ROUNDED, the kernel has a map of its rows
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
                                          int tile, int first) {
  const u64 policy = read_once();
  auto copy_x = [&](int slot, int s) {
    u8* to = ring + slot * STAGE_BYTES + X_AT;
    const int byte = (first + s) * SEGMENT;
    if (ROUNDED) {
      copy_box(to, x, byte, 0, &full[slot]);
      return;
    }
    const int input = FORMAT == INT4 ? byte / GROUP * (2 * GROUP) + byte % GROUP : byte;
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

__device__ __forceinline__ u32 twice(u16 v) { return v | (u32)v << 16; }

// What numbers of 4 bits of a row become: v + less, times scale, each in both halves of a word.
struct Affine {
  u32 less, scale;
};

__device__ __forceinline__ Affine affine_of(const u8* stage, int group, int row) {
  const u8* at = stage + SCALES_AT + (group * TILE_ROWS + row) * 2;
  const float offset = OFFSETS ? wide(*(const u16*)(at + SCALE_BYTES)) : 0.f;
  return {twice(narrow(offset - 136.f)), twice(*(const u16*)at)};
}

__device__ __forceinline__ u32 scaled_pair(u32 bits, u32 magic, const Affine& a) {
  const u32 number = multiply_add(merge<0x000f000fu>(bits, magic), 0x3f803f80u, a.less);
  return multiply_add(number, a.scale, 0x80008000u);
}

constexpr int CHUNKS = SEGMENT / CHUNK;
constexpr int OPERANDS = CHUNKS * (FORMAT == INT4 ? 8 : 4);  // of a stage: 32 bytes of each row of x are the other side

// A thread's numbers of a stage, of rows `row` and `row` + 8, in the order of the stage's x.
__device__ __forceinline__ void numbers_of(u32 (&a)[OPERANDS][4], const u8* stage, int row, int t, u32 magic) {
  Affine low = {}, low_8 = {}, high = {}, high_8 = {};
  if (FORMAT == INT4) {
    low = affine_of(stage, 0, row), low_8 = affine_of(stage, 0, row + 8);
    high = affine_of(stage, 1, row), high_8 = affine_of(stage, 1, row + 8);
  }
#pragma unroll
  for (int i = 0; i < 4 * CHUNKS; ++i) {
    const int chunk = i / 4;
    const uint4 bytes = bytes_of(stage, row, chunk * 4 + t), bytes_8 = bytes_of(stage, row + 8, chunk * 4 + t);
    if (FORMAT == INT4) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {  // two bytes of one of the rows: the first ones of both, then the others
        const u32 bits = __byte_perm(word(k % 2 ? bytes_8 : bytes, i % 4), 0, k < 2 ? 0x4140 : 0x4342);
        a[i][k] = scaled_pair(bits, magic, k % 2 ? low_8 : low);
        a[OPERANDS - 4 * CHUNKS + i][k] = scaled_pair(bits >> 4, magic, k % 2 ? high_8 : high);
      }
    } else {
      widen(word(bytes, i % 4), magic, a[i][0], a[i][2]);
      widen(word(bytes_8, i % 4), magic, a[i][1], a[i][3]);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS + 32, RESIDENT)
    streamed_blocks(const __grid_constant__ Matrix w, const __grid_constant__ Matrix x, const Product p, u32 magic) {
  let_next_kernel_start();
  u8* const ring = dynamic_shared;
  float* const sums = (float*)ring;  // [ROWS, SUMS_STRIDE], once the ring is empty for good
  u64* const full = (u64*)(ring + BARRIERS_AT);
  u64* const empty = full + STAGES;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int part = PARTS > 1 ? rank_in_cluster() : 0, tile = blockIdx.x / PARTS;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      init(&full[i], 1);
      init(&empty[i], WARPS);
    }
    publish_barriers();
  }
  __syncthreads();
  if (warp == WARPS) {
    if (lane == 0) fill_ring(w, x, p, ring, full, empty, tile, part * SEGMENTS);
    return;
  }
  wait_for_previous_kernel();

  const int g = lane >> 2, t = lane & 3, row = warp * 16 + g;  // of the tile; a thread has row + 8, too
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
    if (n >= p.num_rows) continue;
    if (ROUNDED) x_scale[e] = p.x_scales[n];
    if (!GATED && p.residual) residual[e] = *(const uint2*)(p.residual + n * p.residual_stride + output);
  }

  Sum y[SUMS];
#pragma unroll
  for (int i = 0; i < SUMS; ++i) y[i] = 0;
  int slot = 0, parity = 0;
  auto release = [&](int slot) {
    __syncwarp();
    if (lane == 0) arrive(&empty[slot]);
  };
#pragma unroll 1
  for (int s = 0; s < SEGMENTS; ++s) {
    wait(&full[slot], parity);
    const u8* stage = ring + slot * STAGE_BYTES;
#if ROUNDED
    const u64 w_rows = rows_at(stage + warp / 4 * 64 * SEGMENT), x_rows = rows_at(stage + X_AT);
    begin_products(y);
#pragma unroll
    for (int i = 0; i < SEGMENT / 32; ++i) multiply_block(y, w_rows + 2 * i, x_rows + 2 * i);  // 32 bytes farther
    commit_products(y);
    end_older_products(y);  // a stage's are begun before those of the one before have ended
    if (s > 0) release(slot ? slot - 1 : STAGES - 1);
#else
    u32 a[OPERANDS][4];
    numbers_of(a, stage, row, t, magic);
    const u64 inputs = arranged_at(stage + X_AT);
    begin_products(y);
#pragma unroll
    for (int i = 0; i < OPERANDS; ++i) multiply_block(y, a[i], inputs + i * (32 * ROWS >> 4));
    commit_products(y);
    end_products(y);
    release(slot);
#endif
    if (++slot == STAGES) {
      slot = 0;
      parity ^= 1;
    }
  }
  end_products(y);  // of the last stage, if they are left

  meet(THREADS);  // everybody is done with the ring
#pragma unroll
  for (int i = 0; i < SUMS / 4; ++i) {
    float* to = sums + (8 * i + 2 * t) * SUMS_STRIDE;
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
    if (n >= p.num_rows || n >= (part + 1) * PART_ROWS) continue;
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
    *(uint2*)(p.out + n * p.out_stride + output) =
        make_uint2(narrowed[0] | (u32)narrowed[1] << 16, narrowed[2] | (u32)narrowed[3] << 16);
  }
  if (PARTS > 1) {  // a program that ended would take its sums along
    arrive_at_cluster();
    wait_for_cluster();
  }
}
