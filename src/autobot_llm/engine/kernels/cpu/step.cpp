// One forward step of a Llama-family decoder over a paged cache, on CPU cores. Knows packed weights, packed tokens and
// cache blocks; knows nothing of scheduling or sampling. engine/eager.py is its slow twin.
//
// Every output element is computed by one thread in one fixed order of operations, whatever the number of rows, of
// threads or of neighbours in the batch. So a request's logits are the same bits alone and among others, with and
// without prefix hits, chunking and preemption. Do not build with -ffast-math.
//
// Weights may be bfloat16: widening one to float32 is exact, so they are stored as they are in the checkpoint (half
// the bytes of a memory-bound step) and all arithmetic is float32.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// --- vectors ---------------------------------------------------------------------------------------------------------
// A panel of a weight matrix is kPanel output columns wide and is held in kVectors registers of kLanes floats.
// kRows x kVectors accumulators, a panel's row and one broadcast fill the register file.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kVectors = 4, kRows = 6, kPanelsForOneRow = 1;
#else
constexpr int kLanes = 8, kVectors = 2, kRows = 6, kPanelsForOneRow = 4;
#endif
constexpr int kPanel = kLanes * kVectors;
constexpr int kBlock = 16;  // tokens in a cache block; also the lanes of a vector of scores

typedef float Float __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Half __attribute__((vector_size(kLanes * 2)));
typedef uint32_t Word __attribute__((vector_size(kLanes * 4)));
typedef float Float16 __attribute__((vector_size(64)));
typedef int32_t Int16 __attribute__((vector_size(64)));

template <typename V, typename T>
inline V load(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <typename V, typename T>
inline void store(T* p, const V& v) {
    std::memcpy(p, &v, sizeof v);
}

inline Float load_weights(const float* p) { return load<Float>(p); }

inline Float load_weights(const uint16_t* p) {
    Word bits = __builtin_convertvector(load<Half>(p), Word) << 16;
    Float v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}

// e^x to about 1 unit in the last place (Cody-Waite reduction, degree-6 polynomial); 0 below -87.
inline Float16 exp16(Float16 x) {
    const Float16 zero = {};
    const Float16 clamped = x < -87.0f ? zero - 87.0f : (x > 88.0f ? zero + 88.0f : x);
    const Float16 magic = zero + 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
    const Float16 n = (clamped * 1.44269504088896341f + magic) - magic;
    const Float16 r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
    Float16 p = zero + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const Int16 exponent = (__builtin_convertvector(n, Int16) + 127) << 23;
    Float16 scale;
    std::memcpy(&scale, &exponent, sizeof scale);
    return x < -87.0f ? zero : p * scale;
}

inline float sum16(const Float16& v) {
    float half[8], total = 0.0f;
    for (int i = 0; i < 8; ++i) half[i] = v[i] + v[i + 8];
    for (int i = 0; i < 8; ++i) total += half[i];
    return total;
}

// --- threads ---------------------------------------------------------------------------------------------------------

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

}  // namespace

// --- the interface to Python (compiled.py mirrors these) -------------------------------------------------------------
extern "C" {

// A weight matrix of n outputs and k inputs: ceil(n / kPanel) panels, each [k][kPanel]; bias may be null.
struct Linear {
    const void* weight;
    const float* bias;
    int64_t n, k;
};

struct Layer {
    Linear qkv, o, gate_up, down;  // gate_up's panels hold kPanel / 2 gates, then their kPanel / 2 ups
    const float *input_norm, *post_norm, *q_norm, *k_norm;  // q_norm, k_norm may be null
    int64_t window;  // sliding window in tokens, 0 = the whole context
};

struct Config {
    int64_t hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_size, num_blocks;
    int64_t max_tokens;  // in one step
    int64_t bf16_weights;
    double rms_norm_eps;
    const Layer* layers;
    const void* embedding;  // [vocabulary][hidden], of the weights' type
    const float* norm;
    Linear lm_head;
    const float *cos, *sin;  // [positions][head_size / 2]
    float *keys, *values;    // [layer][block][kv head][head_size][kBlock], [layer][block][kv head][kBlock][head_size]
};

struct Batch {
    const int64_t *ids, *slots, *logit_rows;
    const int32_t *positions, *query_starts, *context_lens, *block_tables;
    int64_t num_tokens, num_sequences, max_blocks, num_logit_rows;
    float* logits;  // [logit row][vocabulary]
};
}

