// Products of a thread's own, of any size: over tiles, or by MKL where that is the faster.

#pragma once

#include "simd.h"

using Sgemm = void (*)(const char *, const char *, const int *, const int *, const int *, const float *, const float *,
                       const int *, const float *, const int *, const float *, float *, const int *);
using SetThreads = int (*)(int);

// MKL's; null where our own loops are the faster, or PyTorch has none.
extern Sgemm mkl_sgemm;
extern SetThreads mkl_set_threads;

namespace {

constexpr int PANEL_VECTORS = LANES == 4 ? 4 : 2, PANEL = PANEL_VECTORS * LANES;
constexpr int64_t BLOCK = 8 * ROWS;  // rows that a thread takes at once
constexpr int64_t DEPTH = 384;       // terms of a sum that a tile takes at once, so that its operands stay in the nearest caches

// While it lives, MKL's products in this thread stay in this thread.
class OneThread {
  public:
    OneThread() : before_(mkl_set_threads ? mkl_set_threads(1) : 0) {}
    ~OneThread() {
        if (mkl_set_threads) mkl_set_threads(before_);
    }
    OneThread(const OneThread &) = delete;
    OneThread &operator=(const OneThread &) = delete;

  private:
    int before_;
};

// A row-major matrix, or the transpose of one.
struct Matrix {
    const float *at;
    int64_t row;  // floats from one row of what is stored to the next
    bool transposed = false;

    float operator()(int64_t i, int64_t j) const { return transposed ? at[j * row + i] : at[i * row + j]; }
    const float *part(int64_t i, int64_t j) const { return transposed ? at + j * row + i : at + i * row + j; }
};

// out (rows, columns) = left (rows, inner) · right (inner, columns); `keep` adds to out.
// The library's matrices are column-major: it is asked for outᵀ = rightᵀ · leftᵀ.
inline void multiply_by_mkl(const Matrix &left, const Matrix &right, int64_t rows, int64_t columns, int64_t inner, float *out,
                            int64_t out_row, bool keep) {
    const float one = 1, old = keep;
    const int m = columns, n = rows, k = inner, right_row = right.row, left_row = left.row, to = out_row;
    mkl_sgemm(right.transposed ? "T" : "N", left.transposed ? "T" : "N", &m, &n, &k, &one, right.at, &right_row, left.at,
              &left_row, &old, out, &to);
}

// A tile of at most R rows.
template <int R>
inline void multiply_rows(int64_t rows, int64_t inner, const float *left, int64_t left_row, int64_t left_column,
                           const float *panel, float *out, int64_t out_row, bool keep) {
    if constexpr (R > 1)
        if (rows < R) return multiply_rows<R - 1>(rows, inner, left, left_row, left_column, panel, out, out_row, keep);
    multiply_tile<R, PANEL_VECTORS>(inner, left, left_row, left_column, panel, PANEL, out, out_row, keep);
}

// A right operand (inner, columns), which all threads bring into panels of columns before they multiply with it.
class Right {
  public:
    Right(const Matrix &matrix, int64_t inner, int64_t columns)
        : matrix_(matrix), inner_(inner), columns_(columns), panels_((columns + PANEL - 1) / PANEL),
          packed_(mkl_sgemm ? 0 : panels_ * inner * PANEL) {}

    // Called by every thread of a parallel region, which wait for each other.
    void pack() {
        if (!packed_) return;
#pragma omp for schedule(dynamic)
        for (int64_t p = 0; p < panels_; p++) pack_panel(p);
    }

    // The same by one thread, for itself.
    void pack_alone() {
        for (int64_t p = 0; packed_ && p < panels_; p++) pack_panel(p);
    }

    // out (rows, columns) = left (rows, inner) · this; `keep` adds to out.
    void multiply(const Matrix &left, int64_t rows, float *out, int64_t out_row, bool keep = false) const {
        if (!packed_) return multiply_by_mkl(left, matrix_, rows, columns_, inner_, out, out_row, keep);
        alignas(64) float turned[DEPTH * ROWS];
        for (int64_t first = 0; first < inner_; first += DEPTH) {
            const int64_t depth = std::min(DEPTH, inner_ - first);
            const bool adds = keep || first > 0;
            if (!left.transposed) {
                for (int64_t p = 0; p < panels_; p++)
                    for (int64_t i = 0; i < rows; i += ROWS)
                        multiply_panel(p, first, depth, left.part(i, first), left.row, 1, std::min<int64_t>(ROWS, rows - i),
                                       out + i * out_row, out_row, adds);
                continue;
            }
            // Rows of a tile that lie apart are turned, and stay near for all panels.
            for (int64_t i = 0; i < rows; i += ROWS) {
                const int64_t count = std::min<int64_t>(ROWS, rows - i);
                turn(left, i, count, first, depth, turned);
                for (int64_t p = 0; p < panels_; p++)
                    multiply_panel(p, first, depth, turned, 1, ROWS, count, out + i * out_row, out_row, adds);
            }
        }
    }

