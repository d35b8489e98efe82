// Causal attention, forwards and backwards, from the product for queries, keys and values on: see attention.py.
//
// A thread takes a head of keys of one sequence with all the heads of queries that share it, whose operands and weights its
// cache holds: it normalises and turns queries and keys, weighs, and mixes the values. The backward pass computes the
// weights again from the sums that the forward pass keeps (Dao et al. 2022, arXiv 2205.14135). All arrays are row-major:
//   qkv             (batch, seq, heads + 2 kv_heads, width): queries, keys, values
//   query_weight    (width), of the norm of queries             key_weight   (width), of the norm of keys
//   cosine, sine    (1 or batch, seq, width), the sines of the first half negative
//   mask            (1 or batch, seq, seq), what each token may look at among those up to itself; null: all of them
//   out             (batch, seq, heads · width)
//   log_sum         (batch, heads, seq), of the exponentials of a query's scores
// `width` is a multiple of COLUMNS.

#include <utility>

#include "simd.h"

namespace {

constexpr int COLUMNS = 16;          // of a tile
constexpr int64_t BLOCK = 96;        // queries that are weighed at once, a multiple of every ROWS

struct Shape {
    int64_t batch, seq, heads, kv_heads, width, positions, masks;  // the last two: rows of the table and masks, 1 or batch
    float eps;

    int64_t row() const { return (heads + 2 * kv_heads) * width; }
    int64_t padded() const { return (seq + BLOCK - 1) / BLOCK * BLOCK; }
    // A row of weights has room for a tile that ends behind the diagonal. Its length is no power of two, so that rows
    // do not push each other out of the cache.
    int64_t weights_row() const { return padded() + COLUMNS; }
};

// Has a row brought near that is needed, or written, soon: those of a head lie too far apart for the processor to guess.
template <bool WRITES = false>
void fetch(const float *row, int64_t width) {
    for (int64_t d = 0; d < width; d += COLUMNS) __builtin_prefetch(row + d, WRITES);
}

constexpr int64_t AHEAD = 8;  // rows that are fetched before they are needed

// A row and its place in the tables.
struct Norm {
    const float *weight, *cosine, *sine;
    int64_t width;
    float eps;

    float scale(const float *x) const {
        return 1.0f / std::sqrt(sum_over(width, [&](int64_t j) { return x[j] * x[j]; }) / width + eps);
    }

    // out = by · rope(norm(x)) at a position.
    void apply(const float *x, int64_t position, float by, float *out) const {
        const float r = by * scale(x);
        const float *cos = cosine + position * width, *sin = sine + position * width;
        const int64_t half = width / 2;
#pragma omp simd
        for (int64_t j = 0; j < half; j++) {
            const float a = x[j] * r * weight[j], b = x[j + half] * r * weight[j + half];
            out[j] = a * cos[j] + b * sin[j];
            out[j + half] = b * cos[j + half] + a * sin[j + half];
        }
    }

    // x_grad from the gradient of what `apply` gives; adds to weight_grad.
    void grad(const float *grad, const float *x, int64_t position, float by, float *x_grad, float *weight_grad) const {
        const float r = scale(x);
        const float *cos = cosine + position * width, *sin = sine + position * width;
        const int64_t half = width / 2;
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t j = 0; j < half; j++) {
            const float a = by * (grad[j] * cos[j] + grad[j + half] * sin[j + half]);
            const float b = by * (grad[j + half] * cos[j + half] + grad[j] * sin[j]);
            weight_grad[j] += a * x[j] * r;
            weight_grad[j + half] += b * x[j + half] * r;
            x_grad[j] = a * weight[j];
            x_grad[j + half] = b * weight[j + half];
            dot += x_grad[j] * x[j] + x_grad[j + half] * x[j + half];
        }
        const float along = dot * r * r / width;
#pragma omp simd
        for (int64_t j = 0; j < width; j++) x_grad[j] = r * (x_grad[j] - x[j] * along);
    }
};

// Panels of COLUMNS rows, each transposed: as right operand they give products with the rows.
void transpose(const float *rows, int64_t row, int64_t count, int64_t width, float *out) {
    for (int64_t t = 0; t < count; t += COLUMNS) {
        const int64_t inside = std::min<int64_t>(COLUMNS, count - t);
        for (int64_t d = 0; d < width; d++)
            for (int64_t i = 0; i < inside; i++) out[(t * width) + d * COLUMNS + i] = rows[(t + i) * row + d];
    }
}

