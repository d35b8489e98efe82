// Experts' feed-forwards, forwards and backwards, for float32 on a processor: see fused_experts.py.
//
// A thread takes one expert after another, and of that a block of copies of tokens which its cache holds: it gathers
// their rows, multiplies, activates and multiplies again before it goes on. All arrays are row-major and contiguous:
//   x, grad   (tokens, hidden)            ends     (experts), one past the last copy of each
//   token     (copies), each copy's       gate_up  (experts, 2 width, hidden), gate before up
//   scale     (copies)                    down     (experts, hidden, width)
//   inner     (copies, 2 width): gate_up's products, kept for the backward pass
// Results for a copy of no expert, behind the last end, are zero.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using Product = void (*)(const char *, const char *, const int *, const int *, const int *, const float *, const float *,
                         const int *, const float *, const int *, const float *, float *, const int *);
using SetThreads = int (*)(int);

constexpr int BLOCK = 256;  // copies

Product sgemm;
SetThreads set_threads_of_products;

// out (rows, columns) = left (rows, inner) · right (inner, columns), either of them stored transposed; `keep` adds to out.
// The library's matrices are column-major: it is asked for outᵀ = rightᵀ · leftᵀ.
void multiply(bool left_transposed, bool right_transposed, int rows, int columns, int inner, const float *left,
              const float *right, float *out, bool keep = false) {
    const float one = 1, old = keep;
    const int left_row = left_transposed ? rows : inner, right_row = right_transposed ? inner : columns;
    sgemm(right_transposed ? "T" : "N", left_transposed ? "T" : "N", &columns, &rows, &inner, &one, right, &right_row,
          left, &left_row, &old, out, &columns);
}

// 1 / (1 + exp(-x)) in a form that compilers vectorise. exp(y) is 2ⁿ · exp(r) with |r| ≤ ln(2) / 2, and that by its
// Taylor series up to r⁷, whose remainder is under 6e-9.
inline float sigmoid(float x) {
    const float to_integer = 12582912.0f;  // 1.5 · 2²³: adding it leaves an integer in the last bits
    const float y = std::min(std::max(-x, -87.0f), 87.0f);
    const float shifted = y * 1.44269504f + to_integer;
    const float n = shifted - to_integer;
    const float r = (y - n * 0.693145752f) - n * 1.42860677e-6f;  // ln(2) in two parts, the first with zeros at its end
    float e = 1.0f / 5040;
    e = e * r + 1.0f / 720;
    e = e * r + 1.0f / 120;
    e = e * r + 1.0f / 24;
    e = e * r + 1.0f / 6;
    e = e * r + 0.5f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    int32_t bits;
    std::memcpy(&bits, &e, sizeof bits);
    int32_t exponent;
    std::memcpy(&exponent, &shifted, sizeof exponent);
    bits += exponent << 23;
    std::memcpy(&e, &bits, sizeof e);
    return 1.0f / (1.0f + e);
}

void gather(const float *source, const int64_t *token, int copies, int64_t width, float *out) {
    for (int i = 0; i < copies; i++) std::memcpy(out + i * width, source + token[i] * width, width * sizeof(float));
}

// Calls `run(expert)` for each, every thread taking the next that is left.
template <class Run>
void each_expert(int64_t experts, int threads, Run run) {
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
    {
        const int before = set_threads_of_products(1);
        for (int64_t expert; (expert = next++) < experts;) run(expert);
        set_threads_of_products(before);
    }
}

}  // namespace

