// Causal attention over the paged KV cache, chunks of prompts and single tokens alike, as one kernel.
//
// A task is up to a few tokens of one row; a thread goes through its KV heads, each with all query heads that
// share it. Keys come in passes of PASS, counted from position 0 of the row, with an online softmax between
// passes (Milakov and Gimelshein, 2018). A query's arithmetic depends on its position only: a key that it
// may not see scores -inf and weighs exactly 0, a pass without visible keys is skipped. So its result is the
// same bits alone, in a batch, and however its prompt was cut. Values that no row has written never count.
//
// Decoding waits for memory, not for arithmetic: while scores are computed the values of the same keys are
// fetched, and while values are weighed the next keys.
//
// q and out [tokens, heads * head_dim] by stride; the cache is laid out as in cpu_cache.h.

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "cpu_cache.h"

namespace headrace {

constexpr int PASS = 128;
constexpr int GROUPS = PASS / GROUP;

template <typename T>
struct Step {
  T* out;
  const T* q;
  Cache<T> cache;
  const int32_t* tables;
  const int64_t *starts, *cu;
  int64_t out_stride, q_stride, table_stride;
  int heads, window;
  float scale;
};

// Buffers of one thread.
template <typename T>
struct Scratch {
  std::vector<float> acc, scores, most, total;
  std::vector<T> weights, last;