constexpr auto multiply = multiply_tile<ROWS, COLUMNS / LANES>;

// The `count` queries from `start` on, of which query i looks at tokens up to start + i: products below leave out the tiles
// that are empty, and end with the last tile that is not.
struct Block {
    int64_t start, count, width, weights_row;

    // weights (queries, tokens) = left (queries, width) · rightᵀ, given in panels.
    void weigh(const float *left, const float *panels, float *weights) const {
        for (int64_t j = 0; j < start + count; j += COLUMNS)
            for (int64_t i = std::max<int64_t>(0, (j - start) / ROWS * ROWS); i < count; i += ROWS)
                multiply(width, left + i * width, width, 1, panels + j * width, COLUMNS,
                         weights + i * weights_row + j, weights_row, false);
    }

    // out (queries, width) = weights · right (tokens, width).
    void mix(const float *weights, const float *right, float *out) const {
        for (int64_t d = 0; d < width; d += COLUMNS)
            for (int64_t i = 0; i < count; i += ROWS)
                multiply(start + std::min<int64_t>(i + ROWS, count), weights + i * weights_row, weights_row, 1,
                         right + d, width, out + i * width + d, width, false);
    }

    // out (tokens, width) = weightsᵀ · right (queries, width); `keep` adds to out.
    void spread(const float *weights, const float *right, float *out, bool keep) const {
        for (int64_t d = 0; d < width; d += COLUMNS)
            for (int64_t j = 0; j < start + count; j += ROWS) {
                const int64_t first = std::max<int64_t>(0, j - start);
                multiply(count - first, weights + first * weights_row + j, 1, weights_row,
                         right + first * width + d, width, out + j * width + d, width, keep);
            }
    }

    // Tiles reach over the diagonal: row i has zeros there.
    void close(float *weights, int64_t i) const {
        float *row = weights + i * weights_row + start;
        std::fill(row + i + 1, row + i + ROWS, 0.0f);
    }
};

// Turns scores into exponentials of what they are under their largest. Returns the largest, and the sum.
template <class Sees>
std::pair<float, float> exponentials(float *scores, int64_t count, Sees sees) {
    float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < count; j++) largest = std::max(largest, sees(j) ? scores[j] : -INFINITY);
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < count; j++) {
        scores[j] = sees(j) ? exponential(scores[j] - largest) : 0.0f;
        total += scores[j];
    }
    return {largest, total};
}

// Turns scores into weights, and the gradients of weights into those of scores.
template <class Sees>
void softmax_grad(float *scores, float *grad, int64_t count, float log_sum, float mean_grad, Sees sees) {
#pragma omp simd
    for (int64_t j = 0; j < count; j++) {
        scores[j] = sees(j) ? exponential(scores[j] - log_sum) : 0.0f;
        grad[j] = sees(j) ? scores[j] * (grad[j] - mean_grad) : 0.0f;
    }
}

// Calls `run` with what says whether token `last` sees another, and how many it is to be asked of: those up to itself, and
// more where that makes whole vectors.
template <class Run>
void with_sight(const uint8_t *row, int64_t last, Run run) {
    if (row)
        run([row](int64_t j) { return row[j] != 0; }, last + 1);
    else
        run([last](int64_t j) { return j <= last; }, (last / LANES + 1) * LANES);
}

// Where a head of keys and values of one sequence begins in the arrays.
struct Head {
    const Shape &shape;
    int64_t sequence, index;

