// What the kernels in CUDA C++ ask of a GPU, for a processor: a thread for a thread, and the PTX manual's words for the rest.
// One program or cluster at a time; copies are done at once, so what is tested is what is computed, not what waits for what.
#include <barrier>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#define INSTRUCTIONS
#define __device__
#define __forceinline__ inline
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

using std::min;
struct uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
struct uint2 {
  uint32_t x, y;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
struct float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Index {
  int x;
};
static thread_local Index threadIdx, blockIdx;
static Index gridDim;

#ifdef WARPGROUPS
constexpr int MOST_WARPS = 4 * WARPGROUPS;
#else
constexpr int MOST_WARPS = WARPS;
#endif

struct Row {  // of a warp's threads
  float values[32];
};

// What a program's threads share. Programs of a cluster run side by side.
struct Program {
  Row exchanged[MOST_WARPS];
  uint32_t fragments[MOST_WARPS][32][6];
  uint8_t* shared;
  uint64_t shared_size;
  int rank;
  std::unique_ptr<std::barrier<>> everybody, multipliers, cluster, warps[MOST_WARPS + 1];
};
static thread_local Program* program;
static std::vector<std::unique_ptr<Program>> programs;  // of the cluster
static thread_local std::optional<std::barrier<>::arrival_token> arrival;  // at the cluster's barrier, not waited for yet
static bool out_of_bounds;
#define dynamic_shared (program->shared)

inline void __syncthreads() { program->everybody->arrive_and_wait(); }
inline void __syncwarp() { program->warps[threadIdx.x / 32]->arrive_and_wait(); }
inline float other_lane(float v, int distance) {
  Row& of_warp = program->exchanged[threadIdx.x / 32];
  of_warp.values[threadIdx.x % 32] = v;
  __syncwarp();
  const float other = of_warp.values[threadIdx.x % 32 ^ distance];
  __syncwarp();
  return other;
}
inline float rsqrtf(float v) { return 1.f / std::sqrt(v); }
inline uint32_t halves(float low, float high) {
  const _Float16 both[2] = {(_Float16)low, (_Float16)high};
  uint32_t bits;
  std::memcpy(&bits, both, 4);
  return bits;
}
inline float float8(uint32_t bits) {  // e4m3
  const int exponent = bits >> 3 & 15, fraction = bits & 7;
  const float size = exponent ? std::ldexp(8.f + fraction, exponent - 10) : std::ldexp((float)fraction, -9);
  return bits & 0x80 ? -size : size;
}
inline void widen_float8(uint32_t four, uint32_t& first, uint32_t& second) {
  first = halves(float8(four & 0xff), float8(four >> 8 & 0xff));
  second = halves(float8(four >> 16 & 0xff), float8(four >> 24));
}
inline float larger(float a, float b) { return a != a || a > b ? a : b; }
inline void meet(int) { program->multipliers->arrive_and_wait(); }
inline void arrive_at_cluster() { arrival.emplace(programs[0]->cluster->arrive()); }
inline void wait_for_cluster() {
  programs[0]->cluster->wait(std::move(*arrival));
  arrival.reset();
}
inline void leave_cluster() {
  arrive_at_cluster();
  wait_for_cluster();
}
inline int uniform(int v) { return v; }
inline int rank_in_cluster() { return program->rank; }
inline void let_next_kernel_start() {}
inline void wait_for_previous_kernel() {}
inline void publish_barriers() {}
inline void end_reads() {}
inline uint64_t read_once() { return 0; }
inline uint32_t shared_address(const void* p) { return (const uint8_t*)p - program->shared; }
inline float4 read_from(int rank, const float* local) {
  float4 v;
  std::memcpy(&v, programs[rank]->shared + shared_address(local), 16);
  return v;
}

// --- barriers that count arrivals and bytes; a phase ends when neither is outstanding ---

struct Counter {
  int arrivals = 0, pending = 0, phase = 0;
  int64_t bytes = 0;
};
static std::mutex mutex;
static std::condition_variable changed;
static std::vector<std::pair<unsigned long long*, Counter>> counters;

inline Counter& counter(unsigned long long* barrier) {
  for (auto& [key, value] : counters)
    if (key == barrier) return value;
  return counters.emplace_back(barrier, Counter{}).second;
}
inline void settle(Counter& c) {
  if (c.pending == 0 && c.bytes == 0) {
    c.phase ^= 1;
    c.pending = c.arrivals;
    changed.notify_all();
  }
}
inline void init(unsigned long long* barrier, int arrivals) {
  std::lock_guard lock(mutex);
  counter(barrier) = {arrivals, arrivals, 0, 0};
}
inline void expect(unsigned long long* barrier, uint32_t bytes) {
  std::lock_guard lock(mutex);
  Counter& c = counter(barrier);
  c.bytes += bytes;
  c.pending -= 1;
  settle(c);
}
inline void arrive(unsigned long long* barrier) { expect(barrier, 0); }
inline void wait(unsigned long long* barrier, uint32_t parity) {
  std::unique_lock lock(mutex);
  changed.wait(lock, [&] { return counter(barrier).phase != (int)parity; });
}
inline void copy_piece(uint8_t* to, const void* from, uint32_t bytes) {
  const bool is_aligned = (uintptr_t)from % 16 == 0 && bytes % 16 == 0 && (to - program->shared) % 16 == 0;
  if (!is_aligned || to < program->shared || to + bytes > program->shared + program->shared_size)
    out_of_bounds = true;
  else
    std::memcpy(to, from, bytes);
}
inline void arrived(unsigned long long* barrier, uint32_t bytes) {
  Counter& c = counter(barrier);
  c.bytes -= bytes;
  settle(c);
}
inline void copy(uint8_t* to, const void* from, uint32_t bytes, unsigned long long* barrier) {
  std::lock_guard lock(mutex);
  copy_piece(to, from, bytes);
  arrived(barrier, bytes);
}
inline void copy_once(uint8_t* to, const void* from, uint32_t bytes, unsigned long long* barrier, uint64_t) {
  copy(to, from, bytes, barrier);
}

// --- numbers ---

inline float __uint_as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t __float_as_uint(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}
inline float __expf(float x) { return std::exp(x); }
inline float bf16(uint32_t bits) { return __uint_as_float(bits << 16); }
inline uint16_t narrow(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
  auto of_half = [&](int shift) {
    return (uint32_t)narrow(std::fma(bf16(a >> shift & 0xffff), bf16(b >> shift & 0xffff), bf16(c >> shift & 0xffff)));
  };
  return of_half(0) | of_half(16) << 16;
}
template <int>
inline void keep_registers() {}
template <int>
inline void take_registers() {}
template <uint32_t MASK>
inline uint32_t merge(uint32_t bits, uint32_t rest) {
  return (bits & MASK) | rest;
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = a | (uint64_t)b << 32;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= (uint32_t)(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}

template <uint32_t MASK>
inline uint32_t flip(uint32_t bits, uint32_t flipped) {
  return (bits & MASK) ^ flipped;
}
inline float half(uint32_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = exponent ? std::ldexp(1024.f + fraction, exponent - 25) : std::ldexp((float)fraction, -24);
  return bits & 0x8000 ? -size : size;
}

// mma: thread 4 g + t holds rows g and g + 8 of A and column g of B, words t and 4 + t of the 32 bytes of each
template <class Sum, class Product>
inline void multiply_fragments(Sum (&sums)[4], const uint32_t (&mine)[6], const Product& product_of_words) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  auto& of_warp = program->fragments[warp];
  std::memcpy(of_warp[lane], mine, sizeof mine);
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * t + i % 2;
    for (int half = 0; half < 2; ++half)
      for (int other = 0; other < 4; ++other) {
        const uint32_t a = of_warp[4 * g + other][2 * half + i / 2], b = of_warp[4 * column + other][4 + half];
        sums[i] += product_of_words(a, b);
      }
  }
  __syncwarp();
}
inline void multiply(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  multiply_fragments(sums, {a0, a1, a2, a3, b0, b1}, [](uint32_t a, uint32_t b) {
    return bf16(a & 0xffff) * bf16(b & 0xffff) + bf16(a >> 16) * bf16(b >> 16);
  });
}
inline void multiply_halves(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  multiply_fragments(sums, {a0, a1, a2, a3, b0, b1}, [](uint32_t a, uint32_t b) {
    return half(a & 0xffff) * half(b & 0xffff) + half(a >> 16) * half(b >> 16);
  });
}
inline void multiply_bytes(int (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  multiply_fragments(sums, {a0, a1, a2, a3, b0, b1}, [](uint32_t a, uint32_t b) {
    int sum = 0;
    for (int i = 0; i < 32; i += 8) sum += (int8_t)(a >> i) * (int8_t)(b >> i);
    return sum;
  });
}

// A tensor map: a matrix of bytes, copied a box at a time, whose pieces of 16 bytes change places with the row.
struct Matrix {
  const uint8_t* start;
  uint64_t num_rows, row_bytes, stride, box_rows, box_bytes, unused[10];
};
inline void copy_box(uint8_t* to, const Matrix& m, int column, int row, unsigned long long* barrier) {
  static const uint8_t zeros[16] alignas(16) = {};
  std::lock_guard lock(mutex);
  out_of_bounds |= column + m.box_bytes > m.row_bytes || shared_address(to) % (m.box_bytes == 32 ? 128 : 1024);
  for (int r = 0; r < (int)m.box_rows; ++r)
    for (int i = 0; i < (int)m.box_bytes / 16; ++i) {
      const int place = i ^ (m.box_bytes == 128 ? r & 7 : m.box_bytes == 64 ? r / 2 & 3 : 0);
      const uint8_t* from = m.start + (row + r) * m.stride + column + i * 16;
      copy_piece(to + r * m.box_bytes + place * 16, row + r < (int)m.num_rows ? from : zeros, 16);
    }
  arrived(barrier, m.box_rows * m.box_bytes);
}
inline void copy_box_once(uint8_t* to, const Matrix& m, int column, int row, unsigned long long* barrier, uint64_t) {
  copy_box(to, m, column, row, barrier);
}

#include SOURCE

#ifdef WARPGROUPS  // streamed_blocks.cu
constexpr int THREADS_OF_A_PROGRAM = THREADS + COPYING_THREADS;
constexpr int CLUSTER = PARTS;

// wgmma: of a warpgroup's 64 rows a warp has 16, thread 4 g + t the sums of rows g and g + 8. Operands in memory are rows of 128
// bytes, whose pieces of 16 have changed places, in blocks of 8 whose distance a descriptor tells. An operand in registers: words
// t and 4 + t of 32 bytes of each row.
static uint32_t first_operands[PARTS][WARPS][32][4];
inline float number(const uint8_t* from, int i) {
  if (!ROUNDED) return bf16(((const uint16_t*)from)[i]);
  if (FORMAT == INT8) return ((const int8_t*)from)[i];
  return float8(from[i]);
}
inline const uint8_t* word_of(u64 matrix, int row, int word) {  // of eight
  uint64_t at = (matrix & 0x3fff) * 16 + row / 8 * ((matrix >> 32 & 0x3fff) * 16) + row % 8 * 128 + word * 4;
  at ^= (at >> 7 & 7) << 4;
  if (at + 4 > program->shared_size || matrix >> 62 != 1) out_of_bounds = true, at = 0;
  return program->shared + at;
}
template <class Word>
inline void multiply_words(Sum (&sums)[SUMS], u64 x, const Word& word_of_w) {
  for (int n = 0; n < SUMS; ++n)
    for (int word = 0; word < 8; ++word)
      for (int i = 0; i < (ROUNDED ? 4 : 2); ++i) {
        const int column = n / 4 * 8 + threadIdx.x % 4 * 2 + n % 2;
        sums[n] += (Sum)(number(word_of_w(n / 2 % 2, word), i) * number(word_of(x, column, word), i));
      }
}
void multiply_block(Sum (&sums)[SUMS], const u32 (&w)[4], u64 x) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  auto& of_warp = first_operands[program->rank][warp];
  std::memcpy(of_warp[lane], w, 16);
  __syncwarp();
  multiply_words(sums, x, [&](int half, int word) {
    return (const uint8_t*)&of_warp[lane / 4 * 4 + word % 4][word / 4 * 2 + half];
  });
  __syncwarp();
}
void multiply_first(Sum (&sums)[SUMS], const u32 (&w)[4], u64 x) {
  for (Sum& sum : sums) sum = 0;
  multiply_block(sums, w, x);
}
void multiply_block(Sum (&sums)[SUMS], u64 w, u64 x) {
  const int row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
  multiply_words(sums, x, [&](int half, int word) { return word_of(w, row + 8 * half, word); });
}
void begin_products(Sum (&)[SUMS]) {}
void commit_products(Sum (&)[SUMS]) {}
void end_products(Sum (&)[SUMS]) {}
void end_older_products(Sum (&)[SUMS]) {}
#else
constexpr int THREADS_OF_A_PROGRAM = WARPS * 32 + 32;
constexpr int CLUSTER = 1;
#endif