namespace {

int64_t padded(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }

enum class Write { kStore, kAdd, kGate };

// One tile: MR rows of x times GP adjacent panels. Each output is a single chain over k.
template <typename W, int MR, int GP, Write mode>
void tile(const Linear& linear, int64_t panel, const float* x, int64_t ldx, float* y, int64_t ldy) {
    const int64_t k_size = linear.k, stride = k_size * kPanel;
    const W* w = static_cast<const W*>(linear.weight) + panel * stride;
    Float acc[MR][GP * kVectors] = {};
    for (int64_t k = 0; k < k_size; ++k, w += kPanel) {
        Float weights[GP * kVectors];
#pragma GCC unroll 16
        for (int v = 0; v < GP * kVectors; ++v)
            weights[v] = load_weights(w + (v / kVectors) * stride + (v % kVectors) * kLanes);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) {
            const float value = x[m * ldx + k];
#pragma GCC unroll 16
            for (int v = 0; v < GP * kVectors; ++v) acc[m][v] += weights[v] * value;
        }
    }
    for (int g = 0; g < GP; ++g) {
        const int64_t column = (panel + g) * kPanel;
        for (int m = 0; m < MR; ++m) {
            float out[kPanel];
            for (int v = 0; v < kVectors; ++v) store(out + v * kLanes, acc[m][g * kVectors + v]);
            if (linear.bias)
                for (int i = 0; i < kPanel; ++i) out[i] += linear.bias[column + i];
            float* row = y + m * ldy;
            const int64_t width = std::min<int64_t>(kPanel, linear.n - column);
            if constexpr (mode == Write::kStore) {
                std::memcpy(row + column, out, width * sizeof(float));
            } else if constexpr (mode == Write::kAdd) {
                for (int64_t i = 0; i < width; ++i) row[column + i] += out[i];
            } else {
                constexpr int half = kPanel / 2;
                float gate[16] = {}, act[16];
                for (int i = 0; i < half; i += 16) {
                    const int count = std::min(16, half - i);
                    std::memcpy(gate, out + i, count * sizeof(float));
                    const Float16 g16 = load<Float16>(gate);
                    store(act, g16 / (1.0f + exp16(-g16)));
                    for (int j = 0; j < count; ++j) row[column / 2 + i + j] = act[j] * out[half + i + j];
                }
            }
        }
    }
}

template <typename W, Write mode>
void rows_of_panel(const Linear& linear, int64_t panel, const float* x, int64_t ldx, int64_t num_rows, float* y,
                   int64_t ldy) {
    int64_t m = 0;
    auto at = [&](auto rows) {
        tile<W, decltype(rows)::value, 1, mode>(linear, panel, x + m * ldx, ldx, y + m * ldy, ldy);
        m += decltype(rows)::value;
    };
    // Even tiles are quicker than full ones and a remainder: 16 rows as 6, 5, 5 and not as 6, 6, 4.
    int64_t num_tiles = (num_rows + kRows - 1) / kRows;
    for (; num_tiles > 0; --num_tiles) {
        switch ((num_rows - m + num_tiles - 1) / num_tiles) {
            case 1: at(std::integral_constant<int, 1>{}); break;
            case 2: at(std::integral_constant<int, 2>{}); break;
            case 3: at(std::integral_constant<int, 3>{}); break;
            case 4: at(std::integral_constant<int, 4>{}); break;
            case 5: at(std::integral_constant<int, 5>{}); break;
            default: at(std::integral_constant<int, kRows>{}); break;
        }
    }
}

// Partition of [0, size) for one thread.
struct Range {
    int64_t begin, end;
    Range(int64_t size, int thread, int num_threads)
        : begin(size * thread / num_threads), end(size * (thread + 1) / num_threads) {}
};

