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
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "attention.h"
#include "linear.h"
#include "threads.h"
#include "vectors.h"

// --- the interface to Python (compiled.py mirrors these) -------------------------------------------------------------
extern "C" {

struct Layer {
    Linear qkv, o, gate_up, down;  // gate_up's panels hold kPanel / 2 gates, then their kPanel / 2 ups
    const float *input_norm, *post_norm, *q_norm, *k_norm;  // q_norm, k_norm may be null
    int64_t window;  // sliding window in tokens, 0 = the whole context
};

struct Config {
    int64_t hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_size, num_blocks;
    int64_t max_tokens;  // in one step
    int64_t bf16_weights;  // of the embedding and the head
    int64_t matrix_bits;   // of the layers' matrices: 8 (int8), 4 (Nibbles), else they are as the embedding is
    double rms_norm_eps;
    const Layer* layers;
    const void* embedding;  // [vocabulary][hidden], of the weights' type
    const float* norm;
    Linear lm_head;
    const float *cos, *sin;  // [positions][head_size / 2]
    // See PagedCache; scales are null where `stored` is 0.
    void *keys, *values;
    uint16_t *key_scales, *value_scales;
    float* attention;
    int64_t stored;
};

struct Batch {
    const int64_t *ids, *slots, *logit_rows;
    const int32_t *positions, *query_starts, *context_lens, *block_tables;
    int64_t num_tokens, num_sequences, max_blocks, num_logit_rows;
    float* logits;  // [logit row][vocabulary], or null: they are not wanted
    float* hidden;  // [logit row][hidden], after the last norm, or null
    float* streams;  // [token][stream layer][hidden], what these layers read of every token, or null
    const int64_t* stream_layers;  // num_layers is what the last layer leaves
    int64_t num_stream_layers;
    const uint64_t* tree_masks;  // [token], or null; 0: a token sees all before it. See StepBatch in batching/plan.py
};
}

namespace {

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

class Model {
  public:
    Model(const Config& config, int num_threads)
        : c_(config),
          cache_{config.keys,       config.values,     config.key_scales,   config.value_scales, config.attention,
                 config.num_blocks, config.num_kv_heads, config.head_size, static_cast<Stored>(config.stored)},
          layers_(config.layers, config.layers + config.num_layers),
          num_threads_(num_threads),
          barrier_(num_threads),
          counters_(config.num_layers),
          scratch_(num_threads) {
        const int64_t heads = c_.num_heads + 2 * c_.num_kv_heads;
        ld_qkv_ = padded(heads * c_.head_size);
        ld_act_ = padded(2 * c_.intermediate_size) / 2;
        hidden_.resize(c_.max_tokens * c_.hidden_size);
        normed_.resize(c_.max_tokens * c_.hidden_size);
        qkv_.resize(c_.max_tokens * ld_qkv_);
        attended_.resize(c_.max_tokens * c_.num_heads * c_.head_size);
        act_.resize(c_.max_tokens * ld_act_);
        for (auto& scratch : scratch_) {
            scratch.normed.resize(kReplicatedRows * c_.hidden_size);
            scratch.q.resize(group() * c_.head_size);
            if (c_.stored) scratch.wide.resize(kBlock * c_.head_size);
            scratch.path_keys.resize(kPathBlocks * kBlock * c_.head_size);
            scratch.path_values.resize(kPathBlocks * kBlock * c_.head_size);
        }
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
        // All memory is taken here, where a failure can still be reported.
        for (auto& scratch : scratch_) scratch.scores.resize(group() * (longest_ + kBlock));
        if (num_threads_ > 1) {
            job_.fetch_add(1, std::memory_order_acq_rel);
            job_.notify_all();
        }
        forward(0);
    }

    // One after the other; no slot is written that is yet to be read.
    void move(const int64_t* from, const int64_t* to, int64_t count) {
        for (int64_t l = 0; l < c_.num_layers; ++l)
            for (int64_t i = 0; i < count; ++i)
                for (int64_t head = 0; head < c_.num_kv_heads; ++head) cache_.move(l, head, from[i], to[i]);
    }

  private:
    static constexpr int64_t kReplicatedRows = 4;
    static constexpr int64_t kPathBlocks = (kBlock - 1 + 64 + kBlock - 1) / kBlock;  // a begun block, 64 tokens behind

    struct Scratch {
        std::vector<float> normed, scores, q, wide, path_keys, path_values;
    };

