// What crosses between memories and between blocks: cp.async, and the words that others poll or write meanwhile.
#include <unordered_map>

#include "machine.h"

namespace fastlm::emulator {
namespace {

struct Release {  // of a word, the last one
  Knowledge knows;
  uint32_t thread, time;
};
std::unordered_map<const void*, Release> released;

}  // namespace

void forget_releases() { released.clear(); }

unsigned char* shared_memory() {
  if (block().shared == nullptr) fail("a launch without shared memory, asked for by " + describe(self()));
  return block().shared->begin;
}

unsigned side(unsigned epoch, Site site) { return keeps("side", site) ? epoch & 1 : 0; }

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

// ---- Words that blocks share. A relaxed load that is taken away has found zeros, whatever comes later.

uint32_t load_relaxed(const uint32_t* p, Site site) {
  poll("load_relaxed", site);
  if (!keeps("load_relaxed", site)) return 0;
  access(p, 4, Access::atomic_read, site);
  return *p;
}

uint2 load_relaxed_x2(const uint2* p, Site site) {
  poll("load_relaxed_x2", site);
  if (!keeps("load_relaxed_x2", site)) return {};
  access(p, 8, Access::atomic_read, site);
  return *p;
}

uint4 load_relaxed_x4(const uint4* p, Site site) {
  poll("load_relaxed_x4", site);
  if (!keeps("load_relaxed_x4", site)) return {};
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
