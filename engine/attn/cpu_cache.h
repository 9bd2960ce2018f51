// Where keys and values of a CPU rank lie, and how they are written there.
//
// A group is GROUP consecutive tokens of one KV head, contiguous, so that attention streams through memory.
// Keys stand upright, [head_dim / S][GROUP][S]: one vector holds the same S dimensions of 16 tokens, and 16
// scores grow at once. Values lie as [GROUP / S][head_dim][S]: one vector holds 16 dimensions of S tokens.
// S is 2 for bfloat16, whose products are summed in pairs, and 1 for float.
//
// Cache of a layer: [blocks][kv_heads][block_size / GROUP][group], blocks `stride` elements apart: a power of
// two would put all blocks of a row into the same few sets of the processor's caches.
#pragma once

#include "vec.h"

namespace headrace {

constexpr int GROUP = LANES;

template <typename T>
struct Cache {
  T *k, *v;
  int64_t stride;
  int kv_heads, head_dim, block_size;

  // Elements from the cache's start to the group of a position's token, given its block.
  int64_t group(int64_t block, int head, int offset) const {
    return block * stride + (head * (block_size / GROUP) + offset / GROUP) * int64_t(GROUP) * head_dim;
  }

  // Writes one token's key and value. Tokens of one group may be written by several threads at once.
  void put(int64_t slot, int head, const T* key, const T* value) const {
    constexpr int S = side<T>();
    const int offset = int(slot % block_size), lane = offset % GROUP;
    const int64_t at = group(slot / block_size, head, offset);
    T* upright = k + at + lane * S;
    for (int d = 0; d < head_dim; d += S) std::memcpy(upright + d * GROUP, key + d, S * sizeof(T));
    T* flat = v + at + lane / S * head_dim * S + lane % S;
    for (int d = 0; d < head_dim; d++) flat[d * S] = value[d];
  }
};

}  // namespace headrace
