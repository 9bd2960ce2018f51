// y = x @ W.T for a packed W: the matrix product of CPUs with AVX-512, in float32, bfloat16 and int8.
//
// W lies in panels of PANEL outputs, each [inputs / S][PANEL][S] with S inputs side by side (one float, two
// bfloat16, four int8), so that one instruction multiplies 16 outputs. A panel stays in the second-level cache while
// all rows pass over it, and the next one is fetched meanwhile: oneDNN waits for memory there (measured on
// Zen 4, 64 rows).
//
// A row's sum runs over its inputs in order, in `parts` equal pieces that are added pairwise. So its bits do
// not depend on the other rows, and a rank that holds one, two or four quarters of the inputs holds exactly
// a branch of the same tree: tensor parallelism does not change a bit either.
//
// int8 (W8A8, as in LLM.int8() without its outliers; Dettmers et al., 2022): weights have a scale for each
// output, inputs one for each row and part, found as they come. Inputs are stored shifted by 128, since the
// instruction multiplies unsigned by signed; `offsets` take that out again.

#ifdef __AVX512F__

#include <type_traits>
#include <vector>

#include "vec.h"

namespace headrace {

constexpr int PANEL = 64;
constexpr int VECTORS = PANEL / LANES;
constexpr int ROWS = 6;     // of one tile: 6 x 4 sums fill 24 of the 32 registers
constexpr int CHUNK = 8;    // inputs (of S) between prefetches
constexpr int LINE = 64;    // bytes

// What happens to a finished sum.
enum Finish { PLAIN = 0, SILU_MUL = 1 };

template <typename X, typename W, typename Y>
struct Product {
  void* y;           // Y, or float for partial sums
  const X* x;
  const W* w;
  const Y* bias;     // or null
  int64_t rows, inputs, outputs, x_stride, y_stride;
  int parts, finish;
  bool wide;         // y is float
  // int8 only: scales [rows, parts] and [columns], offsets [parts, columns].
  const float *x_scales = nullptr, *w_scales = nullptr;
  const int32_t* offsets = nullptr;

  int64_t panels() const { return ((finish == SILU_MUL ? 2 : 1) * outputs + PANEL - 1) / PANEL; }
};

#ifdef __AVX512VNNI__
inline vi multiply(vi sum, const uint8_t* x, const int8_t* w) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return (vi)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(four), _mm512_loadu_si512(w));
}
#endif

template <typename X>
using Sum = std::conditional_t<sizeof(X) == 1, vi, vf>;

// acc[i] = x[i] @ panel over `steps` x S inputs, for M rows. `lines` of `next` are fetched each chunk.
template <int M, typename X, typename W>
inline void tile(const X* x, int64_t x_stride, const W* w, int64_t steps, const char* next, int lines,
                 Sum<X> (*acc)[VECTORS]) {
  Sum<X> a[M][VECTORS];
  for (int i = 0; i < M; i++)
    for (int n = 0; n < VECTORS; n++) a[i][n] = Sum<X>{};
  constexpr int S = side<X>();
  auto step = [&](int64_t k) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
      for (int n = 0; n < VECTORS; n++)
        a[i][n] = multiply(a[i][n], x + i * x_stride + k * S, w + (k * PANEL + n * LANES) * S);
  };
  int64_t k = 0;
  for (; k + CHUNK <= steps; k += CHUNK) {
    for (int l = 0; l < lines; l++, next += LINE) __builtin_prefetch(next, 0, 2);
    for (int c = 0; c < CHUNK; c++) step(k + c);
  }
  for (; k < steps; k++) step(k);
  for (int i = 0; i < M; i++)
    for (int n = 0; n < VECTORS; n++) acc[i][n] = a[i][n];
}

// Sums as floats: they are already, or integers to be scaled.
template <int M, typename P>
inline void scaled(const P&, const vf (*acc)[VECTORS], int64_t, int64_t, int, vf (*out)[VECTORS]) {
  for (int i = 0; i < M; i++)
    for (int n = 0; n < VECTORS; n++) out[i][n] = acc[i][n];
}

template <int M, typename P>
inline void scaled(const P& p, const vi (*acc)[VECTORS], int64_t row, int64_t panel, int part, vf (*out)[VECTORS]) {
  const int64_t first = panel * PANEL;
  const int32_t* offsets = p.offsets + part * p.panels() * PANEL + first;
  for (int n = 0; n < VECTORS; n++) {
    vi offset;
    std::memcpy(&offset, offsets + n * LANES, sizeof offset);
    vf scale = load(p.w_scales + first + n * LANES);
    for (int i = 0; i < M; i++)
      out[i][n] = __builtin_convertvector(acc[i][n] + offset, vf) * (scale * p.x_scales[(row + i) * p.parts + part]);
  }
}

