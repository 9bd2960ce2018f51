// What stands between the matrix products of a decoder layer: RMSNorm, rotary embedding, SiLU times up.
//
// Each replaces five to ten torch calls and as many passes over memory. Rounding is as in the torch
// versions of engine.models: float32 inside, rounded to the tensor's type where those round.

#include <cmath>

#include "vec.h"

namespace headrace {

// Elements that are worth a second thread.
constexpr int64_t PARALLEL = 1 << 15;

// out [outer, inner, cols] contiguous; x the same by its outer stride. weight * round(x / rms).
template <typename T>
void rms_norm(T* out, const T* x, const T* weight, int64_t outer, int64_t inner, int64_t cols, int64_t stride,
              float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (outer * inner * cols > PARALLEL)
  for (int64_t row = 0; row < outer * inner; row++) {
    const T* in = x + row / inner * stride + row % inner * cols;
    vf squares = {};
    for (int64_t c = 0; c < cols; c += LANES) {
      vf a = load(in + c);
      squares += a * a;
    }
    const float scale = 1.0f / std::sqrt(sum(squares) / float(cols) + eps);
    for (int64_t c = 0; c < cols; c += LANES)
      store(out + row * cols + c, load(weight + c) * round_as(out, load(in + c) * scale));
  }
}

// sums = x + delta, out = weight * round(sums / rms); all [rows, cols] contiguous.
template <typename T>
void add_rms_norm(T* sums, T* out, const T* x, const T* delta, const T* weight, int64_t rows, int64_t cols,
                  float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * cols > PARALLEL)
  for (int64_t row = 0; row < rows; row++) {
    T* to = sums + row * cols;
    vf squares = {};
    for (int64_t c = 0; c < cols; c += LANES) {
      vf a = round_as(to, load(x + row * cols + c) + load(delta + row * cols + c));
      store(to + c, a);
      squares += a * a;
    }
    const float scale = 1.0f / std::sqrt(sum(squares) / float(cols) + eps);
    for (int64_t c = 0; c < cols; c += LANES)
      store(out + row * cols + c, load(weight + c) * round_as(out, load(to + c) * scale));
  }
}

// Rotates the first 2 * half elements of every head, x [tokens, heads, head_dim] by token stride, cos and
// sin [tokens, half]; out is contiguous.
template <typename T>
void rotate(T* out, const T* x, const float* cos, const float* sin, int64_t tokens, int64_t heads,
            int64_t head_dim, int64_t half, int64_t stride, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * heads * head_dim > PARALLEL)
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t n = 0; n < heads; n++) {
      const T* in = x + t * stride + n * head_dim;
      T* to = out + (t * heads + n) * head_dim;
      for (int64_t c = 0; c < half; c += LANES) {
        vf a = load(in + c), b = load(in + half + c), co = load(cos + t * half + c), si = load(sin + t * half + c);
        store(to + c, a * co - b * si);
        store(to + half + c, b * co + a * si);
      }
      std::memcpy(to + 2 * half, in + 2 * half, (head_dim - 2 * half) * sizeof(T));
    }
}

// out [tokens, width] = silu(gate) * up; gate and up by token stride.
template <typename T>
void silu_mul(T* out, const T* gates, const T* ups, int64_t tokens, int64_t width, int64_t stride, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * width > PARALLEL)
  for (int64_t t = 0; t < tokens; t++) {
    const T *gate = gates + t * stride, *up = ups + t * stride;
    for (int64_t c = 0; c < width; c += LANES) {
      vf g = load(gate + c);
      store(out + t * width + c, round_as(out, g / (1.0f + exp(-g))) * load(up + c));
    }
  }
}

}  // namespace headrace

using namespace headrace;

#define EXPORT(T, NAME)                                                                                         \
  extern "C" void headrace_rms_norm_##NAME(T* out, const T* x, const T* weight, int64_t outer, int64_t inner,   \
                                           int64_t cols, int64_t stride, float eps, int threads) {              \
    rms_norm(out, x, weight, outer, inner, cols, stride, eps, threads);                                         \
  }                                                                                                             \
  extern "C" void headrace_add_rms_norm_##NAME(T* sums, T* out, const T* x, const T* delta, const T* weight,      \
                                               int64_t rows, int64_t cols, float eps, int threads) {            \
    add_rms_norm(sums, out, x, delta, weight, rows, cols, eps, threads);                                        \
  }                                                                                                             \
  extern "C" void headrace_rotate_##NAME(T* out, const T* x, const float* cos, const float* sin,                \
                                         int64_t tokens, int64_t heads, int64_t head_dim, int64_t half,         \
                                         int64_t stride, int threads) {                                         \
    rotate(out, x, cos, sin, tokens, heads, head_dim, half, stride, threads);                                   \
  }                                                                                                             \
  extern "C" void headrace_silu_mul_##NAME(T* out, const T* gates, const T* ups, int64_t tokens, int64_t width, \
                                           int64_t stride, int threads) {                                       \
    silu_mul(out, gates, ups, tokens, width, stride, threads);                                                  \
  }

EXPORT(float, f32)
EXPORT(bf16, bf16)
