// The cross-entropy of a chunk of tokens from their last states on, with its gradients: see loss.py.
//
// A thread takes a block of rows from its logits to the gradient of its states, while its cache holds them. All arrays are
// row-major.

#include <memory>

#include "product.h"

namespace {

struct Loss {
    float whole, z_loss;
};

// Of a row of logits, which becomes its gradient if `grads`.
Loss row_loss(float *row, int64_t vocab, int64_t label, float z_loss_weight, bool grads) {
    if (label < 0) {
        if (grads) std::fill(row, row + vocab, 0.0f);
        return {0.0f, 0.0f};
    }
    const float chosen = row[label];
    float largest = -INFINITY, total = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < vocab; j++) largest = std::max(largest, row[j]);
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < vocab; j++) {
        row[j] = exponential(row[j] - largest);
        total += row[j];
    }
    const float log_sum = largest + std::log(total), z_loss = z_loss_weight * log_sum * log_sum;
    if (grads) {
        const float scale = (1.0f + 2.0f * z_loss_weight * log_sum) / total;
#pragma omp simd
        for (int64_t j = 0; j < vocab; j++) row[j] *= scale;
        row[label] -= 1.0f;
    }
    return {log_sum - chosen + z_loss, z_loss};
}

}  // namespace

extern "C" {

// losses (2, rows): each row's cross-entropy with its z-loss, and its z-loss. hidden (rows, hidden_size), weight (vocab,
// hidden_size), labels negative where there is none; logits is room for (rows, vocab). hidden_grad and weight_grad may be
// null; weight_grad is added to.
void cross_entropy(const float *hidden, const float *weight, const int64_t *labels, float *logits, float *losses,
                   float *hidden_grad, float *weight_grad, int64_t rows, int64_t hidden_size, int64_t vocab,
                   float z_loss_weight, int threads) {
    Right forward({weight, hidden_size, true}, hidden_size, vocab);
    std::unique_ptr<Right> backward, by_hidden;
    if (hidden_grad) backward.reset(new Right({weight, hidden_size}, vocab, hidden_size));
    if (weight_grad) by_hidden.reset(new Right({hidden, hidden_size}, rows, hidden_size));
    Parts parts(rows, threads), weight_parts(vocab, threads);
#pragma omp parallel num_threads(threads)
    {
        const OneThread one;
        forward.pack();
        if (backward) backward->pack();
        if (by_hidden) by_hidden->pack();
        wait_for_all();
        parts.each([&](int64_t start, int64_t count) {
            float *of = logits + start * vocab;
            forward.multiply({hidden + start * hidden_size, hidden_size}, count, of, vocab);
            for (int64_t i = 0; i < count; i++) {
                const Loss loss = row_loss(of + i * vocab, vocab, labels[start + i], z_loss_weight, hidden_grad || weight_grad);
                losses[start + i] = loss.whole;
                losses[rows + start + i] = loss.z_loss;
            }
            if (backward) backward->multiply({of, vocab}, count, hidden_grad + start * hidden_size, hidden_size);
        });
        wait_for_all();
        if (by_hidden) multiply_transposed(logits, *by_hidden, vocab, weight_parts, weight_grad, hidden_size, true);
    }
}

}  // extern "C"