// Rounds the sums of M rows as torch would and stores them.
template <int M, typename X, typename W, typename Y>
inline void finish(const Product<X, W, Y>& p, const vf (*acc)[VECTORS], int64_t row, int64_t panel) {
  const int64_t first = panel * PANEL;
  const int64_t width = p.finish == SILU_MUL ? PANEL / 2 : PANEL, at = panel * width;
  const int64_t left = p.outputs - at < width ? p.outputs - at : width;
  for (int i = 0; i < M; i++) {
    vf s[VECTORS];
    for (int n = 0; n < VECTORS; n++) s[n] = acc[i][n];
    if (p.bias)
      for (int n = 0; n < VECTORS; n++) s[n] += load(p.bias + first + n * LANES);  // padded with zeros
    if (p.wide) {
      std::memcpy(static_cast<float*>(p.y) + (row + i) * p.y_stride + at, s, left * sizeof(float));
      continue;
    }
    Y* y = static_cast<Y*>(p.y) + (row + i) * p.y_stride + at;
    Y narrow[PANEL];
    Y* to = left == width ? y : narrow;
    if (p.finish == SILU_MUL) {
      for (int n = 0; n < VECTORS / 2; n++) {
        vf gate = round_as(y, s[n]), up = round_as(y, s[n + VECTORS / 2]);
        store(to + n * LANES, round_as(y, gate / (1.0f + exp(-gate))) * up);
      }
    } else {
      for (int n = 0; n < VECTORS; n++) store(to + n * LANES, s[n]);
    }
    if (to != y) std::memcpy(y, narrow, left * sizeof(Y));
  }
}

// One panel for all rows. `buffer` holds two sums for every row when the inputs come in parts.
template <typename X, typename W, typename Y>
void panel(const Product<X, W, Y>& p, int64_t number, const W* next, vf (*buffer)[VECTORS]) {
  constexpr int S = side<X>();
  const int64_t steps = p.inputs / S / p.parts, tiles = (p.rows + ROWS - 1) / ROWS;
  const int64_t part_bytes = steps * PANEL * S * sizeof(W), chunks = steps / CHUNK;
  const W* w = p.w + number * PANEL * p.inputs;
  for (int part = 0; part < p.parts; part++, w += steps * PANEL * S) {
    // The lines of the next part, or of the next panel's first one, shared out over the tiles.
    const char* ahead = reinterpret_cast<const char*>(part + 1 < p.parts ? w + steps * PANEL * S : next);
    const int lines =
        ahead && chunks && tiles > 1 ? int((part_bytes / LINE + tiles * chunks - 1) / (tiles * chunks)) : 0;
    const char* end = ahead + part_bytes;
    const X* x = p.x + part * steps * S;
    auto rows = [&](auto m, int64_t row) {
      constexpr int M = decltype(m)::value;
      Sum<X> sums[M][VECTORS];
      const int now = ahead < end ? lines : 0;
      tile<M>(x + row * p.x_stride, p.x_stride, w, steps, ahead, now, sums);
      ahead += now * chunks * LINE;
      vf acc[M][VECTORS];
      scaled<M>(p, sums, row, number, part, acc);
      if (p.parts > 1) {
        // The first half of the parts into the first sum, the others into the second; the last adds both up.
        vf(*low)[VECTORS] = buffer + 2 * row, (*high)[VECTORS] = low + M;
        vf(*to)[VECTORS] = part < p.parts / 2 ? low : high;
        if (part % (p.parts / 2) != 0)
          for (int i = 0; i < M; i++)
            for (int n = 0; n < VECTORS; n++) acc[i][n] = to[i][n] + acc[i][n];
        if (part + 1 < p.parts) {
          for (int i = 0; i < M; i++)
            for (int n = 0; n < VECTORS; n++) to[i][n] = acc[i][n];
          return;
        }
        for (int i = 0; i < M; i++)
          for (int n = 0; n < VECTORS; n++) acc[i][n] = low[i][n] + acc[i][n];
      }
      finish<M>(p, acc, row, number);
    };
    // Tiles as even as they can be: a small last one would wait for the cache.
    for (int64_t row = 0, t = 0; t < tiles; t++) {
      const int64_t size = (p.rows - row + tiles - t - 1) / (tiles - t);
      switch (size) {
        case 1: rows(std::integral_constant<int, 1>{}, row); break;
        case 2: rows(std::integral_constant<int, 2>{}, row); break;
        case 3: rows(std::integral_constant<int, 3>{}, row); break;
        case 4: rows(std::integral_constant<int, 4>{}, row); break;
        case 5: rows(std::integral_constant<int, 5>{}, row); break;
        case 6: rows(std::integral_constant<int, 6>{}, row); break;
      }
      row += size;
    }
  }
}

// Panels are shared out evenly, each thread its own run of them. Called by all threads of a team.
template <typename X, typename W, typename Y>
void linear(const Product<X, W, Y>& p) {
  const int64_t panels = p.panels();
  std::vector<vf> buffer(p.parts > 1 ? 2 * p.rows * VECTORS : 0);
  auto* sums = reinterpret_cast<vf(*)[VECTORS]>(buffer.data());
#pragma omp for schedule(static)
  for (int64_t n = 0; n < panels; n++)
    panel(p, n, n + 1 < panels ? p.w + (n + 1) * PANEL * p.inputs : nullptr, sums);
}

