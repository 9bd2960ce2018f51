// What a layer does to its heads before attention, in one pass: RMSNorm of queries and keys, rotary embedding,
// Qwen-1's log-n factor, and writing keys and values to the cache. Roundings are those of the single steps in
// engine.cpu.ops and engine.models.

#include <cmath>
#include <vector>

#include "cpu_cache.h"

namespace headrace {

template <typename T>
struct Heads {
  T* q;                // [tokens, heads, head_dim]
  const T* raw;        // [tokens, heads + 2 * kv_heads, head_dim]
  const float *cos, *sin;  // [tokens, half], or null
  const float* factor;     // [tokens]: times each query, or null
  const T *q_weight, *k_weight;  // [head_dim], or null
  const int64_t* slots;
  int64_t tokens, real;  // tokens from `real` on are padding: nothing of them is stored
  int heads, half;
  float eps;
  Cache<T> cache;
};

// out = the head x, normalised and rotated.
template <typename T>
void prepare(const Heads<T>& s, const T* x, const T* weight, int64_t token, T* out) {
  const int size = s.cache.head_dim;
  if (weight) {
    vf squares = {};
    for (int c = 0; c < size; c += LANES) {
      vf a = load(x + c);
      squares += a * a;
    }
    const float scale = 1.0f / std::sqrt(sum(squares) / float(size) + s.eps);
    for (int c = 0; c < size; c += LANES) store(out + c, load(weight + c) * round_as(x, load(x + c) * scale));
    x = out;
  }
  int done = 0;
  if (s.cos) {
    const float *cos = s.cos + token * s.half, *sin = s.sin + token * s.half;
    int c = 0;
    for (; c + LANES <= s.half; c += LANES) {
      vf a = load(x + c), b = load(x + s.half + c), co = load(cos + c), si = load(sin + c);
      store(out + c, a * co - b * si);
      store(out + s.half + c, b * co + a * si);
    }
    for (; c < s.half; c++) {
      const float a = single(x[c]), b = single(x[s.half + c]);
      out[c] = rounded(x, a * cos[c] - b * sin[c]);
      out[s.half + c] = rounded(x, b * cos[c] + a * sin[c]);
    }
    done = 2 * s.half;
  }
  if (x != out) std::memcpy(out + done, x + done, (size - done) * sizeof(T));
}

template <typename T>
void heads(const Heads<T>& s, int threads) {
  const int size = s.cache.head_dim, kv = s.cache.kv_heads, all = s.heads + 2 * kv;
#pragma omp parallel num_threads(threads) if (s.tokens * all * size > (1 << 15))
  {
    std::vector<T> key(size);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < s.tokens; t++) {
      const T* raw = s.raw + t * all * size;
      for (int n = 0; n < s.heads; n++) {
        T* q = s.q + (t * s.heads + n) * size;
        prepare(s, raw + n * size, s.q_weight, t, q);
        if (s.factor)
          for (int c = 0; c < size; c += LANES) store(q + c, load(q + c) * s.factor[t]);
      }
      if (t >= s.real) continue;
      for (int n = 0; n < kv; n++) {
        prepare(s, raw + (s.heads + n) * size, s.k_weight, t, key.data());
        s.cache.put(s.slots[t], n, key.data(), raw + (s.heads + kv + n) * size);
      }
    }
  }
}

}  // namespace headrace

using namespace headrace;

#define EXPORT(T, NAME)                                                                                        \
  extern "C" void headrace_heads_##NAME(T* q, T* k_cache, T* v_cache, const T* raw, const float* cos,          \
                                        const float* sin, const float* factor, const T* q_weight,              \
                                        const T* k_weight, const int64_t* slots, int64_t tokens, int64_t real, \
                                        int64_t block_stride, int heads_, int kv_heads, int head_dim, int half, \
                                        int block_size, float eps, int threads) {                              \
    heads(Heads<T>{q, raw, cos, sin, factor, q_weight, k_weight, slots, tokens, real, heads_, half, eps,       \
                   Cache<T>{k_cache, v_cache, block_stride, kv_heads, head_dim, block_size}},                  \
          threads);                                                                                            \
  }

EXPORT(float, f32)
EXPORT(bf16, bf16)
