// What a thread knows of the others' past: vector clocks that threads share until they differ.
//
// A time is counted for each thread, for each thread's asynchronous copies, and for each barrier in shared memory that
// bulk copies report to. An access happened before now when its time is at most the one known here.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace fastlm::emulator {

// A counted reference; the counts need no atomics, as all fibers are one thread of the process.
template <typename T>
class Ref {
 public:
  Ref() = default;
  Ref(const Ref& other) : p(other.p) {
    if (p) ++p->references;
  }
  Ref(Ref&& other) noexcept : p(std::exchange(other.p, nullptr)) {}
  Ref& operator=(Ref other) noexcept {
    std::swap(p, other.p);
    return *this;
  }
  ~Ref() {
    if (p && --p->references == 0) delete p;
  }

  const T* operator->() const { return p; }
  const T& operator*() const { return *p; }
  explicit operator bool() const { return p != nullptr; }
  bool operator==(const Ref& other) const { return p == other.p; }

  // The object, no longer shared.
  T& change() {
    if (!p) {
      p = new T;
      p->references = 1;
    } else if (p->references > 1) {
      --p->references;
      p = new T(*p);
      p->references = 1;
    }
    return *p;
  }

 private:
  T* p = nullptr;
};

struct Leaf {  // the times of one block
  unsigned references = 0;
  std::vector<uint32_t> times;
};

struct Clock {
  unsigned references = 0;
  std::vector<Ref<Leaf>> leaves;
};

struct Times {                       // how the ids of one launch are laid out
  uint32_t blocks = 0, threads = 0;  // threads of a block, rounded up to warps
  static constexpr uint32_t kBarriers = 32;
  uint32_t per_block() const { return 2 * threads + kBarriers; }
};
extern Times times;

inline uint32_t time_of(const Ref<Clock>& clock, uint32_t id) {
  if (!clock) return 0;
  const Ref<Leaf>& leaf = clock->leaves[id / times.per_block()];
  return leaf ? leaf->times[id % times.per_block()] : 0;
}

inline void raise(Ref<Clock>& clock, uint32_t id, uint32_t time) {
  if (time_of(clock, id) >= time) return;
  Clock& mine = clock.change();
  mine.leaves.resize(times.blocks);
  Leaf& leaf = mine.leaves[id / times.per_block()].change();
  leaf.times.resize(times.per_block());
  leaf.times[id % times.per_block()] = time;
}

inline void join(Ref<Leaf>& to, const Ref<Leaf>& from) {
  if (to == from || !from) return;
  if (!to) {
    to = from;
    return;
  }
  bool less = false, more = false;
  const size_t n = to->times.size();
  const uint32_t *mine = to->times.data(), *theirs = from->times.data();
  for (size_t i = 0; i < n; ++i) {
    less |= mine[i] < theirs[i];
    more |= mine[i] > theirs[i];
  }
  if (!less) return;
  if (!more) {
    to = from;
    return;
  }
  uint32_t* sum = to.change().times.data();
  for (size_t i = 0; i < n; ++i) sum[i] = std::max(sum[i], theirs[i]);
}

inline void join(Ref<Clock>& to, const Ref<Clock>& from) {
  if (to == from || !from) return;
  if (!to) {
    to = from;
    return;
  }
  Clock& mine = to.change();
  for (size_t b = 0; b < mine.leaves.size(); ++b) join(mine.leaves[b], from->leaves[b]);
}

// `seen`: what happened before. `fenced`: the part of it that asynchronous bulk copies see, too.
struct Knowledge {
  Ref<Clock> seen, fenced;
  void learn(const Knowledge& other) {
    join(seen, other.seen);
    join(fenced, other.fenced);
  }
};

}  // namespace fastlm::emulator
