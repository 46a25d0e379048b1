// What streamed_rows.cu asks of a GPU, for a processor: a thread for a thread, and the PTX manual's words for the rest.
// One program at a time; copies are done at once, so what is tested is what is computed, not what waits for what.
#include <barrier>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define INSTRUCTIONS
#define __device__
#define __forceinline__ inline
#define __global__
#define __shared__ static
#define __launch_bounds__(...)

using std::min;
struct uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
struct Index {
  int x;
};
static thread_local Index threadIdx, blockIdx;
static Index gridDim;

constexpr int THREADS = WARPS * 32 + 32;
static uint8_t* dynamic_shared;
static uint64_t dynamic_size;
static bool out_of_bounds;
static std::unique_ptr<std::barrier<>> everybody, multipliers, warps[WARPS + 1];

inline void __syncthreads() { everybody->arrive_and_wait(); }
inline void __syncwarp() { warps[threadIdx.x / 32]->arrive_and_wait(); }
inline void meet() { multipliers->arrive_and_wait(); }
inline void let_next_kernel_start() {}
inline void wait_for_previous_kernel() {}
inline void publish_barriers() {}
inline uint64_t read_once() { return 0; }

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
inline void copy(uint8_t* to, const void* from, uint32_t bytes, unsigned long long* barrier) {
  std::lock_guard lock(mutex);
  const bool is_aligned = (uintptr_t)from % 16 == 0 && bytes % 16 == 0 && (to - dynamic_shared) % 16 == 0;
  if (!is_aligned || to < dynamic_shared || to + bytes > dynamic_shared + dynamic_size)
    out_of_bounds = true;
  else
    std::memcpy(to, from, bytes);
  Counter& c = counter(barrier);
  c.bytes -= bytes;
  settle(c);
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

// mma.m16n8k16: thread 4 g + t holds rows g and g + 8 of A and column g of B, numbers 2t, 2t + 1 and 2t + 8, 2t + 9 of each
static uint32_t fragments[WARPS][32][6];
inline void multiply(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  auto& of_warp = fragments[warp];
  const uint32_t mine[6] = {a0, a1, a2, a3, b0, b1};
  std::memcpy(of_warp[lane], mine, sizeof mine);
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * t + i % 2;
    for (int half = 0; half < 2; ++half)
      for (int other = 0; other < 4; ++other) {
        const uint32_t a = of_warp[4 * g + other][2 * half + i / 2], b = of_warp[4 * column + other][4 + half];
        sums[i] += bf16(a & 0xffff) * bf16(b & 0xffff) + bf16(a >> 16) * bf16(b >> 16);
      }
  }
  __syncwarp();
}

#include SOURCE

// Returns whether every copy was aligned and stayed inside the ring.
extern "C" bool run(const Product* product, uint32_t magic, int programs, uint64_t shared_bytes) {
  std::vector<uint8_t> memory(shared_bytes + 128);
  dynamic_shared = memory.data() + (128 - (uintptr_t)memory.data() % 128) % 128;
  dynamic_size = shared_bytes;
  out_of_bounds = false;
  gridDim.x = programs;
  for (int program = 0; program < programs; ++program) {
    std::memset(dynamic_shared, 0xff, shared_bytes);  // NaN
    everybody = std::make_unique<std::barrier<>>(THREADS);
    multipliers = std::make_unique<std::barrier<>>(WARPS * 32);
    for (auto& warp : warps) warp = std::make_unique<std::barrier<>>(32);
    std::vector<std::thread> threads;
    for (int i = 0; i < THREADS; ++i)
      threads.emplace_back([=] {
        threadIdx.x = i;
        blockIdx.x = program;
        streamed_rows(*product, magic);
      });
    for (auto& thread : threads) thread.join();
  }
  return !out_of_bounds;
}
