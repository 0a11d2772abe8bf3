// Vectors of this machine's width through the compiler's vector types; bfloat16 to float32 and back. Intrinsics stand
// only where compilers take such a vector apart.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int TILE_ROWS = 8;  // 8 x 3 accumulators, 3 weights and a broadcast in 32 registers
#elif defined(__AVX2__)
constexpr int LANES = 8;
constexpr int TILE_ROWS = 4;
#else
constexpr int LANES = 4;
constexpr int TILE_ROWS = 8;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

struct bfloat16 {
    uint16_t bits;
};

static inline float to_float(float x) { return x; }
static inline float to_float(bfloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

template <typename V, typename T> static inline V load(const T* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
template <typename V, typename T> static inline void store(T* to, V v) { std::memcpy(to, &v, sizeof v); }

static inline Floats broadcast(float x) { return x - Floats{}; }
static inline Floats load_floats(const float* from) { return load<Floats>(from); }
static inline Floats load_floats(const bfloat16* from) {
    const Ints bits = __builtin_convertvector(load<Halves>(from), Ints) << 16;
    return (Floats)bits;
}

static inline void store_floats(float* to, Floats v) { store(to, v); }
static inline void store_floats(bfloat16* to, Floats v) {
#if defined(__AVX512BF16__)
    store(to, _mm512_cvtneps_pbh((__m512)v));
#else
    const Words bits = (Words)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    store(to, __builtin_convertvector(v == v ? rounded : Words{} + 0x7fc0, Halves));
#endif
}

// the first `count` of LANES elements, the others zero or left alone
template <typename T> static inline Floats load_some(const T* from, long count) {
    if (count >= LANES) return load_floats(from);
    T some[LANES] = {};
    std::memcpy(some, from, count * sizeof(T));
    return load_floats(some);
}
template <typename T> static inline void store_some(T* to, Floats v, long count) {
    if (count >= LANES) return store_floats(to, v);
    T some[LANES];
    store_floats(some, v);
    std::memcpy(to, some, count * sizeof(T));
}

// v as a T holds it
static inline Floats cast(Floats v, const float*) { return v; }
static inline Floats cast(Floats v, const bfloat16*) {
    bfloat16 some[LANES];
    store_floats(some, v);
    return load_floats(some);
}

static inline Floats load_floats(const int8_t* from) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(from)));
#else
    return __builtin_convertvector(__builtin_convertvector(load<Bytes>(from), Ints), Floats);
#endif
}

static inline float sum(Floats v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
#endif
}

// e^x: 2^n times the exponential's series of what is left, to about one unit in the last place
static inline Floats exponential(Floats x) {
    x = x > 88.0f ? broadcast(88.0f) : x;
    x = x < -87.0f ? broadcast(-87.0f) : x;
    const Floats shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's last bits are the nearest integer
    const Floats n = shifted - 12582912.0f;
    const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts, the first one short
    Floats y = r * (1.0f / 5040) + 1.0f / 720;
    y = y * r + 1.0f / 120;
    y = y * r + 1.0f / 24;
    y = y * r + 1.0f / 6;
    y = y * r + 0.5f;
    y = y * r + 1.0f;
    y = y * r + 1.0f;
    return (Floats)((Ints)y + (__builtin_convertvector(n, Ints) << 23));
}
