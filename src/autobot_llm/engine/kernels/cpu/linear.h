// Products with packed weights. Every output is one chain over its inputs, in order, whatever the number of rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "threads.h"
#include "vectors.h"

// A weight matrix of n outputs and k inputs: ceil(n / kPanel) panels, each [k][kPanel]; bias may be null.
// Of int8 weights, scale [padded n] is each output's. Of Nibbles, a weight is number * scale + offset, both of which are
// [k / group][padded n]; kPanel / 2 pairs of a panel's row hold outputs j and kPanel / 2 + j.
struct Linear {
    const void* weight;
    const float* bias;
    int64_t n, k;
    const float *scale, *offset;
    int64_t group;
};

inline int64_t padded(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }

enum class Write { kStore, kAdd, kGate };

// One tile: MR rows of x times GP adjacent panels. Each output is a single chain over k.
template <typename W, int MR, int GP, Write mode>
void tile(const Linear& linear, int64_t panel, const float* x, int64_t ldx, float* y, int64_t ldy) {
    constexpr bool grouped = std::is_same_v<W, Nibbles>;
    constexpr int64_t row_size = kPanel / kPerElement<W>;
    const int64_t k_size = linear.k, stride = k_size * row_size;
    const int64_t group = grouped ? linear.group : k_size;
    const W* w = static_cast<const W*>(linear.weight) + panel * stride;
    Float acc[MR][GP * kVectors] = {};
    for (int64_t first = 0; first < k_size; first += group) {
        const int64_t of_group = grouped ? first / group * padded(linear.n) + panel * kPanel : 0;
        const float *scale = linear.scale + of_group, *offset = linear.offset + of_group;
        for (int64_t k = first; k < std::min(first + group, k_size); ++k, w += row_size) {
            Float weights[GP * kVectors];
#pragma GCC unroll 16
            for (int v = 0; v < GP * kVectors; ++v) {
                weights[v] = load_weights(w + (v / kVectors) * stride, v % kVectors);
                if constexpr (grouped)
                    weights[v] = weights[v] * load<Float>(scale + v * kLanes) + load<Float>(offset + v * kLanes);
            }
#pragma GCC unroll 8
            for (int m = 0; m < MR; ++m) {
                const float value = x[m * ldx + k];
#pragma GCC unroll 16
                for (int v = 0; v < GP * kVectors; ++v) acc[m][v] += weights[v] * value;
            }
        }
    }
    for (int g = 0; g < GP; ++g) {
        const int64_t column = (panel + g) * kPanel;
        for (int m = 0; m < MR; ++m) {
            float out[kPanel];
            for (int v = 0; v < kVectors; ++v) store(out + v * kLanes, acc[m][g * kVectors + v]);
            if constexpr (std::is_same_v<W, int8_t>)
                for (int i = 0; i < kPanel; ++i) out[i] *= linear.scale[column + i];
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
