// How the threads of a step share its work and wait for each other.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// All threads of a step wait for each other. A wait lasts microseconds, so it spins for a moment; where the partner has
// lost its core to another program, yielding gives it this one, and at last the thread sleeps.
class Barrier {
  public:
    explicit Barrier(int num_threads) : num_threads_(num_threads) {}

    void wait() {
        if (num_threads_ == 1) return;
        const uint32_t generation = generation_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads_) {
            arrived_.store(0, std::memory_order_relaxed);
            generation_.fetch_add(1, std::memory_order_acq_rel);
            generation_.notify_all();
            return;
        }
        for (int spin = 0; spin < kSpins + kYields; ++spin) {
            if (generation_.load(std::memory_order_acquire) != generation) return;
            if (spin < kSpins)
                relax();
            else
                std::this_thread::yield();
        }
        generation_.wait(generation, std::memory_order_acquire);
    }

  private:
    static constexpr int kSpins = 300, kYields = 100;

    const int num_threads_;
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> generation_{0};
};

// Partition of [0, size) for one thread.
struct Range {
    int64_t begin, end;
    Range(int64_t size, int thread, int num_threads)
        : begin(size * thread / num_threads), end(size * (thread + 1) / num_threads) {}
};