    int64_t group() const { return c_.num_heads / c_.num_kv_heads; }

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
            forward_with<uint16_t>(thread);
        else
            forward_with<float>(thread);
    }

    template <typename E>
    void forward_with(int thread) {
        if (c_.matrix_bits == 8)
            forward_as<E, int8_t>(thread);
        else if (c_.matrix_bits == 4)
            forward_as<E, Nibbles>(thread);
        else
            forward_as<E, E>(thread);
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

    // E is the type of the embedding and the head, W that of the layers' matrices.
    template <typename E, typename W>
    void forward_as(int thread) {
        const int64_t rows = batch_.num_tokens, width = c_.hidden_size;
        const E* embedding = static_cast<const E*>(c_.embedding);
        Range tokens(rows, thread, num_threads_);
        for (int64_t t = tokens.begin; t < tokens.end; ++t) embed(embedding + batch_.ids[t] * width, &hidden_[t * width]);
        barrier_.wait();
        for (int64_t l = 0; l < c_.num_layers; ++l) {
            const Layer& layer = layers_[l];
            keep_streams(l, thread);
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
        keep_streams(c_.num_layers, thread);
        const int64_t num_logits = batch_.num_logit_rows;
        float* normed = batch_.hidden ? batch_.hidden : normed_.data();
        Range mine(num_logits, thread, num_threads_);
        for (int64_t r = mine.begin; r < mine.end; ++r)
            rms_norm(&hidden_[batch_.logit_rows[r] * width], c_.norm, width, c_.rms_norm_eps, normed + r * width);
        barrier_.wait();
        if (batch_.logits)
            linear_rows<E, Write::kStore>(c_.lm_head, normed, width, num_logits, batch_.logits, c_.lm_head.n, thread,
                                          num_threads_);
        barrier_.wait();
    }

    // Between two barriers that nobody changes the streams between.
    void keep_streams(int64_t l, int thread) {
        if (!batch_.streams) return;
        const int64_t width = c_.hidden_size, num_layers = batch_.num_stream_layers;
        for (int64_t i = 0; i < num_layers; ++i) {
            if (batch_.stream_layers[i] != l) continue;
            Range tokens(batch_.num_tokens, thread, num_threads_);
            for (int64_t t = tokens.begin; t < tokens.end; ++t)
                std::memcpy(batch_.streams + (t * num_layers + i) * width, &hidden_[t * width], width * sizeof(float));
        }
    }

    void embed(const float* row, float* out) { std::memcpy(out, row, c_.hidden_size * sizeof(float)); }

    void embed(const uint16_t* row, float* out) {
        for (int64_t i = 0; i < c_.hidden_size; ++i) {
            const uint32_t bits = static_cast<uint32_t>(row[i]) << 16;
            std::memcpy(out + i, &bits, sizeof bits);
        }
    }

    // Work items are (token, key/value head) pairs. Where each sequence has one token, an item writes its own key and
    // attends at once; otherwise all keys of the step are written first. Where attention is summed up, the tokens of a
    // sequence do so one after the other.
    void attention(int64_t l, int thread) {
        const int64_t num_items = batch_.num_tokens * c_.num_kv_heads;
        const int64_t grain = all_single_ ? 1 : 4;
        Scratch& scratch = scratch_[thread];
        if (!all_single_) {
            Range mine(num_items, thread, num_threads_);
            for (int64_t i = mine.begin; i < mine.end; ++i) write_cache(l, i / c_.num_kv_heads, i % c_.num_kv_heads);
            barrier_.wait();
            if (cache_.attention) return attend_in_order(l, scratch);
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

    void attend_in_order(int64_t l, Scratch& scratch) {
        const int64_t num_items = batch_.num_sequences * c_.num_kv_heads;
        for (int64_t i; (i = counters_[l].fetch_add(1, std::memory_order_relaxed)) < num_items;) {
            const int64_t sequence = i / c_.num_kv_heads, head = i % c_.num_kv_heads;
            for (int64_t t = batch_.query_starts[sequence]; t < batch_.query_starts[sequence + 1]; ++t)
                attend(l, t, head, scratch);
        }
    }

    void write_cache(int64_t l, int64_t token, int64_t head) {
        const int64_t size = c_.head_size, half = size / 2, position = batch_.positions[token];
        float* key = &qkv_[token * ld_qkv_ + (c_.num_heads + head) * size];
        const float* value = key + c_.num_kv_heads * size;
        if (layers_[l].k_norm) rms_norm(key, layers_[l].k_norm, size, c_.rms_norm_eps, key);
        rotate(key, c_.cos + position * half, c_.sin + position * half, half);
        cache_.write(l, head, batch_.slots[token], key, value);
    }

    void attend(int64_t l, int64_t token, int64_t head, Scratch& scratch) {
        const int64_t group = this->group(), size = c_.head_size, half = size / 2;
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
        const int64_t length = num_before(sequence_of_[token]) + num_seen(token), window = layers_[l].window;
        const int64_t first = window ? std::max<int64_t>(0, length - window) : 0;
        const Context context = context_of(l, token, head, scratch);
        float* out = &attended_[(token * c_.num_heads + head * group) * size];
        for (int64_t g = 0; g < group; g += 4) {
            auto heads = [&](auto num_heads) {
                attend_heads<decltype(num_heads)::value>(context, q + g * size, first, length, scratch.scores.data(),
                                                         out + g * size);
            };
            switch (std::min<int64_t>(4, group - g)) {
                case 1: heads(std::integral_constant<int, 1>{}); break;
                case 2: heads(std::integral_constant<int, 2>{}); break;
                case 3: heads(std::integral_constant<int, 3>{}); break;
                default: heads(std::integral_constant<int, 4>{});
            }
        }
    }

    // Places in the cache before a sequence's new tokens. It may have let go of some, so that positions do not tell.
    int64_t num_before(int64_t sequence) const {
        return batch_.context_lens[sequence] - (batch_.query_starts[sequence + 1] - batch_.query_starts[sequence]);
    }

    // How many of its sequence's new tokens a token sees, itself included.
    int64_t num_seen(int64_t token) const {
        const uint64_t mask = batch_.tree_masks ? batch_.tree_masks[token] : 0;
        return mask ? std::popcount(mask) : token - batch_.query_starts[sequence_of_[token]] + 1;
    }

    // A token of a tree sees its own path, whose keys do not lie in order: its last blocks are put together for it, as
    // they would lie if the path were all there is. So its sums are those of a line, bit by bit.
    Context context_of(int64_t l, int64_t token, int64_t head, Scratch& scratch) {
        const int64_t sequence = sequence_of_[token], size = c_.head_size, block_size = size * kBlock;
        Context context(cache_, l, head, batch_.block_tables + sequence * batch_.max_blocks, scratch.wide.data());
        const uint64_t mask = batch_.tree_masks ? batch_.tree_masks[token] : 0;
        if (!mask) return context;
        float *keys = scratch.path_keys.data(), *values = scratch.path_values.data();
        int64_t place = num_before(sequence);  // of the sequence's first new token
        const int64_t first_own = place / kBlock, first_token = batch_.query_starts[sequence];
        if (place % kBlock) {
            std::memcpy(keys, context.keys(first_own), block_size * sizeof(float));
            std::memcpy(values, context.values(first_own), block_size * sizeof(float));
        }
        for (uint64_t rest = mask; rest; rest &= rest - 1, ++place) {
            const int64_t slot = batch_.slots[first_token + std::countr_zero(rest)];
            const int64_t block = (place / kBlock - first_own) * block_size, lane = place % kBlock;
            const float* key = cache_.read_keys(l, slot / kBlock, head, scratch.wide.data()) + slot % kBlock;
            for (int64_t d = 0; d < size; ++d) keys[block + d * kBlock + lane] = key[d * kBlock];
            const float* value = cache_.read_values(l, slot / kBlock, head, scratch.wide.data()) + slot % kBlock * size;
            std::memcpy(values + block + lane * size, value, size * sizeof(float));
        }
        context.first_own = first_own;
        context.own_keys = keys;
        context.own_values = values;
        return context;
    }

    const Config c_;
    const PagedCache cache_;
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

// 0, or 1 where there is no memory for a batch of this size; the cache is then as it was.
int32_t autobot_run(void* model, const Batch* batch) {
    try {
        static_cast<Model*>(model)->run(*batch);
        return 0;
    } catch (...) {
        return 1;
    }
}

void autobot_move(void* model, const int64_t* slots_from, const int64_t* slots_to, int64_t count) {
    static_cast<Model*>(model)->move(slots_from, slots_to, count);
}

void autobot_destroy(void* model) { delete static_cast<Model*>(model); }
}