template <typename W, Write mode>
void linear_rows(const Linear& linear, const float* x, int64_t ldx, int64_t num_rows, float* y, int64_t ldy,
                 int thread, int num_threads) {
    Range mine(padded(linear.n) / kPanel, thread, num_threads);
    int64_t panel = mine.begin;
    if (num_rows == 1)
        for (; panel + kPanelsForOneRow <= mine.end; panel += kPanelsForOneRow)
            tile<W, 1, kPanelsForOneRow, mode>(linear, panel, x, ldx, y, ldy);
    for (; panel < mine.end; ++panel) rows_of_panel<W, mode>(linear, panel, x, ldx, num_rows, y, ldy);
}

// Zhang & Sennrich 2019, computed in float32 as transformers does.
void rms_norm(const float* x, const float* weight, int64_t size, double eps, float* out) {
    Float16 squares = {};
    int64_t i = 0;
    for (; i + 16 <= size; i += 16) {
        const Float16 v = load<Float16>(x + i);
        squares += v * v;
    }
    float total = sum16(squares);
    for (; i < size; ++i) total += x[i] * x[i];
    const float scale = 1.0f / std::sqrt(total / static_cast<float>(size) + static_cast<float>(eps));
    for (i = 0; i < size; ++i) out[i] = weight[i] * (x[i] * scale);
}

void rotate(float* head, const float* cos, const float* sin, int64_t half) {
    for (int64_t i = 0; i < half; ++i) {
        const float a = head[i], b = head[i + half];
        head[i] = a * cos[i] - b * sin[i];
        head[i + half] = b * cos[i] + a * sin[i];
    }
}

// Scores of NG query heads against one block's keys: lanes are the block's tokens.
template <int NG>
void score_block(const float* q, int64_t head_size, const float* keys, Float16* scores) {
    Float16 even[NG] = {}, odd[NG] = {};
    for (int64_t d = 0; d < head_size; d += 2) {
        const Float16 k0 = load<Float16>(keys + d * kBlock), k1 = load<Float16>(keys + (d + 1) * kBlock);
#pragma GCC unroll 4
        for (int g = 0; g < NG; ++g) {
            even[g] += k0 * q[g * head_size + d];
            odd[g] += k1 * q[g * head_size + d + 1];
        }
    }
    for (int g = 0; g < NG; ++g) scores[g] = even[g] + odd[g];
}

// Adds one block's values, weighted, to NV vectors of NG heads' outputs; token by token, in order.
template <int NG, int NV>
void weigh_block(const float* weights, int64_t ld_weights, const float* values, int64_t head_size, int num_tokens,
                 float* out) {
    Float16 acc[NG][NV];
    for (int g = 0; g < NG; ++g)
        for (int v = 0; v < NV; ++v) acc[g][v] = load<Float16>(out + g * head_size + v * 16);
    for (int t = 0; t < num_tokens; ++t) {
        Float16 value[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) value[v] = load<Float16>(values + t * head_size + v * 16);
#pragma GCC unroll 4
        for (int g = 0; g < NG; ++g) {
            const float weight = weights[g * ld_weights + t];
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) acc[g][v] += value[v] * weight;
        }
    }
    for (int g = 0; g < NG; ++g)
        for (int v = 0; v < NV; ++v) store(out + g * head_size + v * 16, acc[g][v]);
}

