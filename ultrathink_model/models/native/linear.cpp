// Linear layers: see linear.py. All arrays are row-major.

#include <memory>

#include "product.h"

extern "C" {

// out (rows, outer) = x (rows, inner) · weightᵀ (outer, inner).
void linear(const float *x, const float *weight, float *out, int64_t rows, int64_t inner, int64_t outer, int threads) {
    Right right({weight, inner, true}, inner, outer);
    Parts parts(rows, threads);
#pragma omp parallel num_threads(threads)
    {
        const OneThread one;
        right.pack();
        wait_for_all();
        parts.each([&](int64_t start, int64_t count) {
            right.multiply({x + start * inner, inner}, count, out + start * outer, outer);
        });
    }
}

// x_grad (rows, inner) = grad (rows, outer) · weight, if there is a weight, and weight_grad (outer, inner) = gradᵀ · x, if
// there is an x.
void linear_grad(const float *grad, const float *x, const float *weight, float *x_grad, float *weight_grad, int64_t rows,
                 int64_t inner, int64_t outer, int threads) {
    std::unique_ptr<Right> by_weight, by_x;
    if (weight) by_weight.reset(new Right({weight, inner}, outer, inner));
    if (x) by_x.reset(new Right({x, inner}, rows, inner));
    Parts x_parts(rows, threads), weight_parts(outer, threads);
#pragma omp parallel num_threads(threads)
    {
        const OneThread one;
        if (weight) by_weight->pack();
        if (x) by_x->pack();
        wait_for_all();
        if (weight)
            x_parts.each([&](int64_t start, int64_t count) {
                by_weight->multiply({grad + start * outer, outer}, count, x_grad + start * inner, inner);
            });
        if (x) multiply_transposed(grad, *by_x, outer, weight_parts, weight_grad, inner);
    }
}

}  // extern "C"
