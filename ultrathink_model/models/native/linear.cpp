// Linear layers: see linear.py. All arrays are row-major.

#include "product.h"

extern "C" {

// out (rows, outer) = x (rows, inner) · weightᵀ (outer, inner).
void linear(const float *x, const float *weight, float *out, int64_t rows, int64_t inner, int64_t outer, int threads) {
    Right right({weight, inner, true}, inner, outer);
#pragma omp parallel num_threads(threads)
    {
        const OneThread one;
        right.pack();
        multiply(x, inner, right, rows, out, outer);
    }
}

// x_grad (rows, inner) = grad (rows, outer) · weight.
void linear_input_grad(const float *grad, const float *weight, float *x_grad, int64_t rows, int64_t inner, int64_t outer,
                       int threads) {
    Right right({weight, inner}, outer, inner);
#pragma omp parallel num_threads(threads)
    {
        const OneThread one;
        right.pack();
        multiply(grad, outer, right, rows, x_grad, inner);
    }
}

// weight_grad (outer, inner) = gradᵀ · x.
void linear_weight_grad(const float *grad, const float *x, float *weight_grad, int64_t rows, int64_t inner, int64_t outer,
                        int threads) {
    Right right({x, inner}, rows, inner);
#pragma omp parallel num_threads(threads)
    {
        const OneThread one;
        right.pack();
        multiply_transposed(grad, right, outer, weight_grad, inner, threads);
    }
}

}  // extern "C"
