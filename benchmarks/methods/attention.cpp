// Causal attention in heads of 8, for 16 queries at a time, which lie in the lanes of vectors: their weights stay in a
// cache, and backward makes them again from the logarithm of their sum. Tensors are [heads, length, 8], the query scaled
// already; length is a multiple of 16.

#include <cmath>
#include <vector>

constexpr int SIZE = 8, LANES = 16;
typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4)));  // one number of 16 queries
typedef float Row __attribute__((vector_size(4 * SIZE), aligned(4)));     // one query or key

// out[d], of 16 rows of 8
static inline void transpose(const float* rows, Lanes* out) {
    for (int d = 0; d < SIZE; ++d)
        for (int lane = 0; lane < LANES; ++lane) out[d][lane] = rows[lane * SIZE + d];
}

static inline void transpose_back(const Lanes* in, float* rows) {
    for (int d = 0; d < SIZE; ++d)
        for (int lane = 0; lane < LANES; ++lane) rows[lane * SIZE + d] = in[d][lane];
}

// out[j] = columns . row j + start
static inline void products(const Lanes* columns, const float* rows, int end, Lanes start, Lanes* out) {
    for (int j = 0; j < end; ++j) {
        Lanes sum = start;
        for (int d = 0; d < SIZE; ++d) sum += columns[d] * rows[j * SIZE + d];
        out[j] = sum;
    }
}

// The queries i, ..., i + 15 do not see the keys after themselves: these take the first key's score, which changes no
// maximum.
static inline void hide(Lanes* scores, int i) {
    for (int j = 1; j < LANES; ++j)
        for (int lane = 0; lane < j; ++lane) scores[i + j][lane] = scores[0][lane];
}

// e^(scores - subtract), and zero for the keys that are hidden
static inline void exponentials(Lanes* scores, int i, Lanes subtract) {
    const int end = i + LANES;
    for (int j = 0; j < end; ++j) scores[j] -= subtract;
    float* numbers = reinterpret_cast<float*>(scores);
    for (int j = 0; j < end * LANES; ++j) numbers[j] = std::exp(numbers[j]);
    for (int j = 1; j < LANES; ++j)
        for (int lane = 0; lane < j; ++lane) scores[i + j][lane] = 0;
}

extern "C" void forward(int heads, int length, const float* query, const float* key, const float* value, float* output,
                        float* logsum) {
    std::vector<float> weights(LANES * length);
    Lanes* weight = reinterpret_cast<Lanes*>(weights.data());
    for (int n = 0; n < heads; ++n, key += SIZE * length, value += SIZE * length)
        for (int i = 0; i < length; i += LANES, query += SIZE * LANES, output += SIZE * LANES, logsum += LANES) {
            Lanes columns[SIZE], mean[SIZE] = {}, sum = {};
            transpose(query, columns);
            products(columns, key, i + LANES, sum, weight);
            hide(weight, i);
            Lanes most = weight[0];
            for (int j = 1; j < i + LANES; ++j) most = weight[j] > most ? weight[j] : most;
            exponentials(weight, i, most);
            for (int j = 0; j < i + LANES; ++j) {
                sum += weight[j];
                for (int d = 0; d < SIZE; ++d) mean[d] += weight[j] * value[j * SIZE + d];
            }
            for (int d = 0; d < SIZE; ++d) mean[d] /= sum;
            transpose_back(mean, output);
            for (int lane = 0; lane < LANES; ++lane) logsum[lane] = most[lane] + std::log(sum[lane]);
        }
}

// dkey and dvalue start at zero.
extern "C" void backward(int heads, int length, const float* query, const float* key, const float* value,
                         const float* output, const float* logsum, const float* grad, float* dquery, float* dkey,
                         float* dvalue) {
    std::vector<float> weights(LANES * length), dscores(LANES * length);
    Lanes *weight = reinterpret_cast<Lanes*>(weights.data()), *dscore = reinterpret_cast<Lanes*>(dscores.data());
    for (int n = 0; n < heads; ++n, key += SIZE * length, value += SIZE * length, dkey += SIZE * length,
             dvalue += SIZE * length)
        for (int i = 0; i < length; i += LANES, query += SIZE * LANES, output += SIZE * LANES, logsum += LANES,
                 grad += SIZE * LANES, dquery += SIZE * LANES) {
            Lanes columns[SIZE], grads[SIZE], outputs[SIZE], sums[SIZE] = {}, zero = {}, inner = {};
            transpose(query, columns);
            transpose(grad, grads);
            transpose(output, outputs);
            for (int d = 0; d < SIZE; ++d) inner -= grads[d] * outputs[d];
            products(columns, key, i + LANES, zero, weight);
            hide(weight, i);
            exponentials(weight, i, *reinterpret_cast<const Lanes*>(logsum));
            products(grads, value, i + LANES, inner, dscore);
            for (int j = 0; j < i + LANES; ++j) {
                dscore[j] *= weight[j];
                for (int d = 0; d < SIZE; ++d) sums[d] += dscore[j] * key[j * SIZE + d];
            }
            transpose_back(sums, dquery);
            const Row *queries = reinterpret_cast<const Row*>(query), *rows = reinterpret_cast<const Row*>(grad);
            for (int j = 0; j < i + LANES; ++j) {
                Row dk = {}, dv = {};
                for (int lane = 0; lane < LANES; ++lane) {
                    dk += dscore[j][lane] * queries[lane];
                    dv += weight[j][lane] * rows[lane];
                }
                reinterpret_cast<Row*>(dkey)[j] += dk;
                reinterpret_cast<Row*>(dvalue)[j] += dv;
            }
        }
}
