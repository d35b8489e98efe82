// What the operators share: a small matrix product that stays in the registers, and exponentials that vectorise.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>

namespace {

// Floats of a vector, and how many rows of a tile the registers hold beside its operands.
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8;
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 6;
#else
constexpr int LANES = 4, ROWS = 4;
#endif
typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));

// Room for floats, undefined at first. It begins with a line of the cache, so that no vector of it lies in two.
class Room {
  public:
    explicit Room(int64_t size) : at_(size ? new (std::align_val_t{64}) float[size] : nullptr) {}
    ~Room() { operator delete[](at_, std::align_val_t{64}); }
    Room(const Room &) = delete;
    Room &operator=(const Room &) = delete;
    operator float *() const { return at_; }

  private:
    float *at_;
};

// Loops over a tile are unrolled before anything else is done with them: what they sum up in is then registers.
#define TILE_LOOP _Pragma("GCC unroll 16") for

// out (R, V vectors) = left (R, inner) · right (inner, V vectors); `keep` adds to out. Every operand's rows lie so many
// floats apart, and left's columns too, so that it may be stored transposed.
template <int R, int V>
inline void multiply_tile(int64_t inner, const float *left, int64_t left_row, int64_t left_column, const float *right,
                          int64_t right_row, float *out, int64_t out_row, bool keep) {
    Vector sums[R][V];
    // What is written at the end is fetched meanwhile.
    TILE_LOOP(int i = 0; i < R; i++) TILE_LOOP(int v = 0; v < V; v++) {
        __builtin_prefetch(out + i * out_row + v * LANES, 1);
        sums[i][v] = Vector{};
    }
    if (keep) TILE_LOOP(int i = 0; i < R; i++) TILE_LOOP(int v = 0; v < V; v++)
        sums[i][v] = *(const Vector *)(out + i * out_row + v * LANES);
    for (int64_t k = 0; k < inner; k++) {
        Vector row[V];
        TILE_LOOP(int v = 0; v < V; v++) row[v] = *(const Vector *)(right + k * right_row + v * LANES);
        TILE_LOOP(int i = 0; i < R; i++) {
            const float by = left[i * left_row + k * left_column];
            TILE_LOOP(int v = 0; v < V; v++) sums[i][v] += by * row[v];
        }
    }
    TILE_LOOP(int i = 0; i < R; i++) TILE_LOOP(int v = 0; v < V; v++)
        *(Vector *)(out + i * out_row + v * LANES) = sums[i][v];
}

// exp(x) is 2ⁿ · exp(r) with |r| ≤ ln(2) / 2, and that by its Taylor series up to r⁷, whose remainder is under 6e-9. Beyond
// ±87, where float32 ends, it stays at the value there.
inline float exponential(float x) {
    const float to_integer = 12582912.0f;  // 1.5 · 2²³: adding it leaves an integer in the last bits
    const float y = std::min(std::max(x, -87.0f), 87.0f);
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
    uint32_t exponent;
    std::memcpy(&exponent, &shifted, sizeof exponent);
    exponent = (exponent << 23) + 0x3f800000u;  // the bits of 2ⁿ
    float power;
    std::memcpy(&power, &exponent, sizeof power);
    return e * power;  // not by bits: what is not a number stays none
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// The sum over a row of `value(j)`.
template <class Value>
inline float sum_over(int64_t width, Value value) {
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < width; j++) total += value(j);
    return total;
}

}  // namespace
