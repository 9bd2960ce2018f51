// Causal attention over the paged KV cache, chunks of prompts and single tokens alike, as one kernel.
//
// A task is up to a few tokens of one row and one KV head, with all query heads that share it. Keys come in
// passes of PASS, counted from position 0 of the row, with an online softmax between passes (Milakov and
// Gimelshein, 2018). A query's arithmetic depends on its position only: a key that it may not see scores
// -inf and weighs exactly 0, a pass without visible keys is skipped. So its result is the same bits alone,
// in a batch, and however its prompt was cut. Slots that no row has written are never read.
//
// Layouts: cache [blocks, block_size, kv_heads, head_dim]; q and out [tokens, heads * head_dim] by stride.

#include <cmath>
#include <type_traits>
#include <vector>

#include "vec.h"

namespace headrace {

constexpr int PASS = 128;
constexpr int GROUPS = PASS / LANES;

template <typename T>
struct Step {
  T* out;
  const T* q;
  const T* k;
  const T* v;
  const int32_t* tables;
  const int64_t *starts, *cu;
  int64_t out_stride, q_stride, table_stride;
  int heads, kv_heads, head_dim, block_size, window;
  float scale;
};

// Buffers of one thread.
struct Scratch {
  std::vector<float> q, acc, scores, most, total, wide, zero;

