// What each function of csrc/ptx.h does under the emulator: barriers and collectives, words that blocks share,
// cp.async.
#include <cuda_fp16.h>

#include <unordered_map>

#include "machine.h"

namespace fastlm::emulator {

void Gathering::add(Thread& t) {
  if (!(t.knows.seen == last_seen)) {  // most threads share what they know
    join(sum.seen, t.knows.seen);
    last_seen = t.knows.seen;
  }
  join(sum.fenced, t.knows.fenced);
  raise(sum.seen, t.id, t.now);
}

namespace {

struct Release {  // of a word, the last one
  Knowledge knows;
  uint32_t thread, time;
};
std::unordered_map<const void*, Release> released;

std::string in(const char* what, const Site& site) { return std::string(" in ") + what + " at " + describe(site); }

// The lanes of a warp come to one instruction. True for the last one, which acts for all and wakes the others.
bool meet_warp(const char* what, const Site& site, const void* operand = nullptr) {
  Thread& t = self();
  Warp& w = *t.warp;
  if (w.arrived == 0) {
    w.what = what;
    w.site = site;
  } else if (w.site.line() != site.line() || w.site.column() != site.column() || w.what != what) {
    fail("divergence: " + describe(t) + in(what, site) + ", other lanes of its warp" + in(w.what, w.site));
  }
  for (const Thread* other : w.lanes) {
    if (other->done) fail("exit of a thread that others wait for: " + describe(*other) + ", awaited" + in(what, site));
  }
  w.operands[t.lane] = operand;
  w.arrived |= 1u << t.lane;
  if (unsigned(__builtin_popcount(w.arrived)) == w.lanes.size()) {
    w.arrived = 0;
    return true;
  }
  suspend(what, site);
  return false;
}

void wake_others(Warp& w) {
  for (Thread* t : w.lanes) {
    if (t != &self()) wake(*t);
  }
}

// Everyone has seen what all of them had, and their times go on from one number.
void order(const std::vector<Warp*>& warps, const Knowledge& sum) {
  ++machine.progress;
  uint32_t now = 0;
  for (const Warp* w : warps) {
    for (const Thread* t : w->lanes) now = std::max(now, t->now);
  }
  for (Warp* w : warps) {
    for (Thread* t : w->lanes) {
      t->knows = sum;
      t->now = now + 1;
    }
  }
}

void meet(Meeting& m, const char* what, const Site& site) {
  if (!meet_warp(what, site)) return;
  Warp& mine = warp();
  for (Thread* t : mine.lanes) m.gathering.add(*t);
  m.waiting.push_back(&mine);
  m.arrived += unsigned(mine.lanes.size());
  if (m.arrived > m.expected) fail("a barrier for fewer threads than come:" + in(what, site));
  if (m.arrived < m.expected) return suspend(what, site);
  order(m.waiting, m.gathering.sum);
  for (Warp* w : m.waiting) {
    for (Thread* t : w->lanes) {
      if (t != &self()) wake(*t);
    }
  }
  m.arrived = 0;
  m.waiting.clear();
  m.gathering.clear();
}

template <typename Operand, typename Act>
void collect(const char* what, const Site& site, Operand& mine, Act act) {
  if (!meet_warp(what, site, &mine)) return;
  act([](unsigned lane) -> Operand& { return *static_cast<Operand*>(const_cast<void*>(warp().operands[lane])); });
  wake_others(warp());
}

void want_shared(const void* p, const char* what, const Site& site) {
  const Region* r = find_region(p);
  if (r == nullptr || r->shared_of != int(block().index)) fail("not this block's shared memory:" + in(what, site));
}

void want_aligned(const void* p, unsigned bytes, const char* what, const Site& site) {
  if (reinterpret_cast<uintptr_t>(p) % bytes == 0) return;
  fail("misaligned: " + std::to_string(bytes) + " bytes by " + describe(self()) + in(what, site));
}

}  // namespace

void forget_instructions() {
  released.clear();
  forget_mbarriers();
}

void finish_thread(Thread& t) {
  Block& b = *t.warp->block;
  const char* fault = "exit of a thread that others wait for: ";
  if (!t.copies.empty()) fail("copies never waited for: " + describe(t) + " has ended");
  if (t.warp->arrived) fail(fault + describe(t) + ", awaited" + in(t.warp->what, t.warp->site));
  if (b.barrier.arrived) fail(fault + describe(t) + ", awaited in sync_block");
  if (b.cluster->arrived || t.arrived_at_cluster) fail(fault + describe(t) + ", awaited in the cluster's barrier");
  b.at_end.learn(t.knows);
  --b.left;
}

// ---- Barriers

void sync_block(Site site) {
  if (!keeps("sync_block", site)) return;
  if (block().left < block().threads.size()) fail("exit of a thread that others wait for:" + in("sync_block", site));
  meet(block().barrier, "sync_block", site);
}

void sync_warp(Site site) {
  if (!keeps("sync_warp", site) || !meet_warp("sync_warp", site)) return;
  Gathering gathering;
  for (Thread* t : warp().lanes) gathering.add(*t);
  order({&warp()}, gathering.sum);
  wake_others(warp());
}

void sync_named(unsigned id, unsigned threads, Site site) {
  if (!keeps("sync_named", site)) return;
  if (id == 0 || id > 15 || threads == 0 || threads % 32) fail("no such named barrier:" + in("sync_named", site));
  Meeting& m = block().named[id];
  if (m.arrived && m.expected != threads) fail("a named barrier for two numbers of threads:" + in("sync_named", site));
  m.expected = threads;
  meet(m, "sync_named", site);
}

// ---- Clusters

namespace {

void arrive_at_cluster(const char* what, const Site& site) {
  if (!meet_warp(what, site)) return;
  Cluster& c = *block().cluster;
  for (const Block* b : c.blocks) {
    if (b->left < b->threads.size()) fail("exit of a cluster peer: block " + std::to_string(b->index) + in(what, site));
  }
  for (Thread* t : warp().lanes) {
    if (t->arrived_at_cluster) fail("cluster_arrive twice without a wait: " + describe(*t) + in(what, site));
    t->arrived_at_cluster = true;
    t->cluster_phase = c.phase;
    c.gathering.add(*t);
    ++t->now;
  }
  c.arrived += unsigned(warp().lanes.size());
  if (c.arrived == c.expected) {
    c.arrived = 0;
    ++c.phase;
    c.released = c.gathering.sum;
    c.gathering.clear();
    for (Thread* t : c.waiting) wake(*t);
    c.waiting.clear();
  }
  wake_others(warp());
}

void wait_for_cluster(const char* what, const Site& site) {
  if (meet_warp(what, site)) wake_others(warp());
  Thread& t = self();
  Cluster& c = *block().cluster;
  if (!t.arrived_at_cluster) fail("cluster_wait without cluster_arrive: " + describe(t) + in(what, site));
  if (c.phase == t.cluster_phase) {
    c.waiting.push_back(&t);
    suspend(what, site);
  }
  t.arrived_at_cluster = false;
  t.knows.learn(c.released);
}

}  // namespace

void cluster_arrive(Site site) {
  if (keeps("cluster_arrive", site)) arrive_at_cluster("cluster_arrive", site);
}

void cluster_wait(Site site) {
  if (keeps("cluster_wait", site)) wait_for_cluster("cluster_wait", site);
}

void cluster_sync(Site site) {
  if (!keeps("cluster_sync", site)) return;
  arrive_at_cluster("cluster_sync", site);
  wait_for_cluster("cluster_sync", site);
}

unsigned cluster_rank() { return block().rank; }

void* map_rank(void* mine, unsigned rank, Site site) {
  want_shared(mine, "map_rank", site);
  Cluster& c = *block().cluster;
  if (rank >= c.blocks.size()) fail("no such rank: " + std::to_string(rank) + in("map_rank", site));
  return c.blocks[rank]->shared->begin + (static_cast<unsigned char*>(mine) - block().shared->begin);
}

unsigned char* shared_memory() { return block().shared->begin; }

unsigned side(unsigned epoch, Site site) { return keeps("side", site) ? epoch & 1 : 0; }

// ---- Collectives of a warp, which order no memory

namespace {

struct Exchange {
  uint32_t x;
  int from;
  uint32_t result;
};

uint32_t exchange(const char* what, uint32_t x, int from, const Site& site) {
  Exchange mine{x, from & 31, 0};
  collect(what, site, mine, [&](auto lane) {
    const unsigned n = unsigned(warp().lanes.size());
    for (unsigned i = 0; i < n; ++i) {
      if (unsigned(lane(i).from) >= n) fail("a lane that is not there:" + in(what, site));
      lane(i).result = lane(unsigned(lane(i).from)).x;
    }
  });
  return mine.result;
}

struct Product {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

float from_f16(uint16_t bits) { return __half2float(__half_raw{bits}); }
float from_bf16(uint16_t bits) { return __uint_as_float(unsigned{bits} << 16); }

template <float (*convert)(uint16_t)>
void multiply(const char* what, float* d, const uint32_t* a, uint32_t b0, uint32_t b1, const Site& site) {
  Product mine{d, a, {b0, b1}};
  collect(what, site, mine, [&](auto lane) {
    if (warp().lanes.size() < 32) fail("a warp that is not whole:" + in(what, site));
    float A[16][16], B[16][8], D[16][8] = {};
    for (unsigned l = 0; l < 32; ++l) {
      const unsigned g = l / 4, q = l % 4 * 2;
      for (unsigned r = 0; r < 4; ++r) {
        const uint32_t pair = lane(l).a[r];
        float* to = &A[g + r % 2 * 8][q + r / 2 * 8];
        to[0] = convert(uint16_t(pair));
        to[1] = convert(uint16_t(pair >> 16));
      }
      for (unsigned r = 0; r < 2; ++r) {
        B[q + r * 8][g] = convert(uint16_t(lane(l).b[r]));
        B[q + r * 8 + 1][g] = convert(uint16_t(lane(l).b[r] >> 16));
      }
    }
    for (unsigned i = 0; i < 16; ++i) {
      for (unsigned k = 0; k < 16; ++k) {
        for (unsigned j = 0; j < 8; ++j) D[i][j] += A[i][k] * B[k][j];
      }
    }
    for (unsigned l = 0; l < 32; ++l) {
      for (unsigned r = 0; r < 4; ++r) lane(l).d[r] += D[l / 4 + r / 2 * 8][l % 4 * 2 + r % 2];
    }
  });
}

}  // namespace

uint32_t shuffle(uint32_t x, int lane, Site site) { return exchange("shuffle", x, lane, site); }

uint32_t shuffle_xor(uint32_t x, int lane_mask, Site site) {
  return exchange("shuffle_xor", x, int(self().lane) ^ lane_mask, site);
}

bool any(bool x, Site site) {
  Exchange mine{x, 0, 0};
  collect("a vote", site, mine, [](auto lane) {
    uint32_t sum = 0;
    for (unsigned i = 0; i < warp().lanes.size(); ++i) sum |= lane(i).x;
    for (unsigned i = 0; i < warp().lanes.size(); ++i) lane(i).result = sum;
  });
  return mine.result != 0;
}

void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site) {
  multiply<from_f16>("mma_f16", d, a, b0, b1, site);
}

void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site) {
  multiply<from_bf16>("mma_bf16", d, a, b0, b1, site);
}

