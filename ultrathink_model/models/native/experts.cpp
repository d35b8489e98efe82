// Experts' feed-forwards, forwards and backwards: see experts.py.
//
// A thread takes one expert after another, and of that a block of copies of tokens which its cache holds: it gathers
// their rows, multiplies, activates and multiplies again before it goes on. All arrays are row-major and contiguous:
//   x, grad   (tokens, hidden)            weight    (tokens, top_k), of each copy in the sum of its token
//   slot      (copies), index of each     place     (tokens, top_k), where in the order of experts each copy is
//             in weight and place         ends      (experts), one past the last copy of each
//   gate_up   (experts, 2 width, hidden), gate before up
//   down      (experts, hidden, width)
//   inner     (copies, 2 width): gate_up's products, kept for the backward pass
// Copies of no expert stand behind the last end, and add nothing.

#include <atomic>

#include "product.h"

namespace {

constexpr int64_t COPIES = 256;  // that a thread takes at once

// out (rows, columns) = left (rows, inner) · right (inner, columns), either of them stored transposed; `keep` adds to out.
void multiply(bool left_transposed, bool right_transposed, int64_t rows, int64_t columns, int64_t inner, const float *left,
              const float *right, float *out, bool keep = false) {
    Right packed({right, right_transposed ? inner : columns, right_transposed}, inner, columns);
    packed.pack_alone();
    packed.multiply({left, left_transposed ? rows : inner, left_transposed}, rows, out, columns, keep);
}

void gather(const float *source, const int64_t *slot, int64_t top_k, int copies, int64_t width, float *out) {
    for (int i = 0; i < copies; i++) std::memcpy(out + i * width, source + slot[i] / top_k * width, width * sizeof(float));
}

// out (tokens, width): the sum of each token's rows, but for those from `end` on.
void sum_copies(const float *rows, const int64_t *place, int64_t end, int64_t tokens, int64_t top_k, int64_t width,
                int threads, float *out) {
#pragma omp parallel for num_threads(threads)
    for (int64_t token = 0; token < tokens; token++) {
        float *to = out + token * width;
        std::fill(to, to + width, 0.0f);
        for (int64_t k = 0; k < top_k; k++) {
            const int64_t at = place[token * top_k + k];
            if (at >= end) continue;
            const float *row = rows + at * width;
#pragma omp simd
            for (int64_t j = 0; j < width; j++) to[j] += row[j];
        }
    }
}

// Calls `run(expert, scratch)` for each, every thread taking the next that is left and having `size` floats of its own.
template <class Run>
void each_expert(int64_t num_experts, int threads, int64_t size, Run run) {
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
    {
        const OneThread one;
        const Room scratch(size);
        for (int64_t expert; (expert = next++) < num_experts;) run(expert, scratch);
    }
}

}  // namespace

extern "C" {

// mixed (tokens, hidden): the sum over each token's copies of weight · down(silu(gate) · up).
void experts(const float *x, const float *weight, const int64_t *slot, const int64_t *place, const int32_t *ends,
             const float *gate_up, const float *down, float *inner, float *out, float *mixed, int64_t tokens,
             int64_t top_k, int64_t num_experts, int64_t hidden, int64_t width, int threads) {
    each_expert(num_experts, threads, COPIES * (hidden + width), [&](int64_t expert, float *rows) {
        float *active = rows + COPIES * hidden;
        const int64_t first = expert ? ends[expert - 1] : 0;
        for (int64_t start = first; start < ends[expert]; start += COPIES) {
            const int count = std::min<int64_t>(COPIES, ends[expert] - start);
            float *units = inner + start * 2 * width;
            gather(x, slot + start, top_k, count, hidden, rows);
            multiply(false, true, count, 2 * width, hidden, rows, gate_up + expert * 2 * width * hidden, units);
            for (int i = 0; i < count; i++) {
                const float *gate = units + i * 2 * width, *up = gate + width, by = weight[slot[start + i]];
                float *to = active + i * width;
#pragma omp simd
                for (int64_t j = 0; j < width; j++) to[j] = gate[j] * sigmoid(gate[j]) * up[j] * by;
            }
            multiply(false, true, count, hidden, width, active, down + expert * hidden * width, out + start * hidden);
        }
    });
    sum_copies(out, place, ends[num_experts - 1], tokens, top_k, hidden, threads, mixed);
}

// x_grad (tokens, hidden), weight_grad (tokens, top_k), and the gradients of both matrices; copies_grad is room for (copies,
// hidden).
void experts_grad(const float *grad, const float *x, const float *weight, const int64_t *slot, const int64_t *place,
                  const int32_t *ends, const float *gate_up, const float *down, const float *inner, float *copies_grad,
                  float *x_grad, float *weight_grad, float *gate_up_grad, float *down_grad, int64_t tokens, int64_t top_k,
                  int64_t num_experts, int64_t hidden, int64_t width, int threads) {
    std::fill(weight_grad, weight_grad + tokens * top_k, 0.0f);
    each_expert(num_experts, threads, COPIES * (2 * hidden + 4 * width), [&](int64_t expert, float *rows) {
        float *out_grad = rows + COPIES * hidden, *active = out_grad + COPIES * hidden;
        float *active_grad = active + COPIES * width, *units_grad = active_grad + COPIES * width;
        const int64_t size = hidden * width, first = expert ? ends[expert - 1] : 0;
        float *to_gate_up = gate_up_grad + expert * 2 * size, *to_down = down_grad + expert * size;
        if (first == ends[expert]) {
            std::fill(to_gate_up, to_gate_up + 2 * size, 0.0f);
            std::fill(to_down, to_down + size, 0.0f);
        }
        for (int64_t start = first; start < ends[expert]; start += COPIES) {
            const int count = std::min<int64_t>(COPIES, ends[expert] - start);
            const bool later = start > first;
            gather(x, slot + start, top_k, count, hidden, rows);
            gather(grad, slot + start, top_k, count, hidden, out_grad);
            multiply(false, false, count, width, hidden, out_grad, down + expert * size, active_grad);
            for (int i = 0; i < count; i++) {
                const float *gate = inner + (start + i) * 2 * width, *up = gate + width, by = weight[slot[start + i]];
                const float *from = active_grad + i * width;
                float *to = active + i * width, *to_gate = units_grad + i * 2 * width, *to_up = to_gate + width;
                float total = 0;
#pragma omp simd reduction(+ : total)
                for (int64_t j = 0; j < width; j++) {
                    const float open = sigmoid(gate[j]), silu = gate[j] * open, unit = silu * up[j], scaled = from[j] * by;
                    total += from[j] * unit;
                    to[j] = unit * by;
                    to_up[j] = scaled * silu;
                    to_gate[j] = scaled * up[j] * (open + silu * (1.0f - open));
                }
                weight_grad[slot[start + i]] = total;
            }
            multiply(true, false, hidden, width, count, out_grad, active, to_down, later);
            multiply(true, false, 2 * width, hidden, count, units_grad, rows, to_gate_up, later);
            multiply(false, false, count, hidden, 2 * width, units_grad, gate_up + expert * 2 * size,
                     copies_grad + start * hidden);
        }
    });
    sum_copies(copies_grad, place, ends[num_experts - 1], tokens, top_k, hidden, threads, x_grad);
}

}  // extern "C"
