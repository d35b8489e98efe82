// The gated feed-forward, forwards and backwards: see feed_forward.py. All arrays are row-major:
//   x, out     (rows, hidden)
//   gate_up    (2 width, hidden), gate before up
//   down       (hidden, width)
//   inner      (rows, 2 width): gate_up's products, kept for the backward pass
// A thread takes a block of rows from the first product to the last, while its cache holds them.

#include "product.h"

extern "C" {

void feed_forward(const float *x, const float *gate_up, const float *down, float *inner, float *out, int64_t rows,
                  int64_t hidden, int64_t width, int threads) {
    Right first({gate_up, hidden, true}, hidden, 2 * width), second({down, width, true}, width, hidden);
    Parts parts(rows, threads);
#pragma omp parallel num_threads(threads)
    {
        const OneThread one;
        first.pack();
        second.pack();
        wait_for_all();
        const Room units(BLOCK * width);
        parts.each([&](int64_t start, int64_t count) {
            float *both = inner + start * 2 * width;
            first.multiply({x + start * hidden, hidden}, count, both, 2 * width);
            for (int64_t i = 0; i < count; i++) {
                const float *gate = both + i * 2 * width, *up = gate + width;
                float *to = units + i * width;
#pragma omp simd
                for (int64_t j = 0; j < width; j++) to[j] = gate[j] * sigmoid(gate[j]) * up[j];
            }
            second.multiply({units, width}, count, out + start * hidden, hidden);
        });
    }
}

// inner_grad (rows, 2 width) is room for what the gradients of the weights are made of.
void feed_forward_grad(const float *grad, const float *x, const float *gate_up, const float *down, const float *inner,
                       float *inner_grad, float *x_grad, float *gate_up_grad, float *down_grad, int64_t rows, int64_t hidden,
                       int64_t width, int threads) {
    Right by_down({down, width}, hidden, width), by_gate_up({gate_up, hidden}, 2 * width, hidden);
    Right by_x({x, hidden}, rows, hidden), by_units(rows, width);
    Parts parts(rows, threads), gate_up_parts(2 * width, threads), down_parts(hidden, threads);
#pragma omp parallel num_threads(threads)
    {
        const OneThread one;
        by_down.pack();
        by_gate_up.pack();
        by_x.pack();
        wait_for_all();
        const Room units_grad(BLOCK * width);
        parts.each([&](int64_t start, int64_t count) {
            by_down.multiply({grad + start * hidden, hidden}, count, units_grad, width);
            for (int64_t i = 0; i < count; i++)
                by_units.write_row(start + i, [&](float *to, int64_t first, auto columns) {
                    const float *gate = inner + (start + i) * 2 * width + first, *up = gate + width;
                    const float *from = units_grad + i * width + first;
                    float *to_gate = inner_grad + (start + i) * 2 * width + first, *to_up = to_gate + width;
#pragma omp simd
                    for (int64_t j = 0; j < columns; j++) {
                        const float open = sigmoid(gate[j]), silu = gate[j] * open;
                        to[j] = silu * up[j];
                        to_up[j] = from[j] * silu;
                        to_gate[j] = from[j] * up[j] * (open + silu * (1.0f - open));
                    }
                });
            by_gate_up.multiply({inner_grad + start * 2 * width, 2 * width}, count, x_grad + start * hidden, hidden);
        });
        wait_for_all();
        multiply_transposed(inner_grad, by_x, 2 * width, gate_up_parts, gate_up_grad, hidden);
        multiply_transposed(grad, by_units, hidden, down_parts, down_grad, width);
    }
}

}  // extern "C"