void ldmatrix(uint32_t* r, unsigned matrices, const void* row, Site site) {
  if (self().lane < 8 * matrices) {
    want_shared(row, "ldmatrix", site);
    want_aligned(row, 16, "ldmatrix", site);
    access(row, 16, Access::padding, site);
  }
  struct Rows {
    uint32_t* r;
    const void* row;
  } mine{r, row};
  collect("ldmatrix", site, mine, [&](auto lane) {
    if (warp().lanes.size() < 32) fail("a warp that is not whole:" + in("ldmatrix", site));
    for (unsigned l = 0; l < 32; ++l) {
      for (unsigned m = 0; m < matrices; ++m) {
        std::memcpy(lane(l).r + m, static_cast<const unsigned char*>(lane(m * 8 + l / 4).row) + l % 4 * 4, 4);
      }
    }
  });
}

// ---- cp.async. A thread's copies are an actor of their own, whose time is the group: known to whoever waited for it.

namespace {

void land(const Copy& c) {
  if (c.inside) {
    std::memcpy(c.to, c.from, c.bytes);
  } else {
    std::memset(c.to, 0, c.bytes);
  }
}

}  // namespace

void land_some_copies(Thread& t) {
  std::erase_if(t.copies, [](const Copy& c) {
    const bool lands = draw(8) == 0;
    if (lands) land(c);
    return lands;
  });
}

