// Grouped-query attention of one token over a paged cache. Positions are weighted in order, block by block.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "cache.h"
#include "vectors.h"

// The blocks of one token's context: those of a table and, from `first_own` on, copies that lie one behind the other.
struct Context {
    const float *cached_keys, *cached_values;  // of the cache's first block, where it is of floats
    int64_t stride;                            // from one of the cache's blocks to the next
    const int32_t* table;
    int64_t head_size, first_own;
    const float *own_keys, *own_values;
    const PagedCache* rounded;  // null where it is of floats
    int64_t layer, head;
    float* wide;       // room for a block that was rounded
    float* attention;  // what the tokens of the cache's first block were given, or null

    Context(const PagedCache& cache, int64_t layer, int64_t head, const int32_t* table, float* wide)
        : cached_keys(nullptr),
          cached_values(nullptr),
          stride(cache.num_kv_heads * cache.head_size * kBlock),
          table(table),
          head_size(cache.head_size),
          first_own(std::numeric_limits<int64_t>::max()),
          own_keys(nullptr),
          own_values(nullptr),
          rounded(cache.stored == Stored::kFloat ? nullptr : &cache),
          layer(layer),
          head(head),
          wide(wide),
          attention(cache.attention ? cache.attention_of(layer, 0, head) : nullptr) {
        if (rounded) return;
        cached_keys = cache.read_keys(layer, 0, head, nullptr);
        cached_values = cache.read_values(layer, 0, head, nullptr);
    }

    const float* keys(int64_t b) const {
        if (b >= first_own) return own_keys + (b - first_own) * head_size * kBlock;
        return rounded ? rounded->read_keys(layer, table[b], head, wide) : cached_keys + table[b] * stride;
    }
    const float* values(int64_t b) const {
        if (b >= first_own) return own_values + (b - first_own) * head_size * kBlock;
        return rounded ? rounded->read_values(layer, table[b], head, wide) : cached_values + table[b] * stride;
    }
    float* given(int64_t b) const { return attention + table[b] * (stride / head_size); }
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
        if (!context.attention) continue;
        for (int64_t b = first_block; b < end_block; ++b) {
            float* given = context.given(b);
            store(given, load<Float16>(given) + load<Float16>(scores + g * ld + b * kBlock) / denominator);
        }
    }
}