  Scratch(int queries, int head_dim)
      : acc(queries * head_dim), scores(queries * PASS), most(queries), total(queries), weights(queries * PASS),
        last(head_dim * side<T>()) {}
};

// scores[i][g * 16 ..] = q[i] . k for N queries and G groups of keys; the groups of `v` are fetched.
template <int N, int G, typename T>
inline void score(const T* const* q, const T* const* k, const T* const* v, int head_dim, float scale, float* scores) {
  constexpr int S = side<T>();
  vf a[N][G];
  for (int i = 0; i < N; i++)
    for (int g = 0; g < G; g++) a[i][g] = vf{};
  for (int d = 0; d < head_dim; d += S) {
    if (v)
      for (int g = 0; g < G; g++) __builtin_prefetch(v[g] + d * GROUP, 0, 2);
    for (int i = 0; i < N; i++)
      for (int g = 0; g < G; g++) a[i][g] = multiply(a[i][g], q[i] + d, k[g] + d * GROUP);
  }
  for (int i = 0; i < N; i++)
    for (int g = 0; g < G; g++) store(scores + i * PASS + g * GROUP, a[i][g] * scale);
}

// All groups, a few at a time: eight sums in flight hide the latency of each.
template <int N, typename T>
inline void score_groups(const T* const* q, const T* const* k, const T* const* v, int groups, int head_dim,
                         float scale, float* scores) {
  constexpr int G = 8 / N;
  auto some = [&](auto count, int g) {
    score<N, decltype(count)::value>(q, k + g, v ? v + g : nullptr, head_dim, scale, scores + g * GROUP);
  };
  int g = 0;
  for (; g + G <= groups; g += G) some(std::integral_constant<int, G>{}, g);
  switch (groups - g) {
    case 1: return some(std::integral_constant<int, 1>{}, g);
    case 2: return some(std::integral_constant<int, 2>{}, g);
    case 3: return some(std::integral_constant<int, 3>{}, g);
    case 4: return some(std::integral_constant<int, 4>{}, g);
    case 5: return some(std::integral_constant<int, 5>{}, g);
    case 6: return some(std::integral_constant<int, 6>{}, g);
    case 7: return some(std::integral_constant<int, 7>{}, g);
  }
}

// acc[i][c ..] += p[i] . v over `keys` tokens, in their order, for N queries and M vectors of the head. An
// odd last token stands in `last`, beside zeros. The groups of `next` are fetched.
template <int N, int M, typename T>
inline void weigh(const T* p, const T* const* v, const T* last, const T* const* next, int keys, int head_dim, int c,
                  float* acc) {
  constexpr int S = side<T>(), STEP = GROUP / S;
  vf a[N][M];
  for (int i = 0; i < N; i++)
    for (int m = 0; m < M; m++) a[i][m] = load(acc + i * head_dim + c + m * LANES);
  auto add = [&](const T* row, int at) __attribute__((always_inline)) {
    for (int i = 0; i < N; i++)
      for (int m = 0; m < M; m++) a[i][m] = multiply(a[i][m], p + i * PASS + at * S, row + (c + m * LANES) * S);
  };
  const int whole = keys / S;
  for (int at = 0; at < whole; at++) {
    const int64_t offset = at % STEP * head_dim * S;
    if (next)
      for (int m = 0; m < M; m++) __builtin_prefetch(next[at / STEP] + offset + (c + m * LANES) * S, 0, 2);
    add(v[at / STEP] + offset, at);
  }
  if (keys % S) add(last, whole);
  for (int i = 0; i < N; i++)
    for (int m = 0; m < M; m++) store(acc + i * head_dim + c + m * LANES, a[i][m]);
}

template <int N, typename T>
inline void weigh_head(const T* p, const T* const* v, const T* last, const T* const* next, int keys, int head_dim,
                       float* acc) {
  int c = 0;
  if constexpr (N <= 2)
    for (; c + 8 * LANES <= head_dim; c += 8 * LANES) weigh<N, 8>(p, v, last, next, keys, head_dim, c, acc);
  for (; c + 4 * LANES <= head_dim; c += 4 * LANES) weigh<N, 4>(p, v, last, next, keys, head_dim, c, acc);
  for (; c < head_dim; c += LANES) weigh<N, 1>(p, v, last, next, keys, head_dim, c, acc);
}

template <typename T>
void attend(const Step<T>& s, int row, int kv_head, int first, int count, Scratch<T>& b) {
  constexpr int S = side<T>();
  const Cache<T>& cache = s.cache;
  const int share = s.heads / cache.kv_heads, queries = count * share, h = cache.head_dim;
  const int32_t* table = s.tables + row * s.table_stride;
  const int64_t token = s.cu[row] + first;  // of the step
  const int position = int(s.starts[row]) + first, last = position + count - 1;

  auto query = [&](int i) { return s.q + (token + i / share) * s.q_stride + (kv_head * share + i % share) * h; };
  // Calls f<N>(first of N queries) for all of them.
  auto each = [&](auto f) {
    int i = 0;
    for (; i + 4 <= queries; i += 4) f(std::integral_constant<int, 4>{}, i);
    for (; i + 2 <= queries; i += 2) f(std::integral_constant<int, 2>{}, i);
    if (i < queries) f(std::integral_constant<int, 1>{}, i);
  };
  const int per_block = cache.block_size / GROUP;
  auto at = [&](int key, int head) {  // most blocks are one group: no division then
    const int group = key / GROUP;
    return per_block == 1 ? cache.group(table[group], head, 0)
                          : cache.group(table[group / per_block], head, group % per_block * GROUP);
  };
  for (int i = 0; i < queries; i++) b.most[i] = -INFINITY, b.total[i] = 0;
  std::fill_n(b.acc.begin(), queries * h, 0.0f);

  const int oldest = s.window && position - s.window + 1 > 0 ? position - s.window + 1 : 0;
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const T *k[GROUPS], *v[GROUPS], *next[GROUPS];
  for (int base = oldest / PASS * PASS; base <= last; base += PASS) {
    const int keys = last - base + 1 < PASS ? last - base + 1 : PASS, groups = (keys + GROUP - 1) / GROUP;
    for (int g = 0; g < groups; g++) {
      const int64_t where = at(base + g * GROUP, kv_head);
      k[g] = cache.k + where;
      v[g] = cache.v + where;
    }
    bool fetched = false;
    each([&](auto n, int i) {
      constexpr int N = decltype(n)::value;
      const T* q[N];
      for (int j = 0; j < N; j++) q[j] = query(i + j);
      score_groups<N>(q, k, fetched ? nullptr : v, groups, h, s.scale, &b.scores[i * PASS]);
      fetched = true;
    });

    for (int i = 0; i < queries; i++) {
      float* score = &b.scores[i * PASS];
      T* weight = &b.weights[i * PASS];
      const int newest = position + i / share;
      vf top = broadcast(-INFINITY);
      for (int g = 0; g < groups; g++) {
        vi key = lane + (base + g * GROUP), seen = key <= newest;
        if (s.window) seen &= key > newest - s.window;
        vf x = seen ? load(score + g * GROUP) : broadcast(-INFINITY);
        store(score + g * GROUP, x);
        top = max(top, x);
      }
      const float most = max(top);
      if (most == -INFINITY) {  // sees none of this pass
        for (int g = 0; g < groups; g++) store(weight + g * GROUP, vf{});
        continue;
      }
      const float now = most > b.most[i] ? most : b.most[i];
      const float decay = exp(b.most[i] - now);
      vf total = {};
      for (int g = 0; g < groups; g++) {
        vf p = round_as(weight, exp(load(score + g * GROUP) - now));
        store(weight + g * GROUP, p);
        total += p;
      }
      b.most[i] = now;
      b.total[i] = b.total[i] * decay + sum(total);
      if (decay != 1.0f)
        for (int c = 0; c < h; c += LANES) store(&b.acc[i * h + c], load(&b.acc[i * h + c]) * decay);
    }

    if (keys % S) {  // the last token's partner may never have been written
      const T* row = v[(keys - 1) / GROUP] + (keys - 1) % GROUP / S * h * S;
      for (int d = 0; d < h; d++) b.last[d * S] = row[d * S];
    }
    // Of the next pass, or of the next head's first one, as many groups as this pass has.
    const bool more = base + PASS <= last;
    const int head = more ? kv_head : kv_head + 1, begin = more ? base + PASS : oldest / PASS * PASS;
    const bool fetch = head < cache.kv_heads;
    for (int g = 0; fetch && g < groups; g++)
      next[g] = cache.k + at(begin + g * GROUP <= last ? begin + g * GROUP : begin, head);
    fetched = false;
    each([&](auto n, int i) {
      weigh_head<decltype(n)::value>(&b.weights[i * PASS], v, b.last.data(), fetch && !fetched ? next : nullptr, keys,
                                     h, &b.acc[i * h]);
      fetched = true;
    });
  }

  for (int i = 0; i < queries; i++) {
    T* out = s.out + (token + i / share) * s.out_stride + (kv_head * share + i % share) * h;
    const float part = 1.0f / b.total[i];
    for (int c = 0; c < h; c += LANES) store(out + c, load(&b.acc[i * h + c]) * part);
  }
}

// tasks: [tasks, 3] of (row, first token of the row's step, tokens). Where they are few, their heads are
// shared out too.
template <typename T>
void run(const Step<T>& s, const int32_t* tasks, int64_t number, int most_tokens, int threads) {
  const int heads = s.cache.kv_heads, apart = number < 4 * threads ? heads : 1;
#pragma omp parallel num_threads(threads)
  {
    Scratch<T> scratch(most_tokens * (s.heads / heads), s.cache.head_dim);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < number * apart; i++)
      for (int head = i % apart; head < (apart > 1 ? i % apart + 1 : heads); head++)
        attend(s, tasks[3 * (i / apart)], head, tasks[3 * (i / apart) + 1], tasks[3 * (i / apart) + 2], scratch);
  }
}

