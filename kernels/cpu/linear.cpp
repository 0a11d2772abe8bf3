// y = x W^T + bias with W packed into panels, for a few rows of x as well as for many.
//
// A panel holds PANEL output features, k by k, so that the innermost loop reads it in order: float32 as
// [panels][k][PANEL], bfloat16 in pairs as [panels][ceil(k / 2)][PANEL][2]. Missing features and an odd k's
// last half are zero. A tile of up to TILE_ROWS rows keeps its sums in registers.
#include "vector.h"
#include <algorithm>

constexpr long PANEL = 3 * LANES;
constexpr long CHUNK_ROWS = 64;   // rows whose sums wait in the first-level cache
constexpr long BLOCK_BYTES = 192 * 1024;  // of a panel, re-read for each tile from the second-level cache
constexpr long WIDENED_BYTES = 24 * 1024;  // of a block that is int8 in memory

constexpr long AHEAD = 32;  // rows of a panel that are asked of memory before their turn

template <typename T> constexpr long GROUP = 4 / sizeof(T);  // consecutive k's in one 32-bit lane

template <typename T> static long groups(long k) { return (k + GROUP<T> - 1) / GROUP<T>; }

// sums + one lane of x times one row of a panel
static inline Floats multiply_add(Floats sums, float x, const float* w) { return sums + x * load<Floats>(w); }

static inline Floats multiply_add(Floats sums, uint32_t x, const bfloat16* w) {
#if defined(__AVX512BF16__)
    return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_set1_epi32(x), (__m512bh)load<__m512i>(w));
#else
    const Ints pair = load<Ints>(w);
    float low, high;
    const uint32_t low_bits = x << 16, high_bits = x & 0xffff0000u;
    std::memcpy(&low, &low_bits, 4);
    std::memcpy(&high, &high_bits, 4);
    return sums + low * (Floats)(pair << 16) + high * (Floats)(pair & int32_t(0xffff0000));
#endif
}

static inline float lane(const float* x, long) { return *x; }
static inline uint32_t lane(const bfloat16* x, long left) {
    uint32_t pair = x[0].bits;
    if (left > 1) std::memcpy(&pair, x, 4);
    return pair;
}

template <typename T, int ROWS>
static void tile(const T* x, long ldx, const T* w, const T* next, long k, float* out) {
    Floats sums[ROWS][3];
    for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < 3; j++) sums[r][j] = load<Floats>(out + r * PANEL + j * LANES);
    constexpr long step = GROUP<T>;
    for (long i = 0; i < k; i += step) {
        const T* row = w + i * PANEL;
        for (int j = 0; j < 3; j++) __builtin_prefetch(next + (i * PANEL + j * LANES * step), 0, 2);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const auto a = lane(x + r * ldx + i, k - i);
#pragma GCC unroll 3
            for (int j = 0; j < 3; j++) sums[r][j] = multiply_add(sums[r][j], a, row + j * LANES * step);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < 3; j++) store(out + r * PANEL + j * LANES, sums[r][j]);
}

// The last of several tiles finds its weights in the cache and asks memory for those that come after `k`.
template <typename T, int ROWS = TILE_ROWS>
static void tiles(const T* x, long ldx, const T* w, long k, float* out, long rows, bool first = true) {
    for (; rows >= ROWS; rows -= ROWS, x += ROWS * ldx, out += ROWS * PANEL, first = false) {
        const long ahead = first || rows > ROWS ? AHEAD * GROUP<T> : k;
        tile<T, ROWS>(x, ldx, w, w + ahead * PANEL, k, out);
    }
    if constexpr (ROWS > 1)
        if (rows) tiles<T, ROWS - 1>(x, ldx, w, k, out, rows, first);
}

template <typename T>
static void finish(const float* out, const float* scale, const T* bias, T* y, long columns) {
    for (long j = 0; j < columns; j += LANES) {
        const long left = columns - j;
        Floats sums = load<Floats>(out + j);
        if (scale) sums *= load_some(scale + j, left);
        if (bias) sums += load_some(bias + j, left);
        store_some(y + j, sums, left);
    }
}

