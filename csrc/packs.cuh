// What the pooling kernels share. A thread walks V neighbouring recurrences through time, in groups of steps that come
// into its own part of shared memory ahead of their use. Nothing passes between threads, so that they never meet.
//
// What is on its way decides the speed: 4.8 TB/s times 0.6 us of latency is 2.9 MB, 22 KB a multiprocessor of an H200.
// For an array of its inputs a thread has 64 bytes on the way, so that the 8 blocks that `fewer` leaves a
// multiprocessor have 16 KB of each; at V = 1, where there are fewer recurrences than that, it has 16 steps. Registers
// would do as well, but the compiler waits for all loads to registers together, and for copies to shared memory in
// groups.
#pragma once
#include <initializer_list>
#include <type_traits>

#include "common.cuh"
#include "ptx.h"

namespace fastlm {

constexpr int kThreads = 32;     // a block: the last one of a row idles little, and multiprocessors get equal shares
constexpr int64_t kBusy = 1056;  // blocks: two for each of the 4 x 132 schedulers of an H200

// The two 16-bit elements of a word, and the word of two.
__device__ __forceinline__ float low_half(uint32_t word, __nv_bfloat16) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float low_half(uint32_t word, __half) { return to_float(__ushort_as_half(uint16_t(word))); }
__device__ __forceinline__ float high_half(uint32_t word, __nv_bfloat16) { return __uint_as_float(word & 0xFFFF0000); }
__device__ __forceinline__ float high_half(uint32_t word, __half) {
  return to_float(__ushort_as_half(uint16_t(word >> 16)));
}
__device__ __forceinline__ __nv_bfloat162 join(float low, float high, __nv_bfloat16) {
  return __floats2bfloat162_rn(low, high);
}
__device__ __forceinline__ __half2 join(float low, float high, __half) { return __floats2half2_rn(low, high); }

// V elements as they lie in memory.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  static constexpr bool kPairs = sizeof(T) == 2 && V > 1;
  std::conditional_t<kPairs, uint32_t, T> word[kPairs ? V / 2 : V];

  __device__ __forceinline__ float operator[](int v) const {
    if constexpr (kPairs) {
      return v % 2 ? high_half(word[v / 2], T{}) : low_half(word[v / 2], T{});
    } else {
      return to_float(word[v]);
    }
  }
};

template <int V, typename T>
__device__ __forceinline__ void store_pack(T* at, const float (&x)[V]) {
  Pack<T, V> pack;
  if constexpr (Pack<T, V>::kPairs) {
#pragma unroll
    for (int v = 0; v < V; v += 2) {
      const auto pair = join(x[v], x[v + 1], T{});
      memcpy(&pack.word[v / 2], &pair, sizeof pair);
    }
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) pack.word[v] = from_float<T>(x[v]);
  }
  *reinterpret_cast<Pack<T, V>*>(at) = pack;
}

// From global to shared memory, there after the wait for the group; two bytes alone cannot be copied asynchronously.
template <typename T, int V>
__device__ __forceinline__ void fetch(Pack<T, V>& shared, const T* global) {
  if constexpr (sizeof(T) * V >= 4) {
    ptx::copy_async<sizeof(T) * V>(&shared, global);
  } else {
    shared = *reinterpret_cast<const Pack<T, V>*>(global);
  }
}

// Steps of a group of loads, and groups in shared memory: the one in use and those on their way.
template <int V>
constexpr int kAhead = V == 1 ? 8 : 4;
template <typename T, int V>
constexpr int kGroups = 1 + (V == 1 ? 16 : 64 / int(sizeof(T) * V)) / kAhead<V>;

// Calls use(slot, group) for each of `count` groups, and kSlots - 1 groups earlier fetch(slot, group).
template <int kSlots, typename Fetch, typename Use>
__device__ __forceinline__ void pipeline(int64_t count, Fetch fetch, Use use) {
  int into = 0, from = 0;
#pragma unroll 1
  for (int64_t group = 1 - kSlots; group < count; ++group) {
    if (group + kSlots - 1 < count) fetch(into, group + kSlots - 1);
    ptx::copy_async_commit();
    into = into + 1 == kSlots ? 0 : into + 1;
    if (group < 0) continue;
    ptx::copy_async_wait<kSlots - 1>();
    use(from, group);
    from = from + 1 == kSlots ? 0 : from + 1;
  }
}

// Elements n and on of a state in the dtype of the inputs or, if wide, in float32; zeros when there is none.
template <typename T, int V>
__device__ __forceinline__ void load_state(const void* state, bool wide, int64_t n, float (&x)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
    x[v] = 0.0f;
    if (state != nullptr) {
      x[v] = wide ? static_cast<const float*>(state)[n + v] : to_float(static_cast<const T*>(state)[n + v]);
    }
  }
}

template <typename T, int V>
__device__ __forceinline__ void store_state(void* state, bool wide, int64_t n, const float (&x)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (wide) {
      static_cast<float*>(state)[n + v] = x[v];
    } else {
      static_cast<T*>(state)[n + v] = from_float<T>(x[v]);
    }
  }
}

// The largest V of 4, 2 and 1, not above `most`, that divides a row and the alignment of its arrays, in elements.
inline int neighbours(int64_t row, int most, std::initializer_list<uintptr_t> elements) {
  uint64_t bits = uint64_t(row) | most;
  for (uintptr_t element : elements) bits |= element;
  return int(bits & -bits);
}

template <typename T>
uintptr_t element(const T* x) {
  return reinterpret_cast<uintptr_t>(x) / sizeof(T);
}

// V, halved until there are `busy` blocks or a load has no more than the four bytes that an asynchronous copy wants.
template <typename T>
int fewer(int most, int64_t rows, int64_t row, int64_t busy) {
  while (most * sizeof(T) > 4 && rows * ((row + kThreads * most - 1) / (kThreads * most)) < busy) most /= 2;
  return most;
}

}  // namespace fastlm