void copy_async(void* shared, const void* global, unsigned bytes, bool inside, Site site) {
  want_shared(shared, "copy_async", site);
  want_aligned(shared, bytes, "copy_async", site);
  want_aligned(global, bytes, "copy_async", site);
  Thread& t = self();
  const Actor copy{t.id, copier(t), t.group, &t.knows};
  if (inside) access(copy, global, bytes, Access::padding, place_of(site));
  access(copy, shared, bytes, Access::write, place_of(site));
  t.copies.push_back(
      {static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), bytes, inside, t.group});
}

void copy_async_commit(Site site) {
  if (keeps("copy_async_commit", site)) ++self().group;
}

void copy_async_wait(int left, Site site) {
  if (!keeps("copy_async_wait", site)) return;
  Thread& t = self();
  if (t.group <= uint32_t(left) + 1) return;
  const uint32_t done = t.group - 1 - uint32_t(left);
  std::erase_if(t.copies, [&](const Copy& c) {
    if (c.group <= done) land(c);
    return c.group <= done;
  });
  raise(t.knows.seen, copier(t), done);
}

// ---- Words that blocks share

uint32_t load_relaxed(const uint32_t* p, Site site) {
  poll("load_relaxed", site);
  access(p, 4, Access::atomic_read, site);
  return *p;
}