  Scratch(int queries, int head_dim)
      : q(queries * head_dim), acc(queries * head_dim), scores(queries * PASS), most(queries),
        total(queries), wide(LANES * head_dim), zero(head_dim) {}
};

// The 16 cache rows of the keys at position `first` on; beyond `last` a row of zeros.
template <typename T>
inline void rows_of(const Step<T>& s, const T* cache, const int32_t* table, int kv_head, int first, int last,
                    const T* zero, const T** rows) {
  const int64_t stride = int64_t(s.kv_heads) * s.head_dim;
  int block = first / s.block_size, offset = first % s.block_size;
  for (int j = 0; j < LANES; j++) {
    if (first + j > last) {
      rows[j] = zero;
      continue;
    }
    int64_t slot = int64_t(table[block]) * s.block_size + offset;
    rows[j] = cache + slot * stride + kv_head * s.head_dim;
    if (++offset == s.block_size) {
      offset = 0;
      block++;
    }
  }
}

template <typename T>
inline void prefetch(const T* const* rows, int head_dim) {
  for (int j = 0; j < LANES; j++)
    for (size_t byte = 0; byte < head_dim * sizeof(T); byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(rows[j]) + byte, 0, 2);
}

// Rows as floats: the cache itself, or a widened copy.
inline void widen(const float* const* rows, int, float*, const float** wide) {
  for (int j = 0; j < LANES; j++) wide[j] = rows[j];
}

inline void widen(const bf16* const* rows, int head_dim, float* buffer, const float** wide) {
  for (int j = 0; j < LANES; j++) {
    wide[j] = buffer + j * head_dim;
    for (int c = 0; c < head_dim; c += LANES) store(buffer + j * head_dim + c, load(rows[j] + c));
  }
}

inline vf dots(const float* q, const float* const* k, int head_dim) {
  vf a[LANES] = {};
  for (int c = 0; c < head_dim; c += LANES) {
    vf x = load(q + c);
    for (int j = 0; j < LANES; j++) a[j] += x * load(k[j] + c);
  }
  return transpose_sum(a);
}

#ifdef __AVX512BF16__
// Products of bfloat16 pairs, summed in float32; head_dim is a multiple of 32.
inline vf dots(const bf16* q, const bf16* const* k, int head_dim) {
  __m512 a[LANES];
  for (int j = 0; j < LANES; j++) a[j] = _mm512_setzero_ps();
  for (int c = 0; c < head_dim; c += 2 * LANES) {
    __m512bh x = (__m512bh)_mm512_loadu_si512(q + c);
    for (int j = 0; j < LANES; j++) a[j] = _mm512_dpbf16_ps(a[j], x, (__m512bh)_mm512_loadu_si512(k[j] + c));
  }
  vf b[LANES];
  for (int j = 0; j < LANES; j++) b[j] = (vf)a[j];
  return transpose_sum(b);
}
#endif

// acc[i] += sum over the 16 keys of p[i][j] * v[j], in key order, for N queries and M vectors of the head.
template <int N, int M, typename T>
inline void weigh(const float* p, const T* const* v, int head_dim, int c, float* acc) {
  vf a[N][M];
  for (int i = 0; i < N; i++)
    for (int m = 0; m < M; m++) a[i][m] = load(acc + i * head_dim + c + m * LANES);
#pragma GCC unroll 2
  for (int j = 0; j < LANES; j++) {
    vf x[M];
    for (int m = 0; m < M; m++) x[m] = load(v[j] + c + m * LANES);
    for (int i = 0; i < N; i++) {
      vf w = broadcast(p[i * PASS + j]);
      for (int m = 0; m < M; m++) a[i][m] += w * x[m];
    }
  }
  for (int i = 0; i < N; i++)
    for (int m = 0; m < M; m++) store(acc + i * head_dim + c + m * LANES, a[i][m]);
}

// The same for any number of queries: values are read, and widened, once for four of them.
template <typename T>
inline void weigh_all(const float* p, const T* const* v, int head_dim, int queries, float* acc) {
  int i = 0;
  auto some = [&](auto n) {
    constexpr int N = decltype(n)::value;
    for (; i + N <= queries; i += N) {
      int c = 0;
      for (; c + 4 * LANES <= head_dim; c += 4 * LANES) weigh<N, 4>(p + i * PASS, v, head_dim, c, acc + i * head_dim);
      for (; c < head_dim; c += LANES) weigh<N, 1>(p + i * PASS, v, head_dim, c, acc + i * head_dim);
    }
  };
  some(std::integral_constant<int, 4>{});
  some(std::integral_constant<int, 2>{});
  some(std::integral_constant<int, 1>{});
}

template <typename T>
void attend(const Step<T>& s, int row, int kv_head, int first, int count, Scratch& b) {
  const int share = s.heads / s.kv_heads, queries = count * share, h = s.head_dim;
  const int32_t* table = s.tables + row * s.table_stride;
  const int64_t token = s.cu[row] + first;  // of the step
  const int position = int(s.starts[row]) + first, last = position + count - 1;
  const T* zero = reinterpret_cast<const T*>(b.zero.data());
#ifdef __AVX512BF16__
  constexpr bool pairs = sizeof(T) == 2;
#else
  constexpr bool pairs = false;
#endif
  const bool widened = !pairs || h % (2 * LANES);

  auto query = [&](int i) { return s.q + (token + i / share) * s.q_stride + (kv_head * share + i % share) * h; };
  for (int i = 0; i < queries; i++) {
    b.most[i] = -INFINITY;
    b.total[i] = 0;
    for (int c = 0; c < h; c += LANES) {
      store(&b.acc[i * h + c], vf{});
      if (widened) store(&b.q[i * h + c], load(query(i) + c));
    }
  }

  const int oldest = s.window ? (position - s.window + 1 > 0 ? position - s.window + 1 : 0) : 0;
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const T *k_rows[GROUPS][LANES], *v_rows[GROUPS][LANES];
  const float* wide[LANES];
  for (int base = oldest / PASS * PASS; base <= last; base += PASS) {
    const int groups = (last - base) / LANES + 1 < GROUPS ? (last - base) / LANES + 1 : GROUPS;
    for (int g = 0; g < groups; g++) {
      rows_of(s, s.k, table, kv_head, base + g * LANES, last, zero, k_rows[g]);
      rows_of(s, s.v, table, kv_head, base + g * LANES, last, zero, v_rows[g]);
    }
    prefetch(k_rows[0], h);
    for (int g = 0; g < groups; g++) {
      if (g + 1 < groups) prefetch(k_rows[g + 1], h);
      prefetch(v_rows[g], h);
      const T* const* rows = k_rows[g];
      if (widened) widen(rows, h, b.wide.data(), wide);
      vi key = lane + (base + g * LANES);
      for (int i = 0; i < queries; i++) {
        const int at = position + i / share;
        vf score;
#ifdef __AVX512BF16__
        if constexpr (pairs)
          score = widened ? dots(&b.q[i * h], wide, h) : dots(query(i), rows, h);
        else
#endif
          score = dots(&b.q[i * h], wide, h);
        vi seen = key <= at;
        if (s.window) seen &= key > at - s.window;
        store(&b.scores[i * PASS + g * LANES], seen ? score * s.scale : broadcast(-INFINITY));
      }
    }

    for (int i = 0; i < queries; i++) {
      float* score = &b.scores[i * PASS];
      vf top = broadcast(-INFINITY);
      for (int g = 0; g < groups; g++) top = max(top, load(score + g * LANES));
      const float most = max(top);
      if (most == -INFINITY) {  // sees none of this pass
        for (int g = 0; g < groups; g++) store(score + g * LANES, vf{});
        continue;
      }
      const float now = most > b.most[i] ? most : b.most[i];
      const float decay = exp(b.most[i] - now);
      vf total = {};
      for (int g = 0; g < groups; g++) {
        vf p = exp(load(score + g * LANES) - now);
        store(score + g * LANES, p);
        total += p;
      }
      b.most[i] = now;
      b.total[i] = b.total[i] * decay + sum(total);
      if (decay != 1.0f)
        for (int c = 0; c < h; c += LANES) store(&b.acc[i * h + c], load(&b.acc[i * h + c]) * decay);
    }

    for (int g = 0; g < groups; g++) weigh_all(&b.scores[g * LANES], v_rows[g], h, queries, b.acc.data());
  }

  for (int i = 0; i < queries; i++) {
    T* out = s.out + (token + i / share) * s.out_stride + (kv_head * share + i % share) * h;
    for (int c = 0; c < h; c += LANES) store(out + c, load(&b.acc[i * h + c]) / b.total[i]);
  }
}

// tasks: [tasks, 3] of (row, first token of the row's step, tokens).
template <typename T>
void run(const Step<T>& s, const int32_t* tasks, int64_t number, int most_tokens, int threads) {
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch(most_tokens * (s.heads / s.kv_heads), s.head_dim);
#pragma omp for schedule(dynamic, 1) collapse(2)
    for (int64_t i = 0; i < number; i++)
      for (int head = 0; head < s.kv_heads; head++)
        attend(s, tasks[3 * i], head, tasks[3 * i + 1], tasks[3 * i + 2], scratch);
  }
}

