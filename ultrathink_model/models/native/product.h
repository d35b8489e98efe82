// Products of a thread's own, of any size: over tiles, or by MKL where that is the faster.

#pragma once

#include <atomic>
#include <type_traits>

#include "simd.h"

using Sgemm = void (*)(const char *, const char *, const int *, const int *, const int *, const float *, const float *,
                       const int *, const float *, const int *, const float *, float *, const int *);
using SetThreads = int (*)(int);

// MKL's; null where our own loops are the faster, or PyTorch has none.
extern Sgemm mkl_sgemm;
extern SetThreads mkl_set_threads;

namespace {

constexpr int PANEL_VECTORS = LANES == 4 ? 4 : 2, PANEL = PANEL_VECTORS * LANES;
constexpr int64_t BLOCK = 8 * ROWS;  // the most rows that a thread takes at once
constexpr int64_t DEPTH = 384;       // terms of a sum that a tile takes at once, so that its operands stay in the nearest caches

// Rows that threads share out, in parts that grow smaller towards the end: none waits long for another.
class Parts {
  public:
    Parts(int64_t rows, int threads) : rows_(rows), threads_(threads) {}

    // Calls `run(start, count)` for parts until there are none left.
    template <class Run>
    void each(Run run) {
        for (int64_t start = next_; start < rows_;) {
            const int64_t share = threads_ == 1 ? BLOCK : (rows_ - start) / (4 * threads_) / ROWS * ROWS;
            const int64_t count = std::min({std::max<int64_t>(share, 2 * ROWS), BLOCK, rows_ - start});
            if (!next_.compare_exchange_weak(start, start + count)) continue;
            run(start, count);
            start = next_;
        }
    }

  private:
    std::atomic<int64_t> next_{0};
    int64_t rows_;
    int threads_;
};

inline void wait_for_all() {
#pragma omp barrier
}

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

// A tile of at most R rows, of the first V vectors of a panel. Within its callers it would have too few registers.
template <int R, int V>
__attribute__((noinline)) void multiply_rows(int64_t rows, int64_t inner, const float *left, int64_t left_row, int64_t left_column,
                          const float *panel, float *out, int64_t out_row, bool keep) {
    if constexpr (R > 1)
        if (rows < R) return multiply_rows<R - 1, V>(rows, inner, left, left_row, left_column, panel, out, out_row, keep);
    multiply_tile<R, V>(inner, left, left_row, left_column, panel, PANEL, out, out_row, keep);
}

// A right operand (inner, columns), which lies in panels of columns: all threads bring a matrix into them before they
// multiply with it, or write it there.
class Right {
  public:
    Right(const Matrix &matrix, int64_t inner, int64_t columns)
        : matrix_(matrix), inner_(inner), columns_(columns), panels_((columns + PANEL - 1) / PANEL),
          packed_(mkl_sgemm ? 0 : panels_ * inner * PANEL) {}

    // One that is yet to be written, row by row.
    Right(int64_t inner, int64_t columns)
        : inner_(inner), columns_(columns), panels_((columns + PANEL - 1) / PANEL),
          packed_(inner * (mkl_sgemm ? columns : panels_ * PANEL)) {
        matrix_ = {packed_, columns};
        float *last = packed_ + (panels_ - 1) * inner * PANEL;
        if (!mkl_sgemm && columns % PANEL) std::fill(last, last + inner * PANEL, 0.0f);
    }

    // Writes row k: `write(to, first, count)` puts columns `first` on where they belong.
    template <class Write>
    void write_row(int64_t k, Write write) {
        if (mkl_sgemm) return write(packed_ + k * columns_, 0, columns_);
        const int64_t whole = columns_ / PANEL;
        const auto at = [&](int64_t p) { return packed_ + (p * inner_ + k) * PANEL; };
        for (int64_t p = 0; p < whole; p++) write(at(p), p * PANEL, std::integral_constant<int64_t, PANEL>());
        if (columns_ % PANEL) write(at(whole), whole * PANEL, columns_ % PANEL);
    }

    // Called by every thread of a parallel region, who wait for all before they multiply.
    void pack() {
        if (mkl_sgemm) return;
#pragma omp for schedule(dynamic) nowait
        for (int64_t p = 0; p < panels_; p++) pack_panel(p);
    }

    // The same by one thread, for itself.
    void pack_alone() {
        for (int64_t p = 0; !mkl_sgemm && p < panels_; p++) pack_panel(p);
    }

    // out (rows, columns) = left (rows, inner) · this; `keep` adds to out.
    void multiply(const Matrix &left, int64_t rows, float *out, int64_t out_row, bool keep = false) const {
        if (mkl_sgemm) return multiply_by_mkl(left, matrix_, rows, columns_, inner_, out, out_row, keep);
        alignas(64) float turned[DEPTH * BLOCK];
        for (int64_t first = 0; first < inner_; first += DEPTH) {
            const int64_t depth = std::min(DEPTH, inner_ - first);
            for (int64_t start = 0; start < rows; start += BLOCK) {
                const int64_t end = std::min(start + BLOCK, rows);
                // Rows that lie apart are turned, tile by tile, and stay near for all panels.
                for (int64_t i = start; left.transposed && i < end; i += ROWS)
                    turn(left, i, std::min<int64_t>(ROWS, end - i), first, depth, turned + (i - start) * DEPTH);
                for (int64_t p = 0; p < panels_; p++)
                    for (int64_t i = start; i < end; i += ROWS) {
                        const float *from = left.transposed ? turned + (i - start) * DEPTH : left.part(i, first);
                        multiply_panel(p, first, depth, from, left.transposed ? 1 : left.row, left.transposed ? ROWS : 1,
                                       std::min<int64_t>(ROWS, end - i), out + i * out_row, out_row, keep || first > 0);
                    }
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
        float *to = out + p * PANEL;
        constexpr auto multiply_whole = multiply_rows<ROWS, PANEL_VECTORS>;
        constexpr auto multiply_half = multiply_rows<ROWS, PANEL_VECTORS / 2>;
        constexpr int64_t HALF = PANEL / 2;
        if (width == PANEL) return multiply_whole(rows, depth, left, left_row, left_column, panel, to, out_row, adds);
        if (width == HALF) return multiply_half(rows, depth, left, left_row, left_column, panel, to, out_row, adds);
        alignas(64) float edge[ROWS * PANEL];
        (width < HALF ? multiply_half : multiply_whole)(rows, depth, left, left_row, left_column, panel, edge, PANEL, false);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < width; j++) to[i * out_row + j] = edge[i * PANEL + j] + (adds ? to[i * out_row + j] : 0.0f);
    }

    Matrix matrix_{};
    int64_t inner_, columns_, panels_;
    Room packed_;
};

// out (rows, columns) = leftᵀ · right with left (inner, rows), by the threads that call it; `keep` adds.
inline void multiply_transposed(const float *left, const Right &right, int64_t rows, Parts &parts, float *out, int64_t out_row,
                                bool keep = false) {
    parts.each([&](int64_t start, int64_t count) {
        right.multiply({left + start, rows, true}, count, out + start * out_row, out_row, keep);
    });
}

}  // namespace
