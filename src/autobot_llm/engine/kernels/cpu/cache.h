// The paged cache of the step: where blocks lie, what their numbers are, and who was attended to. Knows one layout.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "vectors.h"

constexpr int kBlock = 16;  // tokens in a cache block; also the lanes of a vector of scores

// How keys and values are stored: float32, or one byte a number with a bfloat16 scale for each token of each head.
enum class Stored : int64_t { kFloat = 0, kInt8 = 1, kFp8 = 2 };  // kFp8 is float8_e4m3fn

// Keys [layer][block][kv head][head_size][kBlock] (a vector of scores reads them lane by lane), values
// [layer][block][kv head][kBlock][head_size]; scales and attention [layer][block][kv head][kBlock].
struct PagedCache {
    void *keys, *values;
    uint16_t *key_scales, *value_scales;  // of bytes
    float* attention;  // sums of the weights that every query gave to a token, or null: nobody wants them
    int64_t num_blocks, num_kv_heads, head_size;
    Stored stored;

    // A block's keys, widened to `wide` (head_size * kBlock numbers) where they are not stored as floats.
    const float* read_keys(int64_t layer, int64_t block, int64_t head, float* wide) const {
        const int64_t at = row(layer, block, head) * head_size * kBlock;
        if (stored == Stored::kFloat) return static_cast<const float*>(keys) + at;
        const auto* bytes = static_cast<const uint8_t*>(keys) + at;
        const Float16 scales = scales_of(key_scales + row(layer, block, head) * kBlock);
        for (int64_t d = 0; d < head_size; ++d) store(wide + d * kBlock, number16(bytes + d * kBlock) * scales);
        return wide;
    }

    // A block's values, as read_keys.
    const float* read_values(int64_t layer, int64_t block, int64_t head, float* wide) const {
        const int64_t at = row(layer, block, head) * head_size * kBlock;
        if (stored == Stored::kFloat) return static_cast<const float*>(values) + at;
        const auto* bytes = static_cast<const uint8_t*>(values) + at;
        const Float16 scales = scales_of(value_scales + row(layer, block, head) * kBlock);
        for (int t = 0; t < kBlock; ++t)
            for (int64_t d = 0; d < head_size; d += 16)
                store(wide + t * head_size + d, number16(bytes + t * head_size + d) * scales[t]);
        return wide;
    }

    // Writes one token's key and value; nobody has attended to it yet.
    void write(int64_t layer, int64_t head, int64_t slot, const float* key, const float* value) const {
        const int64_t at = row(layer, slot / kBlock, head), offset = slot % kBlock;
        const int64_t first = at * head_size * kBlock;
        if (attention) attention[at * kBlock + offset] = 0.0f;
        if (stored == Stored::kFloat) {
            float* to = static_cast<float*>(keys) + first + offset;
            for (int64_t d = 0; d < head_size; ++d) to[d * kBlock] = key[d];
            std::memcpy(static_cast<float*>(values) + first + offset * head_size, value, head_size * sizeof(float));
            return;
        }
        key_scales[at * kBlock + offset] =
            round(key, static_cast<uint8_t*>(keys) + first + offset, kBlock);
        value_scales[at * kBlock + offset] =
            round(value, static_cast<uint8_t*>(values) + first + offset * head_size, 1);
    }

    // Copies the key and the value of one slot to another, as they are stored.
    void move(int64_t layer, int64_t head, int64_t from, int64_t to) const {
        const int64_t old_row = row(layer, from / kBlock, head), new_row = row(layer, to / kBlock, head);
        const int64_t old_lane = from % kBlock, new_lane = to % kBlock;
        auto move_as = [&](auto* old_keys, auto* old_values) {
            const auto* key = old_keys + old_row * head_size * kBlock + old_lane;
            auto* new_key = old_keys + new_row * head_size * kBlock + new_lane;
            for (int64_t d = 0; d < head_size; ++d) new_key[d * kBlock] = key[d * kBlock];
            std::memcpy(old_values + (new_row * kBlock + new_lane) * head_size,
                        old_values + (old_row * kBlock + old_lane) * head_size, head_size * sizeof *old_values);
        };
        if (stored == Stored::kFloat) return move_as(static_cast<float*>(keys), static_cast<float*>(values));
        move_as(static_cast<uint8_t*>(keys), static_cast<uint8_t*>(values));
        key_scales[new_row * kBlock + new_lane] = key_scales[old_row * kBlock + old_lane];
        value_scales[new_row * kBlock + new_lane] = value_scales[old_row * kBlock + old_lane];
    }