// out [inputs] and scales [parts] of one row: the part's largest number becomes 127, and 0 becomes 128.
template <typename T>
void quantize(uint8_t* out, float* scales, const T* x, int64_t inputs, int parts) {
  const int64_t size = inputs / parts;
  for (int part = 0; part < parts; part++, x += size, out += size) {
    vf most = {}, bad = {};
    for (int64_t c = 0; c < size; c += LANES) {
      vf a = load(x + c);
      most = max(a < 0.0f ? -a : a, most);
      bad += a * 0.0f;  // NaN where a is not finite
    }
    const float largest = max(most), scale = largest > 0 ? largest / 127 : 1;
    scales[part] = scale + sum(bad);  // such a row is NaN, as in other products
    const float inverse = 1 / scale;
    for (int64_t c = 0; c < size; c += LANES) {
      vf a = load(x + c) * inverse;
      vi q = __builtin_convertvector((a + 12582912.0f) - 12582912.0f, vi) + 128;  // to the nearest integer
      __m128i bytes = _mm512_cvtusepi32_epi8(_mm512_max_epi32((__m512i)q, _mm512_setzero_si512()));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + c), bytes);
    }
  }
}

// out [ceil(outputs / PANEL)][inputs / S][PANEL][S] from w [outputs, inputs]; outputs beyond are zero.
template <typename T>
void pack(T* out, const T* w, int64_t outputs, int64_t inputs, int threads) {
  constexpr int S = side<T>();
  const int64_t panels = (outputs + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads(threads)
  for (int64_t p = 0; p < panels; p++)
    for (int64_t k = 0; k < inputs / S; k++)
      for (int n = 0; n < PANEL; n++)
        for (int s = 0; s < S; s++) {
          const int64_t row = p * PANEL + n;
          out[((p * (inputs / S) + k) * PANEL + n) * S + s] = row < outputs ? w[row * inputs + k * S + s] : T{};
        }
}

// out [count, inputs]: rows of w out of its panels.
template <typename T>
void unpack_rows(T* out, const T* packed, const int64_t* rows, int64_t count, int64_t inputs) {
  constexpr int S = side<T>();
  for (int64_t t = 0; t < count; t++) {
    const T* from = packed + (rows[t] / PANEL * inputs / S * PANEL + rows[t] % PANEL) * S;
    for (int64_t k = 0; k < inputs / S; k++) std::memcpy(out + t * inputs + k * S, from + k * PANEL * S, S * sizeof(T));
  }
}

}  // namespace headrace

using namespace headrace;

#define EXPORT_WEIGHT(T, NAME)                                                                              \
  extern "C" void headrace_pack_##NAME(T* out, const T* w, int64_t outputs, int64_t inputs, int threads) { \
    pack(out, w, outputs, inputs, threads);                                                                 \
  }                                                                                                         \
  extern "C" void headrace_unpack_rows_##NAME(T* out, const T* packed, const int64_t* rows, int64_t count,  \
                                              int64_t inputs) {                                             \
    unpack_rows(out, packed, rows, count, inputs);                                                          \
  }

#define EXPORT(T, NAME)                                                                                     \
  EXPORT_WEIGHT(T, NAME)                                                                                    \
  extern "C" void headrace_linear_##NAME(void* y, const T* x, const T* w, const T* bias, int64_t rows,      \
                                         int64_t inputs, int64_t outputs, int64_t x_stride,                 \
                                         int64_t y_stride, int parts, int finish, int wide, int threads) {  \
    const Product<T, T, T> p{y, x, w, bias, rows, inputs, outputs, x_stride, y_stride, parts, finish,       \
                             wide != 0};                                                                    \
    _Pragma("omp parallel num_threads(threads)") linear(p);                                                 \
  }

// `bytes` [rows, inputs] and `scales` [rows, parts] are the caller's scratch memory.
#define EXPORT_INT8(T, NAME)                                                                                \
  extern "C" void headrace_linear_i8_##NAME(                                                                \
      void* y, const T* x, const int8_t* w, const T* bias, const float* w_scales, const int32_t* offsets,   \
      uint8_t* bytes, float* scales, int64_t rows, int64_t inputs, int64_t outputs, int64_t x_stride,       \
      int64_t y_stride, int parts, int finish, int wide, int threads) {                                     \
    const Product<uint8_t, int8_t, T> p{y,     bytes,  w,      bias,      rows,   inputs,   outputs, inputs, \
                                        y_stride, parts, finish, wide != 0, scales, w_scales, offsets};     \
    _Pragma("omp parallel num_threads(threads)") {                                                          \
      _Pragma("omp for schedule(static)") for (int64_t t = 0; t < rows; t++)                                \
          quantize(bytes + t * inputs, scales + t * parts, x + t * x_stride, inputs, parts);                \
      linear(p);                                                                                            \
    }                                                                                                       \
  }

EXPORT(float, f32)
#ifdef __AVX512BF16__
EXPORT(bf16, bf16)
#endif
#ifdef __AVX512VNNI__
EXPORT_WEIGHT(int8_t, i8)
EXPORT_INT8(float, f32)
EXPORT_INT8(bf16, bf16)
#endif

#endif