extern "C" {

void use_library(Product product, SetThreads set_threads) {
    sgemm = product;
    set_threads_of_products = set_threads;
}

// out (copies, hidden): scale · down(silu(gate) · up).
void forward(const float *x, const int64_t *token, const float *scale, const int32_t *ends, const float *gate_up,
             const float *down, float *inner, float *out, int64_t copies, int64_t experts, int64_t hidden, int64_t width,
             int threads) {
    each_expert(experts, threads, [&](int64_t expert) {
        std::vector<float> rows(BLOCK * hidden), active(BLOCK * width);
        const int64_t first = expert ? ends[expert - 1] : 0;
        for (int64_t start = first; start < ends[expert]; start += BLOCK) {
            const int count = std::min<int64_t>(BLOCK, ends[expert] - start);
            float *units = inner + start * 2 * width;
            gather(x, token + start, count, hidden, rows.data());
            multiply(false, true, count, 2 * width, hidden, rows.data(), gate_up + expert * 2 * width * hidden, units);
            for (int i = 0; i < count; i++) {
                const float *gate = units + i * 2 * width, *up = gate + width, by = scale[start + i];
                float *to = active.data() + i * width;
#pragma omp simd
                for (int64_t j = 0; j < width; j++) to[j] = gate[j] * sigmoid(gate[j]) * up[j] * by;
            }
            multiply(false, true, count, hidden, width, active.data(), down + expert * hidden * width, out + start * hidden);
        }
    });
    std::fill(out + ends[experts - 1] * hidden, out + copies * hidden, 0.0f);
}

// x_grad (copies, hidden), scale_grad (copies), and the gradients of both weights.
void backward(const float *grad, const float *x, const float *inner, const int64_t *token, const float *scale,
              const int32_t *ends, const float *gate_up, const float *down, float *x_grad, float *scale_grad,
              float *gate_up_grad, float *down_grad, int64_t copies, int64_t experts, int64_t hidden, int64_t width,
              int threads) {
    each_expert(experts, threads, [&](int64_t expert) {
        std::vector<float> rows(BLOCK * hidden), out_grad(BLOCK * hidden), active(BLOCK * width),
            active_grad(BLOCK * width), units_grad(BLOCK * 2 * width);
        const int64_t size = hidden * width, first = expert ? ends[expert - 1] : 0;
        float *to_gate_up = gate_up_grad + expert * 2 * size, *to_down = down_grad + expert * size;
        if (first == ends[expert]) {
            std::fill(to_gate_up, to_gate_up + 2 * size, 0.0f);
            std::fill(to_down, to_down + size, 0.0f);
        }
        for (int64_t start = first; start < ends[expert]; start += BLOCK) {
            const int count = std::min<int64_t>(BLOCK, ends[expert] - start);
            const bool later = start > first;
            gather(x, token + start, count, hidden, rows.data());
            gather(grad, token + start, count, hidden, out_grad.data());
            multiply(false, false, count, width, hidden, out_grad.data(), down + expert * size, active_grad.data());
            for (int i = 0; i < count; i++) {
                const float *gate = inner + (start + i) * 2 * width, *up = gate + width, by = scale[start + i];
                const float *from = active_grad.data() + i * width;
                float *to = active.data() + i * width, *to_gate = units_grad.data() + i * 2 * width, *to_up = to_gate + width;
                float total = 0;
#pragma omp simd reduction(+ : total)
                for (int64_t j = 0; j < width; j++) {
                    const float open = sigmoid(gate[j]), silu = gate[j] * open, unit = silu * up[j], scaled = from[j] * by;
                    total += from[j] * unit;
                    to[j] = unit * by;
                    to_up[j] = scaled * silu;
                    to_gate[j] = scaled * up[j] * (open + silu * (1.0f - open));
                }
                scale_grad[start + i] = total;
            }
            multiply(true, false, hidden, width, count, out_grad.data(), active.data(), to_down, later);
            multiply(true, false, 2 * width, hidden, count, units_grad.data(), rows.data(), to_gate_up, later);
            multiply(false, false, count, hidden, 2 * width, units_grad.data(), gate_up + expert * 2 * size,
                     x_grad + start * hidden);
        }
    });
    std::fill(x_grad + ends[experts - 1] * hidden, x_grad + copies * hidden, 0.0f);
    std::fill(scale_grad + ends[experts - 1], scale_grad + copies, 0.0f);
}

}  // extern "C"