uint2 load_relaxed_x2(const uint2* p, Site site) {
  poll("load_relaxed_x2", site);
  access(p, 8, Access::atomic_read, site);
  return *p;
}

uint4 load_relaxed_x4(const uint4* p, Site site) {
  poll("load_relaxed_x4", site);
  access(p, 16, Access::atomic_read, site);
  uint4 x = *p;
  const unsigned torn = draw(8);  // the words come at different times
  if (torn < 4) {
    poll("load_relaxed_x4", site);
    std::memcpy(&x.x + torn, &p->x + torn, 4);
  }
  return x;
}

namespace {

template <typename Word>
void store(Word* p, Word x, const Site& site, bool releases) {
  access(p, sizeof x, Access::atomic_write, site);
  Thread& t = self();
  if (releases) {
    Release& r = released[p];
    r = {t.knows, t.id, t.now};
    raise(r.knows.seen, t.id, t.now);
    ++t.now;
  } else {
    released.erase(p);
  }
  *p = x;
  progress();
  yield();
}

}  // namespace

void store_relaxed(uint32_t* p, uint32_t x, Site site) { store(p, x, site, false); }

void store_relaxed(uint2* p, uint2 x, Site site) { store(p, x, site, false); }

void store_release(uint32_t* p, uint32_t x, Site site) { store(p, x, site, keeps("store_release", site)); }

uint32_t load_acquire(const uint32_t* p, Site site) {
  poll("load_acquire", site);
  access(p, 4, Access::atomic_read, site);
  if (keeps("load_acquire", site)) {
    const auto found = released.find(p);
    Knowledge& mine = self().knows;
    // Who knows of a release knows all that it handed over.
    if (found != released.end() && time_of(mine.seen, found->second.thread) < found->second.time) {
      mine.learn(found->second.knows);
    }
  }
  return *p;
}

uint32_t before_atomic(uint32_t* p, Site site) {
  yield();
  access(p, 4, Access::atomic_write, site);
  return *p;
}

void after_atomic(uint32_t* p, uint32_t x) {
  *p = x;  // what a release handed over before stays to be acquired
  progress();
}

}  // namespace fastlm::emulator