class Model {
  public:
    Model(const Config& config, int num_threads)
        : c_(config), layers_(config.layers, config.layers + config.num_layers), num_threads_(num_threads),
          barrier_(num_threads), counters_(config.num_layers), scratch_(num_threads) {
        const int64_t heads = c_.num_heads + 2 * c_.num_kv_heads;
        ld_qkv_ = padded(heads * c_.head_size);
        ld_act_ = padded(2 * c_.intermediate_size) / 2;
        hidden_.resize(c_.max_tokens * c_.hidden_size);
        normed_.resize(c_.max_tokens * c_.hidden_size);
        qkv_.resize(c_.max_tokens * ld_qkv_);
        attended_.resize(c_.max_tokens * c_.num_heads * c_.head_size);
        act_.resize(c_.max_tokens * ld_act_);
        for (auto& s : scratch_) s.normed.resize(kReplicatedRows * c_.hidden_size);
        for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this, i] { work(i); });
    }

    ~Model() {
        stop_.store(true, std::memory_order_release);
        job_.fetch_add(1, std::memory_order_acq_rel);
        job_.notify_all();
        for (auto& worker : workers_) worker.join();
    }

    void run(const Batch& batch) {
        batch_ = batch;
        for (auto& counter : counters_) counter.store(0, std::memory_order_relaxed);
        all_single_ = batch.num_tokens == batch.num_sequences;
        sequence_of_.resize(batch.num_tokens);
        longest_ = 0;
        for (int64_t s = 0; s < batch.num_sequences; ++s) {
            longest_ = std::max<int64_t>(longest_, batch.context_lens[s]);
            for (int64_t t = batch.query_starts[s]; t < batch.query_starts[s + 1]; ++t) sequence_of_[t] = s;
        }
        if (num_threads_ > 1) {
            job_.fetch_add(1, std::memory_order_acq_rel);
            job_.notify_all();
        }
        forward(0);
    }

  private:
    static constexpr int64_t kReplicatedRows = 4;

    struct Scratch {
        std::vector<float> normed, scores, q;
    };

    void work(int thread) {
        uint32_t seen = 0;
        for (;;) {
            job_.wait(seen, std::memory_order_acquire);
            seen = job_.load(std::memory_order_acquire);
            if (stop_.load(std::memory_order_acquire)) return;
            forward(thread);
        }
    }

    void forward(int thread) {
        if (c_.bf16_weights)
            forward_as<uint16_t>(thread);
        else
            forward_as<float>(thread);
    }

    // The rows' norms: for a few rows every thread computes its own copy, which is cheaper than waiting for another's.
    const float* normalize(const float* weight, int64_t num_rows, int thread) {
        const bool replicate = num_rows <= kReplicatedRows;
        float* out = replicate ? scratch_[thread].normed.data() : normed_.data();
        Range mine(num_rows, replicate ? 0 : thread, replicate ? 1 : num_threads_);
        for (int64_t t = mine.begin; t < mine.end; ++t)
            rms_norm(&hidden_[t * c_.hidden_size], weight, c_.hidden_size, c_.rms_norm_eps, out + t * c_.hidden_size);
        if (!replicate) barrier_.wait();
        return out;
    }

    template <typename W>
    void forward_as(int thread) {
        const int64_t rows = batch_.num_tokens, width = c_.hidden_size;
        const W* embedding = static_cast<const W*>(c_.embedding);
        Range tokens(rows, thread, num_threads_);
        for (int64_t t = tokens.begin; t < tokens.end; ++t) embed(embedding + batch_.ids[t] * width, &hidden_[t * width]);
        barrier_.wait();
        for (int64_t l = 0; l < c_.num_layers; ++l) {
            const Layer& layer = layers_[l];
            const float* x = normalize(layer.input_norm, rows, thread);
            linear_rows<W, Write::kStore>(layer.qkv, x, width, rows, qkv_.data(), ld_qkv_, thread, num_threads_);
            barrier_.wait();
            attention(l, thread);
            barrier_.wait();
            linear_rows<W, Write::kAdd>(layer.o, attended_.data(), c_.num_heads * c_.head_size, rows, hidden_.data(),
                                        width, thread, num_threads_);
            barrier_.wait();
            x = normalize(layer.post_norm, rows, thread);
            linear_rows<W, Write::kGate>(layer.gate_up, x, width, rows, act_.data(), ld_act_, thread, num_threads_);
            barrier_.wait();
            linear_rows<W, Write::kAdd>(layer.down, act_.data(), ld_act_, rows, hidden_.data(), width, thread,
                                        num_threads_);
            barrier_.wait();
        }
        const int64_t num_logits = batch_.num_logit_rows;
        Range mine(num_logits, thread, num_threads_);
        for (int64_t r = mine.begin; r < mine.end; ++r)
            rms_norm(&hidden_[batch_.logit_rows[r] * width], c_.norm, width, c_.rms_norm_eps, &normed_[r * width]);
        barrier_.wait();
        linear_rows<W, Write::kStore>(c_.lm_head, normed_.data(), width, num_logits, batch_.logits, c_.lm_head.n, thread,
                                      num_threads_);
        barrier_.wait();
    }

    void embed(const float* row, float* out) { std::memcpy(out, row, c_.hidden_size * sizeof(float)); }

    void embed(const uint16_t* row, float* out) {
        for (int64_t i = 0; i < c_.hidden_size; ++i) {
            const uint32_t bits = static_cast<uint32_t>(row[i]) << 16;
            std::memcpy(out + i, &bits, sizeof bits);
        }
    }

    // Work items are (token, key/value head) pairs. Where each sequence has one token, an item writes its own key and
    // attends at once; otherwise all keys of the step are written first.
    void attention(int64_t l, int thread) {
        const int64_t num_items = batch_.num_tokens * c_.num_kv_heads;
        const int64_t grain = all_single_ ? 1 : 4;
        Scratch& scratch = scratch_[thread];
        const int64_t group = c_.num_heads / c_.num_kv_heads;
        scratch.scores.resize(group * (longest_ + kBlock));
        scratch.q.resize(group * c_.head_size);
        if (!all_single_) {
            Range mine(num_items, thread, num_threads_);
            for (int64_t i = mine.begin; i < mine.end; ++i) write_cache(l, i / c_.num_kv_heads, i % c_.num_kv_heads);
            barrier_.wait();
        }
        for (;;) {
            const int64_t begin = counters_[l].fetch_add(grain, std::memory_order_relaxed);
            if (begin >= num_items) break;
            for (int64_t i = begin; i < std::min(begin + grain, num_items); ++i) {
                const int64_t token = i / c_.num_kv_heads, head = i % c_.num_kv_heads;
                if (all_single_) write_cache(l, token, head);
                attend(l, token, head, scratch);
            }
        }
    }

    float* key_block(int64_t l, int64_t block, int64_t head) {
        return c_.keys + ((l * c_.num_blocks + block) * c_.num_kv_heads + head) * c_.head_size * kBlock;
    }

    float* value_block(int64_t l, int64_t block, int64_t head) {
        return c_.values + ((l * c_.num_blocks + block) * c_.num_kv_heads + head) * c_.head_size * kBlock;
    }

    void write_cache(int64_t l, int64_t token, int64_t head) {
        const int64_t size = c_.head_size, half = size / 2, position = batch_.positions[token];
        float* key = &qkv_[token * ld_qkv_ + (c_.num_heads + head) * size];
        const float* value = key + c_.num_kv_heads * size;
        if (layers_[l].k_norm) rms_norm(key, layers_[l].k_norm, size, c_.rms_norm_eps, key);
        rotate(key, c_.cos + position * half, c_.sin + position * half, half);
        const int64_t block = batch_.slots[token] / kBlock, offset = batch_.slots[token] % kBlock;
        float* keys = key_block(l, block, head) + offset;
        for (int64_t d = 0; d < size; ++d) keys[d * kBlock] = key[d];
        std::memcpy(value_block(l, block, head) + offset * size, value, size * sizeof(float));
    }

    void attend(int64_t l, int64_t token, int64_t head, Scratch& scratch) {
        const int64_t group = c_.num_heads / c_.num_kv_heads, size = c_.head_size, half = size / 2;
        const int64_t position = batch_.positions[token];
        const float* rotation_cos = c_.cos + position * half;
        const float* rotation_sin = c_.sin + position * half;
        const float scale = 1.0f / std::sqrt(static_cast<float>(size));
        float* q = scratch.q.data();
        std::memcpy(q, &qkv_[token * ld_qkv_ + head * group * size], group * size * sizeof(float));
        for (int64_t g = 0; g < group; ++g) {
            float* one = q + g * size;
            if (layers_[l].q_norm) rms_norm(one, layers_[l].q_norm, size, c_.rms_norm_eps, one);
            rotate(one, rotation_cos, rotation_sin, half);
            for (int64_t d = 0; d < size; ++d) one[d] *= scale;
        }
        const int64_t length = position + 1, window = layers_[l].window;
        const int64_t first = window ? std::max<int64_t>(0, length - window) : 0;
        const int32_t* table = batch_.block_tables + sequence_of_[token] * batch_.max_blocks;
        float* out = &attended_[(token * c_.num_heads + head * group) * size];
        for (int64_t g = 0; g < group; g += 4) {
            float* o = out + g * size;
            switch (std::min<int64_t>(4, group - g)) {
                case 1: attend_group<1>(l, head, q + g * size, table, first, length, scratch.scores.data(), o); break;
                case 2: attend_group<2>(l, head, q + g * size, table, first, length, scratch.scores.data(), o); break;
                case 3: attend_group<3>(l, head, q + g * size, table, first, length, scratch.scores.data(), o); break;
                default: attend_group<4>(l, head, q + g * size, table, first, length, scratch.scores.data(), o);
            }
        }
    }

    // NG query heads of one token over tokens [first, length): scores, softmax, weighted values.
    template <int NG>
    void attend_group(int64_t l, int64_t head, const float* q, const int32_t* table, int64_t first, int64_t length,
                      float* scores, float* out) {
        const int64_t size = c_.head_size, first_block = first / kBlock, end_block = (length + kBlock - 1) / kBlock;
        const int64_t ld = end_block * kBlock;
        const Int16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const Float16 minus_infinity = Float16{} - std::numeric_limits<float>::infinity();
        Float16 largest[NG], total[NG] = {}, block_scores[NG];
        for (int g = 0; g < NG; ++g) largest[g] = minus_infinity;
        for (int64_t b = first_block; b < end_block; ++b) {
            score_block<NG>(q, size, key_block(l, table[b], head), block_scores);
            const Int16 token = lane + static_cast<int32_t>(b * kBlock);
            const Int16 inside = (token >= static_cast<int32_t>(first)) & (token < static_cast<int32_t>(length));
            for (int g = 0; g < NG; ++g) {
                const Float16 masked = inside ? block_scores[g] : minus_infinity;
                largest[g] = masked > largest[g] ? masked : largest[g];
                store(scores + g * ld + b * kBlock, masked);
            }
        }
        for (int g = 0; g < NG; ++g) {
            float top = largest[g][0];
            for (int i = 1; i < kBlock; ++i) top = std::max(top, largest[g][i]);
            for (int64_t b = first_block; b < end_block; ++b) {
                float* at = scores + g * ld + b * kBlock;
                const Float16 weight = exp16(load<Float16>(at) - top);
                total[g] += weight;
                store(at, weight);
            }
        }
        std::fill(out, out + NG * size, 0.0f);
        for (int64_t b = first_block; b < end_block; ++b) {
            const float* values = value_block(l, table[b], head);
            const int num_tokens = static_cast<int>(std::min<int64_t>(kBlock, length - b * kBlock));
            int64_t d = 0;
            for (; d + 64 <= size; d += 64)
                weigh_block<NG, 4>(scores + b * kBlock, ld, values + d, size, num_tokens, out + d);
            for (; d < size; d += 16)
                weigh_block<NG, 1>(scores + b * kBlock, ld, values + d, size, num_tokens, out + d);
        }
        for (int g = 0; g < NG; ++g) {
            const float denominator = sum16(total[g]);
            for (int64_t d = 0; d < size; ++d) out[g * size + d] /= denominator;
        }
    }

    const Config c_;
    const std::vector<Layer> layers_;
    const int num_threads_;
    Barrier barrier_;
    std::vector<std::atomic<int64_t>> counters_;
    std::vector<Scratch> scratch_;
    std::vector<float> hidden_, normed_, qkv_, attended_, act_;
    std::vector<int64_t> sequence_of_;
    int64_t ld_qkv_ = 0, ld_act_ = 0, longest_ = 0;
    bool all_single_ = false;
    Batch batch_{};
    std::atomic<uint32_t> job_{0};
    std::atomic<bool> stop_{false};
    std::vector<std::thread> workers_;
};

}  // namespace

extern "C" {

int64_t autobot_panel_width() { return kPanel; }

void* autobot_create(const Config* config, int64_t num_threads) {
    try {
        return new Model(*config, static_cast<int>(num_threads));
    } catch (...) {  // out of memory, or no more threads: the caller reports it
        return nullptr;
    }
}

void autobot_run(void* model, const Batch* batch) { static_cast<Model*>(model)->run(*batch); }

void autobot_destroy(void* model) { delete static_cast<Model*>(model); }
}
