// Sums and gathers between ranks of one machine through a piece of shared memory.
//
// Every rank writes message number n into its slot of buffer n % 2, raises its flag to n and waits until all
// flags are there. No second barrier is needed: who writes n has seen all others' n - 1, so they have read
// n - 2, which lay in the same buffer.
//
// Memory: a flag for each rank, a line apart, then [2][world][slot].

#include <sched.h>
#include <time.h>

#include <atomic>

#include "vec.h"

namespace headrace {

constexpr int64_t FLAG = 64, FLAGS = 4096;  // bytes
constexpr int MOST_RANKS = FLAGS / FLAG;
constexpr int SPINS = 4096;  // before the core is offered to others

struct Shared {
  char* memory;
  int64_t slot;  // bytes
  int rank, world;

  std::atomic<uint64_t>& flag(int of) const { return *reinterpret_cast<std::atomic<uint64_t>*>(memory + of * FLAG); }
  char* at(uint64_t number, int of) const { return memory + FLAGS + (int64_t(number % 2) * world + of) * slot; }

  // False when some rank has not come within the time.
  bool exchange(uint64_t number, const void* message, int64_t bytes, double timeout) const {
    std::memcpy(at(number, rank), message, bytes);
    flag(rank).store(number, std::memory_order_release);
    double deadline = 0;
    for (int other = 0; other < world; other++)
      for (int64_t spins = 0; flag(other).load(std::memory_order_acquire) < number; spins++) {
        if (spins < SPINS) {
#ifdef __x86_64__
          __builtin_ia32_pause();
#endif
          continue;
        }
        sched_yield();
        if (spins % 64) continue;
        timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        const double seconds = now.tv_sec + 1e-9 * now.tv_nsec;
        if (!deadline) deadline = seconds + timeout;
        if (seconds > deadline) return false;
      }
    return true;
  }
};

// The sum over ranks, added pairwise: neighbours first.
inline vf tree(vf* parts, int number) {
  while (number > 1) {
    for (int i = 0; i < number / 2; i++) parts[i] = parts[2 * i] + parts[2 * i + 1];
    if (number % 2) parts[number / 2] = parts[number - 1];
    number = (number + 1) / 2;
  }
  return parts[0];
}

template <typename T>
int sum_over_ranks(const Shared& s, T* x, int64_t count, uint64_t number, double timeout, int threads) {
  if (!s.exchange(number, x, count * sizeof(T), timeout)) return 0;
  const T* slots[MOST_RANKS];
  for (int r = 0; r < s.world; r++) slots[r] = reinterpret_cast<const T*>(s.at(number, r));
#pragma omp parallel for num_threads(threads) if (count > (1 << 15))
  for (int64_t i = 0; i < count / LANES; i++) {
    vf parts[MOST_RANKS];
    for (int r = 0; r < s.world; r++) parts[r] = load(slots[r] + i * LANES);
    store(x + i * LANES, tree(parts, s.world));
  }
  for (int64_t i = count / LANES * LANES; i < count; i++) {
    vf parts[MOST_RANKS];
    for (int r = 0; r < s.world; r++) parts[r] = broadcast(single(slots[r][i]));
    x[i] = rounded(x, tree(parts, s.world)[0]);
  }
  return 1;
}

}  // namespace headrace

using namespace headrace;

// Both return 0 when a rank has not come in time. Sums are in place; gathered messages lie by rank.
#define EXPORT(T, NAME)                                                                                       \
  extern "C" int headrace_sum_##NAME(char* memory, T* x, int64_t slot, int64_t count, int64_t number,         \
                                     int rank, int world, int threads, double timeout) {                      \
    return sum_over_ranks(Shared{memory, slot, rank, world}, x, count, number, timeout, threads);             \
  }

EXPORT(float, f32)
EXPORT(bf16, bf16)

extern "C" int headrace_gather(char* memory, char* out, const char* x, int64_t slot, int64_t bytes, int64_t number,
                               int rank, int world, double timeout) {
  const Shared s{memory, slot, rank, world};
  if (!s.exchange(number, x, bytes, timeout)) return 0;
  for (int r = 0; r < world; r++) std::memcpy(out + r * bytes, s.at(number, r), bytes);
  return 1;
}