// A block of a panel as the tiles read it: int8 becomes a T, which holds it exactly, on its way
template <typename T> static const T* widen(const T* w, T*, long) { return w; }
template <typename T> static const T* widen(const int8_t* w, T* space, long count) {
    for (long i = 0; i < count; i += LANES) store_floats(space + i, load_floats(w + i));
    return space;
}

template <typename T, typename W>
static void linear(const T* x, long ldx, const W* w, const float* scale, const T* bias, T* y, long m, long n, long k) {
    const long panels = (n + PANEL - 1) / PANEL, chunks = (m + CHUNK_ROWS - 1) / CHUNK_ROWS;
    constexpr bool widens = sizeof(W) != sizeof(T);
    constexpr long block = (widens ? WIDENED_BYTES : BLOCK_BYTES) / (PANEL * 4) * GROUP<T>;
#pragma omp parallel for collapse(2) schedule(static)
    for (long p = 0; p < panels; p++)
        for (long c = 0; c < chunks; c++) {
            alignas(64) float out[CHUNK_ROWS * PANEL] = {};
            const long first = c * CHUNK_ROWS, rows = std::min(m - first, CHUNK_ROWS);
            alignas(64) T space[widens ? block * PANEL : 1];
            const W* panel = w + p * PANEL * groups<T>(k) * GROUP<T>;
            for (long i = 0; i < k; i += block) {
                const long inner = std::min(k - i, block);
                const T* ready = widen(panel + i * PANEL, space, groups<T>(inner) * GROUP<T> * PANEL);
                tiles(x + first * ldx + i, ldx, ready, inner, out, rows);
            }
            for (long r = 0; r < rows; r++)
                finish(out + r * PANEL, scale ? scale + p * PANEL : nullptr, bias ? bias + p * PANEL : nullptr, y + (first + r) * n + p * PANEL,
                       std::min(n - p * PANEL, PANEL));
        }
}

template <typename T, typename W> static void pack(const W* weight, W* packed, long n, long k) {
    const long panels = (n + PANEL - 1) / PANEL, width = groups<T>(k) * GROUP<T>;
#pragma omp parallel for schedule(static)
    for (long p = 0; p < panels; p++)
        for (long i = 0; i < width; i++)
            for (long j = 0; j < PANEL; j++) {
                const long row = p * PANEL + j;
                W* to = packed + p * PANEL * width + (i / GROUP<T> * PANEL + j) * GROUP<T> + i % GROUP<T>;
                *to = row < n && i < k ? weight[row * k + i] : W{};
            }
}

#define EXPORT(T, NAME)                                                                                                \
    extern "C" void panel_elements_##NAME(long n, long k, long* elements) {                                            \
        *elements = (n + PANEL - 1) / PANEL * PANEL * groups<T>(k) * GROUP<T>;                                         \
    }                                                                                                                  \
    extern "C" void pack_panels_##NAME(const T* weight, T* packed, long n, long k) {                                   \
        pack<T>(weight, packed, n, k);                                                                                 \
    }                                                                                                                  \
    extern "C" void pack_int8_panels_##NAME(const int8_t* weight, int8_t* packed, long n, long k) {                    \
        pack<T>(weight, packed, n, k);                                                                                 \
    }                                                                                                                  \
    extern "C" void linear_##NAME(const T* x, long ldx, const T* w, const T* bias, T* y, long m, long n, long k) {     \
        linear(x, ldx, w, nullptr, bias, y, m, n, k);                                                                  \
    }                                                                                                                  \
    extern "C" void int8_linear_##NAME(const T* x, long ldx, const int8_t* w, const float* scale, const T* bias, T* y, \
                                       long m, long n, long k) {                                                       \
        linear(x, ldx, w, scale, bias, y, m, n, k);                                                                    \
    }
EXPORT(float, float32)
EXPORT(bfloat16, bfloat16)