  private:
    void pack_panel(int64_t p) {
        const int64_t width = std::min<int64_t>(PANEL, columns_ - p * PANEL);
        float *to = packed_ + p * inner_ * PANEL;
        if (width < PANEL) std::fill(to, to + inner_ * PANEL, 0.0f);
        if (!matrix_.transposed) {
            // A copy of constant size is two instructions.
            for (int64_t k = 0; k < inner_; k++)
                if (width == PANEL)
                    std::memcpy(to + k * PANEL, matrix_.part(k, p * PANEL), PANEL * sizeof(float));
                else
                    std::memcpy(to + k * PANEL, matrix_.part(k, p * PANEL), width * sizeof(float));
            return;
        }
        // A line of the cache at a time.
        for (int64_t first = 0; first < inner_; first += 16)
            for (int64_t c = 0; c < width; c++) {
                const float *from = matrix_.part(0, p * PANEL + c);
                for (int64_t k = first; k < std::min(first + 16, inner_); k++) to[k * PANEL + c] = from[k];
            }
    }

    static void turn(const Matrix &left, int64_t row, int64_t count, int64_t first, int64_t depth, float *to) {
        for (int64_t k = 0; k < depth; k++)
            if (count == ROWS)
                std::memcpy(to + k * ROWS, left.part(row, first + k), ROWS * sizeof(float));
            else
                std::memcpy(to + k * ROWS, left.part(row, first + k), count * sizeof(float));
    }

    // A tile of panel p of the result, `depth` terms of its sums from `first` on; out is the first column of its rows.
    void multiply_panel(int64_t p, int64_t first, int64_t depth, const float *left, int64_t left_row, int64_t left_column,
                        int64_t rows, float *out, int64_t out_row, bool adds) const {
        const float *panel = packed_ + (p * inner_ + first) * PANEL;
        const int64_t width = std::min<int64_t>(PANEL, columns_ - p * PANEL);
        alignas(64) float edge[ROWS * PANEL];
        float *to = out + p * PANEL;
        if (width == PANEL) return multiply_rows<ROWS>(rows, depth, left, left_row, left_column, panel, to, out_row, adds);
        multiply_rows<ROWS>(rows, depth, left, left_row, left_column, panel, edge, PANEL, false);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < width; j++) to[i * out_row + j] = edge[i * PANEL + j] + (adds ? to[i * out_row + j] : 0.0f);
    }

    Matrix matrix_;
    int64_t inner_, columns_, panels_;
    Room packed_;
};

// out (rows, columns) = left (rows, inner) · right, over the threads of a parallel region; left is not transposed.
inline void multiply(const float *left, int64_t left_row, const Right &right, int64_t rows, float *out, int64_t out_row) {
#pragma omp for schedule(dynamic)
    for (int64_t start = 0; start < rows; start += BLOCK)
        right.multiply({left + start * left_row, left_row}, std::min(BLOCK, rows - start), out + start * out_row, out_row);
}

// out (rows, columns) = leftᵀ · right with left (inner, rows), over `threads` threads of a parallel region; `keep` adds.
inline void multiply_transposed(const float *left, const Right &right, int64_t rows, float *out, int64_t out_row,
                                int threads, bool keep = false) {
    // Enough parts for each thread to find one when it is done with another.
    const int64_t share = (rows / (4 * threads) + ROWS - 1) / ROWS * ROWS;
    const int64_t part = std::min(std::max<int64_t>(share, 2 * ROWS), BLOCK);
#pragma omp for schedule(dynamic)
    for (int64_t start = 0; start < rows; start += part)
        right.multiply({left + start, rows, true}, std::min(part, rows - start), out + start * out_row, out_row, keep);
}

}  // namespace
