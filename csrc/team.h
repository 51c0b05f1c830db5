// Threads that go through phases of work together, with no assumption about who runs when. The items of a phase are
// claimed: each slot owns a stretch of them, and a worker that is done with its own takes what is left of the others'.
// A phase ends when all its items are done. Whoever waits, waits for items that a running worker has claimed; so a
// worker that starts late, or never, costs its share of the speed and nothing else.
#pragma once
#include <sched.h>

#include <cstdint>

namespace fastlm {

struct alignas(64) TeamCounter {
  int64_t value = 0;
};

struct Team {
  TeamCounter* next;  // [slots] items that were claimed of a slot's stretch, over all phases
  TeamCounter* done;  // items that are done, over all phases
  int64_t slots, items;
};

}  // namespace fastlm

#ifdef FASTLM_ISA
namespace fastlm::FASTLM_ISA {
namespace {

constexpr int kSpins = 2000;  // some tens of microseconds; after that the core may be needed by whom we wait for

static inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Calls body(begin, end) until the items of `phase` are claimed, then waits until they are done. Claims end at
// multiples of `group`. A worker goes through the phases 0, 1, ... in order.
template <typename Body>
static inline void run_phase(const Team& team, int64_t slot, int64_t phase, int64_t group, int64_t most, Body body) {
  int64_t finished = 0;
  for (int64_t i = 0; i < team.slots; ++i) {
    const int64_t owner = (slot + i) % team.slots;
    const int64_t first = team.items * owner / team.slots, count = team.items * (owner + 1) / team.slots - first;
    int64_t* next = &team.next[owner].value;
    int64_t claimed = __atomic_load_n(next, __ATOMIC_RELAXED);
    while (claimed < (phase + 1) * count) {
      const int64_t begin = first + claimed - phase * count, group_end = (begin / group + 1) * group;
      int64_t end = begin + most < first + count ? begin + most : first + count;
      end = group_end < end ? group_end : end;
      if (!__atomic_compare_exchange_n(next, &claimed, claimed + end - begin, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        continue;
      body(begin, end);
      finished += end - begin;
      claimed = __atomic_load_n(next, __ATOMIC_RELAXED);
    }
  }
  int64_t* done = &team.done->value;
  if (finished > 0) __atomic_fetch_add(done, finished, __ATOMIC_RELEASE);
  for (int spin = 0; __atomic_load_n(done, __ATOMIC_ACQUIRE) < (phase + 1) * team.items;)
    spin < kSpins ? (++spin, relax()) : void(sched_yield());
}

}  // namespace
}  // namespace fastlm::FASTLM_ISA
#endif