// Writes keys and values [tokens, kv_heads, head_dim] by stride to their slots.
template <typename T>
void store_kv(const Cache<T>& cache, const T* k, const T* v, int64_t k_stride, int64_t v_stride,
              const int64_t* slots, int64_t tokens, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens > 15)
  for (int64_t t = 0; t < tokens; t++)
    for (int n = 0; n < cache.kv_heads; n++)
      cache.put(slots[t], n, k + t * k_stride + n * cache.head_dim, v + t * v_stride + n * cache.head_dim);
}

}  // namespace headrace

using namespace headrace;

#define EXPORT(T, NAME)                                                                                         \
  extern "C" void headrace_store_##NAME(T* k_cache, T* v_cache, const T* k, const T* v, const int64_t* slots,   \
                                        int64_t k_stride, int64_t v_stride, int64_t block_stride,               \
                                        int64_t tokens, int kv_heads,                                           \
                                        int head_dim, int block_size, int threads) {                            \
    store_kv(Cache<T>{k_cache, v_cache, block_stride, kv_heads, head_dim, block_size}, k, v, k_stride, v_stride, slots,       \
             tokens, threads);                                                                                  \
  }                                                                                                             \
  extern "C" void headrace_attend_##NAME(T* out, const T* q, T* k_cache, T* v_cache, const int32_t* tables,     \
                                         const int64_t* starts, const int64_t* cu, const int32_t* tasks,        \
                                         int64_t out_stride, int64_t q_stride, int64_t table_stride,            \
                                         int64_t block_stride,                                                  \
                                         int64_t number, int most_tokens, int heads, int kv_heads,              \
                                         int head_dim, int block_size, int window, float scale, int threads) {  \
    Step<T> step{out, q,          Cache<T>{k_cache, v_cache, block_stride, kv_heads, head_dim, block_size}, tables, starts,   \
                 cu,  out_stride, q_stride, table_stride, heads, window, scale};                                \
    run(step, tasks, number, most_tokens, threads);                                                             \
  }

EXPORT(float, f32)
EXPORT(bf16, bf16)
