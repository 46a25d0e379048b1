// Vectors of floats, and what is computed on them lane by lane. GCC and clang lower them to whatever the processor has.
#pragma once

#include <cstdint>
#include <cstring>

// A panel of a weight matrix is kPanel output columns wide and is held in kVectors registers of kLanes floats.
// kRows x kVectors accumulators, a panel's row and one broadcast fill the register file.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kVectors = 4, kRows = 6, kPanelsForOneRow = 1;
#else
constexpr int kLanes = 8, kVectors = 2, kRows = 6, kPanelsForOneRow = 4;
#endif
constexpr int kPanel = kLanes * kVectors;

typedef float Float __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Half __attribute__((vector_size(kLanes * 2)));
typedef uint32_t Word __attribute__((vector_size(kLanes * 4)));
typedef int32_t Integer __attribute__((vector_size(kLanes * 4)));
typedef int16_t Short __attribute__((vector_size(kLanes * 2)));
typedef int8_t Byte __attribute__((vector_size(kLanes)));
typedef uint8_t Pairs __attribute__((vector_size(kLanes)));
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

// Two whole numbers from 0 to 15: of one output in the first half of a panel, and of one in the second half.
struct Nibbles {
    uint8_t pair;
};

// How many outputs' weights one W holds.
template <typename W>
constexpr int kPerElement = 1;
template <>
constexpr int kPerElement<Nibbles> = 2;

// The weights of the `v`th kLanes outputs of a panel, whose weights for one input begin at `row`.
template <typename W>
inline Float load_weights(const W* row, int v) {
    return load_weights(row + v * kLanes);
}

// By way of 16 bits: GCC makes one instruction of each of these steps, and a dozen of both at once.
template <typename V>
inline Integer widen(const V& bytes) {
    return __builtin_convertvector(__builtin_convertvector(bytes, Short), Integer);
}

inline Float load_weights(const int8_t* row, int v) {
    return __builtin_convertvector(widen(load<Byte>(row + v * kLanes)), Float);
}

inline Float load_weights(const Nibbles* row, int v) {
    constexpr int half = kVectors / 2;
    const Integer pairs = widen(load<Pairs>(row + v % half * kLanes));
    return __builtin_convertvector(v < half ? pairs & 15 : pairs >> 4, Float);
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
