// What lies between a decoder's matrix products: norms, gated activations, rotation with the cache store.
#include "vector.h"
#include <algorithm>
#include <cmath>
#include <vector>

constexpr long SERIAL = 32768;  // fewer elements than this are not worth waking the other threads

// weight * cast(x / rms(x)), or cast((1 + weight) * x / rms(x)) with unit_offset
template <typename T>
static void rms_norm(const T* x, long ldx, const T* weight, T* y, long rows, long n, float eps, long unit_offset) {
#pragma omp parallel for schedule(static) if (rows * n >= SERIAL)
    for (long r = 0; r < rows; r++) {
        const T* from = x + r * ldx;
        T* to = y + r * n;
        Floats squares{};
        for (long j = 0; j < n; j += LANES) {
            const Floats v = load_some(from + j, n - j);
            squares += v * v;
        }
        const float scale = 1 / std::sqrt(sum(squares) / n + eps);
        for (long j = 0; j < n; j += LANES) {
            const Floats v = load_some(from + j, n - j) * scale, w = load_some(weight + j, n - j);
            store_some(to + j, unit_offset ? v * (1 + w) : cast(v, from) * w, n - j);
        }
    }
}

// x / (1 + e^-x) of the first half of a row, cast, times the second
template <typename T> static void silu_and_mul(const T* x, long ldx, T* y, long rows, long n) {
#pragma omp parallel for schedule(static) if (rows * n >= SERIAL)
    for (long r = 0; r < rows; r++)
        for (long j = 0; j < n; j += LANES) {
            const Floats gate = load_some(x + r * ldx + j, n - j), up = load_some(x + r * ldx + n + j, n - j);
            store_some(y + r * n + j, cast(gate / (1 + exponential(-gate)), x) * up, n - j);
        }
}


// dimension i of a head turns with its partner half a rotation away; sin carries the sign
template <typename T>
static inline void rotate(const T* x, const T* cos, const T* sin, T* y, long dim, long rotary_dim) {
    const long half = rotary_dim / 2;
    for (long i = 0; i < half; i += LANES) {
        const long left = half - i;
        const Floats first = load_some(x + i, left), second = load_some(x + half + i, left);
        store_some(y + i, first * load_some(cos + i, left) + second * load_some(sin + i, left), left);
        store_some(y + half + i, second * load_some(cos + half + i, left) + first * load_some(sin + half + i, left),
                   left);
    }
    for (long i = rotary_dim; i < dim; i++) y[i] = x[i];
}

// query heads turned go to `out`, key heads turned and values to their slot of the cache; a slot of -1 is dropped
template <typename T>
static void rotate_and_store(const T* query, long ldq, const T* key, long ldk, const T* value, long ldv, const T* cos,
                             const T* sin, T* out, T* keys, T* values, const int64_t* slots, long tokens, long heads,
                             long kv_heads, long dim, long rotary_dim) {
#pragma omp parallel for schedule(static) if (tokens * heads * dim >= SERIAL)
    for (long t = 0; t < tokens; t++) {
        const T *c = cos + t * rotary_dim, *s = sin + t * rotary_dim;
        for (long h = 0; h < heads; h++)
            rotate(query + t * ldq + h * dim, c, s, out + (t * heads + h) * dim, dim, rotary_dim);
        if (slots[t] < 0) continue;
        const long place = slots[t] * kv_heads * dim;
        for (long h = 0; h < kv_heads; h++) rotate(key + t * ldk + h * dim, c, s, keys + place + h * dim, dim, rotary_dim);
        std::memcpy(values + place, value + t * ldv, kv_heads * dim * sizeof(T));
    }
}

// The first place of the largest value, or of the first NaN
template <typename T> static void argmax(const T* x, long ldx, int64_t* places, long rows, long n) {
#pragma omp parallel for schedule(static) if (rows * n >= SERIAL)
    for (long r = 0; r < rows; r++) {
        const T* from = x + r * ldx;
        float best = to_float(from[0]);
        int unordered = 0;
#pragma omp simd reduction(max : best) reduction(| : unordered)
        for (long j = 0; j < n; j++) {
            const float value = to_float(from[j]);
            best = value > best ? value : best;
            unordered |= value != value;
        }
        long j = 0;
        while (unordered ? to_float(from[j]) == to_float(from[j]) : to_float(from[j]) != best) j++;
        places[r] = j;
    }
}

