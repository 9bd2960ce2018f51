// Sixteen floats at a time, in GCC's and Clang's portable vector types: the compiler makes AVX-512, AVX2
// or NEON of them. Shared by all kernels; knows nothing of models.
//
// Nothing here may reorder sums by length or alignment: equal inputs give equal bits wherever they lie.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace headrace {

constexpr int LANES = 16;

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));

struct bf16 {
  uint16_t bits;
};

inline vf load(const float* p) {
  vf x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline vf load(const bf16* p) {
#ifdef __AVX512F__
  // GCC 12 makes five instructions of the portable form.
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#endif
  vh h;
  std::memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
}

inline void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }

// To bfloat16 and back: the nearest, ties to even; NaN stays NaN.
inline vh narrow(vf x) {
#ifdef __AVX512BF16__
  // One instruction; differs for numbers below 2^-126 only, which become 0.
  return (vh)_mm512_cvtneps_pbh((__m512)x);
#endif
  vu bits = (vu)x;
  vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  vu nan = (bits >> 16) | 0x40;
  return __builtin_convertvector(x == x ? rounded : nan, vh);
}

inline void store(bf16* p, vf x) {
  vh h = narrow(x);
  std::memcpy(p, &h, sizeof h);
}

// What x becomes when it is stored as T and read again.
inline vf round_as(const float*, vf x) { return x; }
inline vf round_as(const bf16*, vf x) { return (vf)(__builtin_convertvector(narrow(x), vu) << 16); }

// One element, as a float and back.
inline float single(float x) { return x; }
inline float single(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline float rounded(const float*, float x) { return x; }
inline bf16 rounded(const bf16*, float x) { return {narrow(x - vf{})[0]}; }

inline vf broadcast(float x) { return x - vf{}; }

// Elements that one broadcast multiplies at once: S of an input lie beside each other.
template <typename T>
constexpr int side() {
  return 4 / sizeof(T);
}

// sum + x[0..S) . w[.., 0..S) for 16 outputs: one broadcast piece times one vector.
inline vf multiply(vf sum, const float* x, const float* w) { return sum + broadcast(*x) * load(w); }

inline vf multiply(vf sum, const bf16* x, const bf16* w) {
#ifdef __AVX512BF16__
  int32_t pair;
  std::memcpy(&pair, x, 4);
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)_mm512_loadu_si512(w));
#else
  vu both;
  std::memcpy(&both, w, sizeof both);
  return sum + broadcast(single(x[0])) * (vf)(both << 16) + broadcast(single(x[1])) * (vf)(both & 0xffff0000u);
#endif
}

inline vf max(vf a, vf b) { return a > b ? a : b; }

inline float sum(vf x) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)x);  // the same tree
#endif
  float s[LANES];
  std::memcpy(s, &x, sizeof s);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) s[i] += s[i + half];
  return s[0];
}

inline float max(vf x) {
#ifdef __AVX512F__
  return _mm512_reduce_max_ps((__m512)x);
#endif
  float s[LANES];
  std::memcpy(s, &x, sizeof s);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) s[i] = s[i] > s[i + half] ? s[i] : s[i + half];
  return s[0];
}

// exp, within 2 ulp for |x| < 87 (Cephes' expf: reduction by ln2 in two parts, a polynomial of degree 6);
// exactly 0 below, so that a masked key weighs nothing.
inline vf exp(vf x) {
  vf clamped = max(x, broadcast(-87.0f));
  clamped = clamped > 88.0f ? broadcast(88.0f) : clamped;
  vf n = (clamped * 1.44269504088896341f + 12582912.0f) - 12582912.0f;  // to the nearest integer
  vf r = clamped - n * 0.693359375f - n * -2.12194440e-4f;
  vf p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  vi exponent = __builtin_convertvector(n, vi) << 23;
  vf y = (vf)((vi)p + exponent);
  y = x < -87.0f ? vf{} : y;
  return x == x ? y : x;
}

inline float exp(float x) { return exp(broadcast(x))[0]; }

// Lane i of the result is the sum of all lanes of a[i]. Destroys a.
inline vf transpose_sum(vf* a) {
#define HALVES(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
  for (int i = 0; i < 8; i++)
    a[i] = HALVES(a[i], a[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           HALVES(a[i], a[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  for (int i = 0; i < 4; i++)
    a[i] = HALVES(a[i], a[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           HALVES(a[i], a[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int i = 0; i < 2; i++)
    a[i] = HALVES(a[i], a[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           HALVES(a[i], a[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  return HALVES(a[0], a[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
         HALVES(a[0], a[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
#undef HALVES
}

}  // namespace headrace
