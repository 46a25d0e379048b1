// Grouped-query attention of one token over a paged cache. Positions are weighted in order, block by block.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "vectors.h"

constexpr int kBlock = 16;  // tokens in a cache block; also the lanes of a vector of scores

// Keys [layer][block][kv head][head_size][kBlock] (a vector of scores reads them lane by lane), values
// [layer][block][kv head][kBlock][head_size].
struct PagedCache {
    float *keys, *values;
    int64_t num_blocks, num_kv_heads, head_size;

    float* key_block(int64_t layer, int64_t block, int64_t head) const { return keys + offset(layer, block, head); }
    float* value_block(int64_t layer, int64_t block, int64_t head) const { return values + offset(layer, block, head); }

    // Copies the key and the value of one slot to another.
    void move(int64_t layer, int64_t head, int64_t from, int64_t to) const {
        const float* key = key_block(layer, from / kBlock, head) + from % kBlock;
        float* new_key = key_block(layer, to / kBlock, head) + to % kBlock;
        for (int64_t d = 0; d < head_size; ++d) new_key[d * kBlock] = key[d * kBlock];
        std::memcpy(value_block(layer, to / kBlock, head) + to % kBlock * head_size,
                    value_block(layer, from / kBlock, head) + from % kBlock * head_size, head_size * sizeof(float));
    }

  private:
    int64_t offset(int64_t layer, int64_t block, int64_t head) const {
        return ((layer * num_blocks + block) * num_kv_heads + head) * head_size * kBlock;
    }
};

// The blocks of one token's context: those of a table and, from `first_own` on, copies that lie one behind the other.
struct Context {
    const float *cached_keys, *cached_values;  // of the cache's first block
    int64_t stride;                            // from one of the cache's blocks to the next
    const int32_t* table;
    int64_t head_size, first_own;
    const float *own_keys, *own_values;

    Context(const PagedCache& cache, int64_t layer, int64_t head, const int32_t* table)
        : cached_keys(cache.key_block(layer, 0, head)),
          cached_values(cache.value_block(layer, 0, head)),
          stride(cache.num_kv_heads * cache.head_size * kBlock),
          table(table),
          head_size(cache.head_size),
          first_own(std::numeric_limits<int64_t>::max()),
          own_keys(nullptr),
          own_values(nullptr) {}

    const float* keys(int64_t b) const {
        return b < first_own ? cached_keys + table[b] * stride : own_keys + (b - first_own) * head_size * kBlock;
    }
    const float* values(int64_t b) const {
        return b < first_own ? cached_values + table[b] * stride : own_values + (b - first_own) * head_size * kBlock;
    }
};

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

// NG query heads of one token over tokens [first, length): scores, softmax, weighted values.
template <int NG>
void attend_heads(const Context context, const float* q, int64_t first, int64_t length, float* scores, float* out) {
    const int64_t size = context.head_size, first_block = first / kBlock, end_block = (length + kBlock - 1) / kBlock;
    const int64_t ld = end_block * kBlock;
    const Int16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Float16 minus_infinity = Float16{} - std::numeric_limits<float>::infinity();
    Float16 largest[NG], total[NG] = {}, block_scores[NG];
    for (int g = 0; g < NG; ++g) largest[g] = minus_infinity;
    for (int64_t b = first_block; b < end_block; ++b) {
        score_block<NG>(q, size, context.keys(b), block_scores);
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
        const float* values = context.values(b);
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
