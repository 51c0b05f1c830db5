// Barriers of a block, of some of its warps, of one warp and of a cluster; what becomes of a thread that ends.
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

// The lanes of a warp come to one instruction. True for the last one, which acts for all and wakes the others.
bool meet_warp(const char* what, const Site& site, const void* operand) {
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

namespace {

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
  if (m.arrived > m.expected) misuse("a barrier for fewer threads than come", what, site);
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

}  // namespace

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

void sync_block(Site site) {
  if (!keeps("sync_block", site)) return;
  if (block().left < block().threads.size()) misuse("exit of a thread that others wait for", "sync_block", site);
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
  if (id == 0 || id > 15 || threads == 0 || threads % 32) misuse("no such named barrier", "sync_named", site);
  Meeting& m = block().named[id];
  if (m.arrived && m.expected != threads) misuse("a named barrier for two numbers of threads", "sync_named", site);
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
    if (t->arrived_at_cluster) misuse("cluster_arrive twice without a wait", what, site);
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
  if (!t.arrived_at_cluster) misuse("cluster_wait without cluster_arrive", what, site);
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
  if (rank >= c.blocks.size()) misuse("no such rank: " + std::to_string(rank), "map_rank", site);
  return c.blocks[rank]->shared->begin + (static_cast<unsigned char*>(mine) - block().shared->begin);
}

}  // namespace fastlm::emulator