// Returns whether every copy was aligned and stayed inside the program's memory.
static bool run_programs(int num_programs, uint64_t shared_bytes, const std::function<void()>& kernel) {
  out_of_bounds = false;
  gridDim.x = num_programs;
  for (int first = 0; first < num_programs; first += CLUSTER) {
    std::vector<std::vector<uint8_t>> memory(CLUSTER, std::vector<uint8_t>(shared_bytes + 1024, 0xff));  // NaN
    std::vector<std::thread> threads;
    programs.clear();
    counters.clear();
    for (int rank = 0; rank < CLUSTER; ++rank) {
      auto made = std::make_unique<Program>();
      made->shared = memory[rank].data() + (1024 - (uintptr_t)memory[rank].data() % 1024) % 1024;
      made->shared_size = shared_bytes;
      made->rank = rank;
      made->everybody = std::make_unique<std::barrier<>>(THREADS_OF_A_PROGRAM);
      made->multipliers = std::make_unique<std::barrier<>>(WARPS * 32);
      made->cluster = std::make_unique<std::barrier<>>(THREADS_OF_A_PROGRAM * CLUSTER);
      for (auto& warp : made->warps) warp = std::make_unique<std::barrier<>>(32);
      programs.push_back(std::move(made));
    }
    for (int rank = 0; rank < CLUSTER; ++rank)
      for (int i = 0; i < THREADS_OF_A_PROGRAM; ++i)
        threads.emplace_back([=, &kernel] {
          program = programs[rank].get();
          threadIdx.x = i;
          blockIdx.x = first + rank;
          kernel();
          if (arrival) wait_for_cluster();
          programs[0]->cluster->arrive_and_drop();
        });
    for (auto& thread : threads) thread.join();
  }
  return !out_of_bounds;
}


#ifdef WARPGROUPS
extern "C" bool run(const Matrix* w, const Matrix* x, const Product* product, uint32_t magic, int num_programs, uint64_t shared_bytes) {
  return run_programs(num_programs, shared_bytes, [=] { streamed_blocks(*w, *x, *product, magic); });
}
#else
extern "C" bool run(const Matrix* scales, const Matrix* offsets, const Product* product, uint32_t magic, int num_programs,
                    uint64_t shared_bytes) {
  return run_programs(num_programs, shared_bytes, [=] { streamed_rows(*scales, *offsets, *product, magic); });
}
#endif
