// Watched memory: where each array and each block's shared memory lies, bounds, and the happens-before check of every
// access (Flanagan and Freund, "FastTrack", PLDI 2009: a cell remembers its last write and the reads since).
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

#include "machine.h"

namespace fastlm::emulator {

Times times;

namespace {

// One stretch of addresses for all of it, so that an access elsewhere is told by two comparisons.
constexpr size_t kArena = size_t{1} << 34, kPage = 4096;
unsigned char* arena = nullptr;
size_t used = kPage;
std::vector<std::unique_ptr<Region>> regions;
std::vector<int32_t> page_owner;
std::vector<Site> sites;                // place n of the code, from kSites on
constexpr uint64_t kEndless = 1 << 24;  // accesses without a wait: a loop that polls by ordinary loads
constexpr uint32_t kSites = 1u << 31, kInitialised = ~0u;  // the latter: the writer was an earlier launch

bool before(const Actor& who, uint32_t id, uint32_t time) {
  return id == who.thread || time_of(who.knows->seen, id) >= time;
}

bool knows_block(const Actor& who, int block) { return who.knows->seen && who.knows->seen->leaves[size_t(block)]; }

std::string place(const Region& r, const unsigned char* p) {
  return r.name + ", byte " + std::to_string(p - r.begin) + " of " + std::to_string(r.bytes);
}

[[noreturn]] void report(const char* fault, const Region& r, const unsigned char* p, const char* does, const Actor& who,
                         uint32_t at, const std::string& other = {}) {
  const std::string copy = who.id == who.thread ? "" : " a copy of";
  fail(std::string(fault) + ": " + place(r, p) + ", " + does + " by" + copy + " " + describe(who.thread) + " at " +
       describe_place(at) + other);
}

std::string other(const char* did, uint32_t id, uint32_t at) {
  return std::string(", ") + did + " by " + describe(id) + " at " + describe_place(at);
}

void check_readers(const Region& r, const unsigned char* p, const Actor& who, bool atomic, uint32_t at,
                   const Readers& past) {
  if (past.lanes == 0 || (atomic && past.warp & kAtomic)) return;
  for (uint32_t lanes = past.lanes; lanes; lanes &= lanes - 1) {
    const uint32_t id = (past.warp & ~kAtomic) * 32 + unsigned(__builtin_ctz(lanes));
    if (!before(who, id, past.time)) report("race", r, p, "written", who, at, other("read", id, past.at));
  }
}

void check_writer(const Region& r, const unsigned char* p, const Cell& c, const Actor& who, bool atomic,
                  const char* does, uint32_t at) {
  if (c.written == 0 || (atomic && c.writer & kAtomic)) return;
  const uint32_t id = c.writer & ~kAtomic;
  if (!before(who, id, c.written)) report("race", r, p, does, who, at, other("written", id, c.write_at));
  const bool ordinary = id % times.per_block() < times.threads;
  if (who.async && ordinary && time_of(who.knows->fenced, id) < c.written) {
    report("missing fence_async", r, p, does, who, at, other("written without it", id, c.write_at));
  }
}

// Leaves out reads that the same thread has repeated later.
void compact(std::vector<Readers>& list) {
  std::sort(list.begin(), list.end(),
            [](const Readers& a, const Readers& b) { return a.warp != b.warp ? a.warp < b.warp : a.time > b.time; });
  size_t kept = 0;
  uint32_t repeated = 0;
  for (const Readers past : list) {
    const bool same_warp = kept > 0 && list[kept - 1].warp == past.warp;
    if (!same_warp) repeated = 0;
    const uint32_t lanes = past.lanes & ~repeated;
    repeated |= lanes;
    if (lanes == 0) continue;
    if (same_warp && list[kept - 1].time == past.time) {
      list[kept - 1].lanes |= lanes;
    } else {
      list[kept++] = {past.warp, past.time, lanes, past.at};
    }
  }
  list.resize(kept);
}

void remember_reader(Region& r, Cell& c, const Actor& who, bool atomic, uint32_t at) {
  const uint32_t warp = who.id / 32 | (atomic ? kAtomic : 0), lane = 1u << who.id % 32;
  if (c.lanes == 0 || (c.readers == warp && (c.read == who.time || (c.lanes & ~lane) == 0))) {
    c.lanes |= lane;
    c.readers = warp;
    c.read = who.time;
    c.read_at = at;
    return;
  }
  if (c.further == 0) {
    if (r.further.empty()) r.further.emplace_back();  // 0 means none
    c.further = uint32_t(r.further.size());
    r.further.emplace_back();
  }
  std::vector<Readers>& list = r.further[c.further];
  if (list.size() == list.capacity() && list.size() >= 32) compact(list);
  list.push_back({c.readers, c.read, c.lanes, c.read_at});
  c.readers = warp;  // the newest are in the cell
  c.read = who.time;
  c.lanes = lane;
  c.read_at = at;
}

void check(Region& r, const unsigned char* p, Cell& c, const Actor& who, Access kind, uint32_t at) {
  const bool atomic = kind == Access::atomic_read || kind == Access::atomic_write;
  if (kind == Access::write || kind == Access::atomic_write) {
    check_writer(r, p, c, who, atomic, "written", at);
    check_readers(r, p, who, atomic, at, {c.readers, c.read, c.lanes, c.read_at});
    if (c.further) {
      for (const Readers& past : r.further[c.further]) check_readers(r, p, who, atomic, at, past);
    }
    if (!atomic) {
      c.lanes = 0;
      if (c.further) r.further[c.further].clear();
    }
    c.writer = who.id | (atomic ? kAtomic : 0);
    c.written = who.time;
    c.write_at = at;
    return;
  }
  if (c.written == 0 && c.writer != kInitialised && r.mode == Mode::write && kind == Access::read) {
    report("uninitialised", r, p, "read", who, at);
  }
  check_writer(r, p, c, who, atomic, "read", at);
  remember_reader(r, c, who, atomic, at);
}

}  // namespace

Region& add_region(std::string name, size_t bytes, size_t align, size_t granule, Mode mode) {
  if (arena == nullptr) {
    void* p = mmap(nullptr, kArena, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) std::abort();
    arena = static_cast<unsigned char*>(p);
    page_owner.assign(1, -1);
  }
  auto region = std::make_unique<Region>();
  region->name = std::move(name);
  region->begin = arena + used + align;  // aligned as asked, and no better
  region->bytes = bytes;
  region->granule = granule;
  region->mode = mode;
  used += (align + bytes + kPage - 1) / kPage * kPage + kPage;  // a page on either side is nobody's
  if (used > kArena) std::abort();
  page_owner.resize(used / kPage, int32_t(regions.size()));
  if (mode != Mode::read) region->cells.resize((bytes + granule - 1) / granule);
  regions.push_back(std::move(region));
  return *regions.back();
}

void remove_regions(size_t first) {
  if (first >= regions.size()) return;
  const size_t from = size_t(regions[first]->begin - arena) / kPage * kPage;
  madvise(arena + from, used - from, MADV_DONTNEED);
  used = from;
  page_owner.resize(used / kPage);
  regions.resize(first);
}

size_t region_count() { return regions.size(); }

Region* find_region(const void* p) {
  const size_t at = size_t(static_cast<const unsigned char*>(p) - arena);
  if (at >= used) return nullptr;
  const int32_t owner = page_owner[at / kPage];
  return owner < 0 ? nullptr : regions[size_t(owner)].get();
}

void forget_accesses(Region& r) {
  r.further.clear();
  for (Cell& c : r.cells) c = {c.written || c.writer == kInitialised ? kInitialised : 0, 0, 0, 0, 0, 0, 0, 0};
}

void forget_all_accesses() {
  for (auto& r : regions) forget_accesses(*r);
}

// What a block's peers did to its shared memory must be over, as far as the block knows, when it ends.
void check_peers_at_end(Block& b) {
  if (b.shared == nullptr) return;
  b.shared->alive = false;
  if (b.cluster->blocks.size() == 1) return;
  const auto check_end = [&](const Cell& c, uint32_t id, uint32_t time, uint32_t at, const char* did) {
    if (id / times.per_block() == b.index || time_of(b.at_end.seen, id) >= time) return;
    fail("exit of a cluster peer: " + b.shared->name + ", byte " +
         std::to_string((&c - b.shared->cells.data()) * ptrdiff_t(b.shared->granule)) + other(did, id, at));
  };
  for (const Cell& c : b.shared->cells) {
    if (c.written) check_end(c, c.writer & ~kAtomic, c.written, c.write_at, "written");
    const auto check_lanes = [&](const Readers& past) {
      for (uint32_t lanes = past.lanes; lanes; lanes &= lanes - 1) {
        check_end(c, (past.warp & ~kAtomic) * 32 + unsigned(__builtin_ctz(lanes)), past.time, past.at, "read");
      }
    };
    check_lanes({c.readers, c.read, c.lanes, c.read_at});
    if (c.further) {
      for (const Readers& past : b.shared->further[c.further]) check_lanes(past);
    }
  }
}

void access(const Actor& who, const void* pointer, size_t bytes, Access kind, uint32_t at) {
  auto* p = static_cast<const unsigned char*>(pointer);
  const bool writes = kind == Access::write || kind == Access::atomic_write;
  const char* does = writes ? "written" : "read";
  Region* r = find_region(p);
  if (r == nullptr) {
    fail("out of bounds: memory that is no array, " + std::string(does) + " by " + describe(who.thread) + " at " +
         describe_place(at));
  }
  if (p < r->begin || p + bytes > r->begin + r->bytes) report("out of bounds", *r, p, does, who, at);
  if (!r->alive) report("exit of a cluster peer", *r, p, does, who, at);
  if (r->shared_of >= 0 && uint32_t(r->shared_of) != who.thread / times.per_block() &&
      !knows_block(who, r->shared_of)) {
    report("a cluster peer that may not have begun", *r, p, does, who, at);
  }
  if (r->mode == Mode::read) {
    if (writes) report("an input is written", *r, p, does, who, at);
    return;
  }
  const size_t first = size_t(p - r->begin) / r->granule, last = (size_t(p - r->begin) + bytes - 1) / r->granule;
  for (size_t i = first; i <= last; ++i) check(*r, r->begin + i * r->granule, r->cells[i], who, kind, at);
}

void access(const void* p, size_t bytes, Access kind, const Site& site) {
  if (reinterpret_cast<uintptr_t>(p) % bytes)
    fail("misaligned: " + std::to_string(bytes) + " bytes at " + describe(site));
  access(actor(self()), p, bytes, kind, place_of(site));
}

uint32_t place_of(const Site& site) {
  for (uint32_t i = 0; i < sites.size(); ++i) {
    const Site& known = sites[i];
    if (known.line() == site.line() && known.column() == site.column() && known.file_name() == site.file_name()) {
      return kSites + i;
    }
  }
  sites.push_back(site);
  return kSites + uint32_t(sites.size() - 1);
}

std::string describe(const Site& site) {
  const char* slash = std::strrchr(site.file_name(), '/');
  return std::string(slash ? slash + 1 : site.file_name()) + ":" + std::to_string(site.line());
}

// A plain access knows its address in the code; the test looks up the line that belongs to @address.
std::string describe_place(uint32_t at) {
  if (at >= kSites) return describe(sites[at - kSites]);
  char text[16];
  std::snprintf(text, sizeof text, "@%x", at);
  return text;
}

namespace {

uint32_t code_place(const void* address) {
  static const unsigned char* base = [] {
    Dl_info info;
    return dladdr(reinterpret_cast<void*>(&describe_place), &info) ? static_cast<unsigned char*>(info.dli_fbase)
                                                                   : nullptr;
  }();
  return uint32_t(static_cast<const unsigned char*>(address) - base - 1);
}

__attribute__((noinline)) void plain_access(const void* p, size_t bytes, bool writes, bool aligned, const void* from) {
  const uint32_t at = code_place(from);
  if (++machine.accesses == kEndless) fail("hang: " + describe(self()) + " loops at " + describe_place(at));
  if (aligned && reinterpret_cast<uintptr_t>(p) % bytes) {
    fail("misaligned: " + std::to_string(bytes) + " bytes by " + describe(self()) + " at " + describe_place(at));
  }
  access(actor(self()), p, bytes, writes ? Access::write : Access::read, at);
}

// Fibers' stacks and the program's own memory are not watched; the first page would be a null pointer.
inline bool is_watched(const void* p) {
  const size_t at = size_t(static_cast<const unsigned char*>(p) - arena);
  return machine.current != nullptr && (at < kArena || reinterpret_cast<uintptr_t>(p) < kPage);
}

}  // namespace
}  // namespace fastlm::emulator

// Alignment is that of the type: the compiler calls the other functions where it promises less.
#define HOOK(name, bytes, writes, aligned)                                                   \
  extern "C" void name(void* p) {                                                            \
    using namespace fastlm::emulator;                                                        \
    if (is_watched(p)) plain_access(p, bytes, writes, aligned, __builtin_return_address(0)); \
  }
#define HOOKS(bytes)                                      \
  HOOK(__tsan_read##bytes, bytes, false, true)            \
  HOOK(__tsan_write##bytes, bytes, true, true)            \
  HOOK(__tsan_unaligned_read##bytes, bytes, false, false) \
  HOOK(__tsan_unaligned_write##bytes, bytes, true, false)
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

extern "C" void __tsan_read_range(void* p, unsigned long bytes) {
  using namespace fastlm::emulator;
  if (is_watched(p)) plain_access(p, bytes, false, false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* p, unsigned long bytes) {
  using namespace fastlm::emulator;
  if (is_watched(p)) plain_access(p, bytes, true, false, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
