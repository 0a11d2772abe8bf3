// Attention of one query for each sequence, over the pages where its keys and values lie.
#include "vector.h"
#include <algorithm>
#include <cmath>
#include <limits>
#include <omp.h>
#include <vector>

constexpr long CHUNK = 64;  // keys whose scores are held at once

template <typename T> static inline float dot(const float* q, const T* k, long dim) {
    Floats sums{};
    for (long i = 0; i < dim; i += LANES) sums += load<Floats>(q + i) * load_floats(k + i);
    return sum(sums);
}

// scores of one head -> weights e^(score - highest); what is already summed shrinks with a new highest
static inline void weigh(float* scores, long count, float& highest, float& total, float* out, long dim) {
    std::fill(scores + count, scores + CHUNK, -std::numeric_limits<float>::infinity());
    float best = highest;
#pragma omp simd reduction(max : best)
    for (long i = 0; i < CHUNK; i++) best = scores[i] > best ? scores[i] : best;
    const float shrink = highest == best ? 1.0f : std::exp(highest - best);
    Floats sums{};
    for (long i = 0; i < count; i += LANES) {
        const Floats score = load<Floats>(scores + i);
        const Floats weight = score >= -3.4e38f ? exponential(score - best) : Floats{};
        store(scores + i, weight);
        sums += weight;
    }
    total = total * shrink + sum(sums);
    highest = best;
    if (shrink != 1.0f)
        for (long i = 0; i < dim; i++) out[i] *= shrink;
}

template <typename T, int WIDTH>
static inline void accumulate(const T* const* rows, long place, const float* weights, long count, float* out) {
    Floats sums[WIDTH];
    for (int j = 0; j < WIDTH; j++) sums[j] = load<Floats>(out + j * LANES);
    for (long i = 0; i < count; i++)
        for (int j = 0; j < WIDTH; j++) sums[j] += weights[i] * load_floats(rows[i] + place + j * LANES);
    for (int j = 0; j < WIDTH; j++) store(out + j * LANES, sums[j]);
}

// Some neighbouring KV heads of one sequence. Keys are read in the order in which they lie, all heads of one and then
// the next; the values follow, asked of memory in the meantime.
template <typename T>
static void attend(const T* query, const T* keys, const T* values, long stride, const int32_t* table, T* out, long first,
                   long context, long kv_heads, long group, long dim, long block_size, float scale) {
    const long heads = kv_heads * group, bytes = kv_heads * dim * sizeof(T);
    std::vector<float> space(heads * (2 * dim + CHUNK + 2));
    float *q = space.data(), *sums = q + heads * dim, *scores = sums + heads * dim, *highest = scores + heads * CHUNK;
    float* total = highest + heads;
    for (long i = 0; i < heads * dim; i++) q[i] = to_float(query[i]) * scale;
    std::fill(highest, total, -std::numeric_limits<float>::infinity());
    const T* rows[CHUNK];
    for (long start = first; start < context; start += CHUNK) {
        const long count = std::min(context - start, CHUNK);
        for (long i = 0; i < count; i++) {
            const long slot = table[(start + i) / block_size] * block_size + (start + i) % block_size;
            const T* row = keys + slot * stride;
            rows[i] = values + slot * stride;
            for (long b = 0; b < bytes; b += 64) __builtin_prefetch((const char*)rows[i] + b);
            for (long h = 0; h < heads; h++) scores[h * CHUNK + i] = dot(q + h * dim, row + h / group * dim, dim);
        }
        for (long h = 0; h < heads; h++) {
            float *weights = scores + h * CHUNK, *sum = sums + h * dim;
            weigh(weights, count, highest[h], total[h], sum, dim);
            const long place = h / group * dim;
            long j = 0;
            for (; j + 4 * LANES <= dim; j += 4 * LANES) accumulate<T, 4>(rows, place + j, weights, count, sum + j);
            for (; j < dim; j += LANES) accumulate<T, 1>(rows, place + j, weights, count, sum + j);
        }
    }
    for (long h = 0; h < heads; h++)
        for (long i = 0; i < dim; i += LANES) store_floats(out + h * dim + i, load<Floats>(sums + h * dim + i) / total[h]);
}

template <typename T>
static void decode_attention(const T* query, long ldq, const T* keys, const T* values, const int32_t* tables,
                             long table_width, const int32_t* contexts, T* out, long num_seqs, long heads,
                             long kv_heads, long dim, long block_size, long window, float scale) {
    const long group = heads / kv_heads;
    // few sequences are shared out by heads
    const long share = num_seqs >= 2 * omp_get_max_threads() ? kv_heads : 1;
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (long i = 0; i < num_seqs; i++)
        for (long h = 0; h < kv_heads; h += share) {
            const long first = window ? std::max(0L, contexts[i] - window) : 0, head = h * group * dim;
            attend(query + i * ldq + head, keys + h * dim, values + h * dim, kv_heads * dim, tables + i * table_width,
                   out + i * heads * dim + head, first, contexts[i], share, group, dim, block_size, scale);
        }
}

#define EXPORT(T, NAME)                                                                                               \
    extern "C" void decode_attention_##NAME(const T* query, long ldq, const T* keys, const T* values,                 \
                                            const int32_t* tables, long table_width, const int32_t* contexts, T* out, \
                                            long num_seqs, long heads, long kv_heads, long dim, long block_size,      \
                                            long window, float scale) {                                               \
        decode_attention(query, ldq, keys, values, tables, table_width, contexts, out, num_seqs, heads, kv_heads,     \
                         dim, block_size, window, scale);                                                             \
    }
EXPORT(float, float32)
EXPORT(bfloat16, bfloat16)