template <typename T>
void store_kv(const T* k, const T* v, int64_t k_stride, int64_t v_stride, T* k_cache, T* v_cache,
              const int64_t* slots, int64_t tokens, int64_t width) {
  for (int64_t t = 0; t < tokens; t++) {
    std::memcpy(k_cache + slots[t] * width, k + t * k_stride, width * sizeof(T));
    std::memcpy(v_cache + slots[t] * width, v + t * v_stride, width * sizeof(T));
  }
}

}  // namespace headrace

using namespace headrace;

#define EXPORT(T, NAME)                                                                                        \
  extern "C" void headrace_store_##NAME(const T* k, const T* v, int64_t k_stride, int64_t v_stride,            \
                                        T* k_cache, T* v_cache, const int64_t* slots, int64_t tokens,          \
                                        int64_t width) {                                                       \
    store_kv(k, v, k_stride, v_stride, k_cache, v_cache, slots, tokens, width);                                \
  }                                                                                                            \
  extern "C" void headrace_attend_##NAME(T* out, const T* q, const T* k, const T* v, const int32_t* tables,    \
                                         const int64_t* starts, const int64_t* cu, const int32_t* tasks,       \
                                         int64_t out_stride, int64_t q_stride, int64_t table_stride,           \
                                         int64_t number, int most_tokens, int heads, int kv_heads,             \
                                         int head_dim, int block_size, int window, float scale, int threads) { \
    Step<T> step{out,          q,     k,        v,        tables,     starts, cu,   out_stride, q_stride,      \
                 table_stride, heads, kv_heads, head_dim, block_size, window, scale};                          \
    run(step, tasks, number, most_tokens, threads);                                                            \
  }

EXPORT(float, f32)
EXPORT(bf16, bf16)