// e^((x - most) / temperature) of up to LANES logits; nothing for those that are missing or as good as impossible
template <typename T> static inline Floats likelihoods(const T* x, long count, float most, float temperature) {
    Floats logits = load_some(x, count);
    for (long i = count; i < LANES; i++) logits[i] = -INFINITY;
    const Floats scaled = (logits - most) / temperature;
    return scaled > -87.0f ? exponential(scaled) : Floats{};
}

// The first token whose cumulative likelihood is above the row's share `uniform` of the whole
template <typename T>
static void draw_tokens(const T* x, long ldx, const float* temperature, const double* uniform, int64_t* places,
                        long rows, long n) {
    constexpr long BLOCK = 1024;  // so many are added in float32, these sums in float64
#pragma omp parallel for schedule(static) if (rows * n >= SERIAL)
    for (long r = 0; r < rows; r++) {
        const T* from = x + r * ldx;
        float most = to_float(from[0]);
#pragma omp simd reduction(max : most)
        for (long j = 0; j < n; j++) most = to_float(from[j]) > most ? to_float(from[j]) : most;
        std::vector<double> sums;
        double total = 0;
        for (long start = 0; start < n; start += BLOCK) {
            Floats block{};
            for (long j = start; j < std::min(start + BLOCK, n); j += LANES)
                block += likelihoods(from + j, n - j, most, temperature[r]);
            sums.push_back(sum(block));
            total += sums.back();
        }
        double left = uniform[r] * total;
        long start = 0, last = 0;
        for (size_t b = 0; b + 1 < sums.size() && left >= sums[b]; b++, start += BLOCK) left -= sums[b];
        // what rounding may leave over at the end goes to the last token that is possible
        for (long j = start; j < n && left >= 0; j += LANES) {
            const Floats found = likelihoods(from + j, n - j, most, temperature[r]);
            for (long i = 0; i < LANES && left >= 0; i++)
                if (found[i] > 0) last = j + i, left -= found[i];
        }
        places[r] = last;
    }
}

#define EXPORT(T, NAME)                                                                                              \
    extern "C" void rms_norm_##NAME(const T* x, long ldx, const T* weight, T* y, long rows, long n, float eps,       \
                                    long unit_offset) {                                                              \
        rms_norm(x, ldx, weight, y, rows, n, eps, unit_offset);                                                      \
    }                                                                                                                \
    extern "C" void argmax_##NAME(const T* x, long ldx, int64_t* places, long rows, long n) {                        \
        argmax(x, ldx, places, rows, n);                                                                             \
    }                                                                                                                \
    extern "C" void draw_tokens_##NAME(const T* x, long ldx, const float* temperature, const double* uniform,        \
                                       int64_t* places, long rows, long n) {                                         \
        draw_tokens(x, ldx, temperature, uniform, places, rows, n);                                                  \
    }                                                                                                                \
    extern "C" void silu_and_mul_##NAME(const T* x, long ldx, T* y, long rows, long n) {                             \
        silu_and_mul(x, ldx, y, rows, n);                                                                            \
    }                                                                                                                \
    extern "C" void rotate_and_store_##NAME(const T* query, long ldq, const T* key, long ldk, const T* value,        \
                                            long ldv, const T* cos, const T* sin, T* out, T* keys, T* values,        \
                                            const int64_t* slots, long tokens, long heads, long kv_heads, long dim,  \
                                            long rotary_dim) {                                                       \
        rotate_and_store(query, ldq, key, ldk, value, ldv, cos, sin, out, keys, values, slots, tokens, heads,        \
                         kv_heads, dim, rotary_dim);                                                                 \
    }
EXPORT(float, float32)
EXPORT(bfloat16, bfloat16)