    int64_t group() const { return shape.heads / shape.kv_heads; }
    int64_t key() const { return sequence * shape.seq * shape.row() + (shape.heads + index) * shape.width; }
    int64_t value() const { return key() + shape.kv_heads * shape.width; }
    int64_t query(int64_t head, int64_t token) const {
        return (sequence * shape.seq + token) * shape.row() + head * shape.width;
    }
    int64_t out(int64_t head, int64_t token) const {
        return ((sequence * shape.seq + token) * shape.heads + head) * shape.width;
    }
    int64_t log_sum(int64_t head, int64_t token) const {
        return (sequence * shape.heads + head) * shape.seq + token;
    }
    Norm norm(const float *weight, const float *cosine, const float *sine) const {
        const int64_t table = shape.positions == 1 ? 0 : sequence * shape.seq * shape.width;
        return {weight, cosine + table, sine + table, shape.width, shape.eps};
    }
    const uint8_t *mask_row(const uint8_t *mask, int64_t token) const {
        return mask ? mask + ((shape.masks == 1 ? 0 : sequence * shape.seq) + token) * shape.seq : nullptr;
    }
};

}  // namespace

extern "C" {

void attention(const float *qkv, const float *query_weight, const float *key_weight, const float *cosine, const float *sine,
               const uint8_t *mask, float *out, float *log_sum, int64_t batch, int64_t seq, int64_t heads, int64_t kv_heads,
               int64_t width, int64_t positions, int64_t masks, float eps, int threads) {
    const Shape shape{batch, seq, heads, kv_heads, width, positions, masks, eps};
    const float scale = 1.0f / std::sqrt(float(width));
    const int64_t whole = shape.padded() * width, block_size = BLOCK * width;
#pragma omp parallel num_threads(threads)
    {
        const Room room(3 * whole + 2 * block_size + BLOCK * shape.weights_row());
        float *key = room, *panels = key + whole, *value = panels + whole, *query = value + whole, *mixed = query + block_size;
        float *weights = mixed + block_size;
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < batch * kv_heads; unit++) {
            const Head head{shape, unit / kv_heads, unit % kv_heads};
            const Norm query_norm = head.norm(query_weight, cosine, sine), key_norm = head.norm(key_weight, cosine, sine);
            for (int64_t t = 0; t < seq; t++) {
                fetch(qkv + head.key() + (t + AHEAD) * shape.row(), width);
                fetch(qkv + head.value() + (t + AHEAD) * shape.row(), width);
                key_norm.apply(qkv + head.key() + t * shape.row(), t, 1.0f, key + t * width);
                std::memcpy(value + t * width, qkv + head.value() + t * shape.row(), width * sizeof(float));
            }
            transpose(key, width, seq, width, panels);
            for (int64_t q = head.index * head.group(); q < (head.index + 1) * head.group(); q++)
                for (int64_t start = 0; start < seq; start += BLOCK) {
                    const Block block{start, std::min(BLOCK, seq - start), width, shape.weights_row()};
                    for (int64_t i = 0; i < block.count; i++) {
                        fetch(qkv + head.query(q, start + i + AHEAD), width);
                        query_norm.apply(qkv + head.query(q, start + i), start + i, scale, query + i * width);
                        fetch<true>(out + head.out(q, start + i), width);
                    }
                    block.weigh(query, panels, weights);
                    float share[BLOCK];
                    for (int64_t i = 0; i < block.count; i++) {
                        with_sight(head.mask_row(mask, start + i), start + i, [&](auto sees, int64_t tokens) {
                            const auto [largest, total] = exponentials(weights + i * block.weights_row, tokens, sees);
                            share[i] = 1.0f / total;
                            log_sum[head.log_sum(q, start + i)] = largest + std::log(total);
                        });
                        block.close(weights, i);
                    }
                    block.mix(weights, value, mixed);
                    for (int64_t i = 0; i < block.count; i++) {
                        float *to = out + head.out(q, start + i);
#pragma omp simd
                        for (int64_t d = 0; d < width; d++) to[d] = mixed[i * width + d] * share[i];
                    }
                }
        }
    }
}

