// Root-mean-square normalisation, each way in one pass over memory: see norm.py. All arrays are row-major.

#include "simd.h"

namespace {

constexpr int64_t CHUNK = 64;       // rows whose part of the weight's gradient is summed apart, whatever the threads
constexpr int64_t SMALL = 1 << 15;  // floats under which threads take longer to start than to help

int threads_for(int64_t size, int threads) { return size < SMALL ? 1 : threads; }

}  // namespace

extern "C" {

// out (rows, width) = x / sqrt(mean(x²) + eps) · weight.
void rms_norm(const float *x, const float *weight, float *out, int64_t rows, int64_t width, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * width, threads))
    for (int64_t i = 0; i < rows; i++) {
        const float *row = x + i * width;
        const float r = 1.0f / std::sqrt(sum_over(width, [&](int64_t j) { return row[j] * row[j]; }) / width + eps);
        float *to = out + i * width;
#pragma omp simd
        for (int64_t j = 0; j < width; j++) to[j] = row[j] * r * weight[j];
    }
}

// x_grad (rows, width) and weight_grad (width).
void rms_norm_grad(const float *grad, const float *x, const float *weight, float *x_grad, float *weight_grad, int64_t rows,
                   int64_t width, float eps, int threads) {
    const int64_t chunks = (rows + CHUNK - 1) / CHUNK;
    const Room parts(chunks * width);
    std::fill(parts + 0, parts + chunks * width, 0.0f);
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * width, threads))
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        float *part = parts + chunk * width;
        for (int64_t i = chunk * CHUNK; i < std::min(rows, (chunk + 1) * CHUNK); i++) {
            const float *row = x + i * width, *from = grad + i * width;
            float *to = x_grad + i * width, squares = 0, dot = 0;
#pragma omp simd reduction(+ : squares, dot)
            for (int64_t j = 0; j < width; j++) {
                squares += row[j] * row[j];
                dot += from[j] * weight[j] * row[j];
            }
            const float r = 1.0f / std::sqrt(squares / width + eps), along = dot * r * r / width;
#pragma omp simd
            for (int64_t j = 0; j < width; j++) {
                to[j] = r * (from[j] * weight[j] - row[j] * along);
                part[j] += from[j] * row[j] * r;
            }
        }
    }
    std::fill(weight_grad, weight_grad + width, 0.0f);
    for (int64_t chunk = 0; chunk < chunks; chunk++)
        for (int64_t j = 0; j < width; j++) weight_grad[j] += parts[chunk * width + j];
}

}  // extern "C"