    float* attention_of(int64_t layer, int64_t block, int64_t head) const {
        return attention + row(layer, block, head) * kBlock;
    }

  private:
    int64_t row(int64_t layer, int64_t block, int64_t head) const {
        return (layer * num_blocks + block) * num_kv_heads + head;
    }

    static Float16 scales_of(const uint16_t* halves) {
        typedef uint16_t Half16 __attribute__((vector_size(32)));
        const Int16 bits = __builtin_convertvector(load<Half16>(halves), Int16) << 16;
        Float16 scales;
        std::memcpy(&scales, &bits, sizeof scales);
        return scales;
    }

    Float16 number16(const uint8_t* bytes) const {
        if (stored == Stored::kInt8) {
            typedef int8_t Byte16 __attribute__((vector_size(16)));
            typedef int16_t Short16 __attribute__((vector_size(32)));
            const Short16 wider = __builtin_convertvector(load<Byte16>(bytes), Short16);
            return __builtin_convertvector(__builtin_convertvector(wider, Int16), Float16);
        }
        // The bits of exponent and mantissa are those of a float32 that is 2^120 times smaller; subnormal ones, too.
        typedef uint8_t Byte16 __attribute__((vector_size(16)));
        typedef uint16_t Short16 __attribute__((vector_size(32)));
        const Int16 wide =
            __builtin_convertvector(__builtin_convertvector(load<Byte16>(bytes), Short16), Int16);
        const Int16 bits = ((wide & 0x7f) << 20) | ((wide & 0x80) << 24);
        Float16 small;
        std::memcpy(&small, &bits, sizeof small);
        return small * 0x1p120f;
    }

    // Rounds a head's numbers to bytes, `stride` apart, as kernels/gpu/rotary.py does; returns the scale's bits.
    uint16_t round(const float* x, uint8_t* out, int64_t stride) const {
        const float limit = stored == Stored::kInt8 ? 127.0f : 448.0f;
        float largest = 0.0f;
        for (int64_t d = 0; d < head_size; ++d) largest = std::fabs(x[d]) > largest || x[d] != x[d] ? std::fabs(x[d]) : largest;
        const float exact = largest / limit;
        uint32_t bits;
        std::memcpy(&bits, &exact, sizeof bits);
        if (exact == exact) bits += 0x7fff + (bits >> 16 & 1);  // to the nearest, ties to even; NaN stays as it is
        const uint16_t half = static_cast<uint16_t>(bits >> 16);
        bits = static_cast<uint32_t>(half) << 16;
        float scale;
        std::memcpy(&scale, &bits, sizeof scale);
        const float inverse = 1.0f / (scale == 0.0f ? 1.0f : scale);  // of zeros nothing is left whatever they meet
        for (int64_t d = 0; d < head_size; ++d) {
            const float scaled = std::min(std::max(-limit, x[d] * inverse), limit);  // NaN becomes -limit: its scale is NaN
            out[d * stride] = stored == Stored::kInt8
                                  ? static_cast<uint8_t>(static_cast<int8_t>(scaled + (scaled >= 0.0f ? 0.5f : -0.5f)))
                                  : fp8(scaled);
        }
        return half;
    }

    // The nearest float8_e4m3fn of a number from -448 to 448, ties to even.
    static uint8_t fp8(float x) {
        uint32_t bits;
        std::memcpy(&bits, &x, sizeof bits);
        const uint8_t sign = static_cast<uint8_t>(bits >> 24 & 0x80);
        bits &= 0x7fffffff;
        if (bits < 0x3c800000) {  // below 2^-6: multiples of 2^-9, which adding 2^14 rounds to
            const float magnitude = std::fabs(x) + 16384.0f;
            std::memcpy(&bits, &magnitude, sizeof bits);
            return static_cast<uint8_t>(sign | (bits & 0xff));
        }
        bits += 0x7ffff + (bits >> 20 & 1);
        return static_cast<uint8_t>(sign | ((bits >> 20) - (120 << 3)));
    }
};