// qkv_grad as qkv, and weight_grad (batch · kv_heads, 2, width): each head's part of the gradients of both norms' weights.
void attention_grad(const float *grad, const float *qkv, const float *query_weight, const float *key_weight,
                    const float *cosine, const float *sine, const uint8_t *mask, const float *out, const float *log_sum,
                    float *qkv_grad, float *weight_grad, int64_t batch, int64_t seq, int64_t heads, int64_t kv_heads,
                    int64_t width, int64_t positions, int64_t masks, float eps, int threads) {
    const Shape shape{batch, seq, heads, kv_heads, width, positions, masks, eps};
    const float scale = 1.0f / std::sqrt(float(width));
    const int64_t whole = shape.padded() * width, block_size = BLOCK * width, weights_size = BLOCK * shape.weights_row();
#pragma omp parallel num_threads(threads)
    {
        const Room room(5 * whole + 3 * block_size + 2 * weights_size);
        float *key = room, *key_panels = key + whole, *value_panels = key_panels + whole;
        float *key_grad = value_panels + whole, *value_grad = key_grad + whole;
        float *query = value_grad + whole, *query_grad = query + block_size, *out_grad = query_grad + block_size;
        float *weights = out_grad + block_size, *scores_grad = weights + weights_size;
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < batch * kv_heads; unit++) {
            const Head head{shape, unit / kv_heads, unit % kv_heads};
            const Norm query_norm = head.norm(query_weight, cosine, sine), key_norm = head.norm(key_weight, cosine, sine);
            float *query_weight_grad = weight_grad + unit * 2 * width, *key_weight_grad = query_weight_grad + width;
            std::fill(query_weight_grad, query_weight_grad + 2 * width, 0.0f);
            for (int64_t t = 0; t < seq; t++) {
                fetch(qkv + head.key() + (t + AHEAD) * shape.row(), width);
                fetch(qkv + head.value() + t * shape.row(), width);
                key_norm.apply(qkv + head.key() + t * shape.row(), t, 1.0f, key + t * width);
            }
            transpose(key, width, seq, width, key_panels);
            transpose(qkv + head.value(), shape.row(), seq, width, value_panels);
            bool keep = false;
            for (int64_t q = head.index * head.group(); q < (head.index + 1) * head.group(); q++)
                // The last block comes first: it sees, and so sets, the gradients of all keys.
                for (int64_t start = shape.padded() - BLOCK; start >= 0; start -= BLOCK) {
                    const Block block{start, std::min(BLOCK, seq - start), width, shape.weights_row()};
                    for (int64_t i = 0; i < block.count; i++) {
                        fetch(qkv + head.query(q, start + i + AHEAD), width);
                        fetch(grad + head.out(q, start + i + AHEAD), width);
                        fetch(out + head.out(q, start + i), width);
                        fetch<true>(qkv_grad + head.query(q, start + i), width);
                        query_norm.apply(qkv + head.query(q, start + i), start + i, scale, query + i * width);
                        std::memcpy(out_grad + i * width, grad + head.out(q, start + i), width * sizeof(float));
                    }
                    block.weigh(query, key_panels, weights);
                    block.weigh(out_grad, value_panels, scores_grad);
                    for (int64_t i = 0; i < block.count; i++) {
                        const float *of = out_grad + i * width, *mixed = out + head.out(q, start + i);
                        const float mean = sum_over(width, [&](int64_t d) { return of[d] * mixed[d]; });
                        with_sight(head.mask_row(mask, start + i), start + i, [&](auto sees, int64_t tokens) {
                            softmax_grad(weights + i * block.weights_row, scores_grad + i * block.weights_row, tokens,
                                         log_sum[head.log_sum(q, start + i)], mean, sees);
                        });
                        block.close(weights, i);
                        block.close(scores_grad, i);
                    }
                    block.spread(weights, out_grad, value_grad, keep);
                    block.spread(scores_grad, query, key_grad, keep);
                    block.mix(scores_grad, key, query_grad);
                    for (int64_t i = 0; i < block.count; i++)
                        query_norm.grad(query_grad + i * width, qkv + head.query(q, start + i), start + i, scale,
                                        qkv_grad + head.query(q, start + i), query_weight_grad);
                    keep = true;
                }
            for (int64_t t = 0; t < seq; t++) {
                fetch(qkv + head.key() + (t + AHEAD) * shape.row(), width);
                fetch<true>(qkv_grad + head.key() + (t + AHEAD) * shape.row(), width);
                fetch<true>(qkv_grad + head.value() + (t + AHEAD) * shape.row(), width);
                key_norm.grad(key_grad + t * width, qkv + head.key() + t * shape.row(), t, 1.0f,
                              qkv_grad + head.key() + t * shape.row(), key_weight_grad);
                std::memcpy(qkv_grad + head.value() + t * shape.row(), value_grad + t * width, width * sizeof(float));
            }
        }
    }
}

}  // extern "C"
