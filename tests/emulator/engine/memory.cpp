// Watched memory: where each array and each block's shared memory lies, its bounds, and the calls that the compiler
// makes at every load and store.
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdlib>

#include "machine.h"

namespace fastlm::emulator {
namespace {

// One stretch of addresses for all of it, so that an access elsewhere is told by two comparisons.
constexpr size_t kArena = size_t{1} << 34, kPage = 4096;
constexpr uint64_t kEndless = 1 << 24;  // accesses without a wait: a loop that polls by ordinary loads
unsigned char* arena = nullptr;
size_t used = kPage;
std::vector<std::unique_ptr<Region>> regions;
std::vector<int32_t> page_owner;

bool knows_block(const Actor& who, int block) { return who.knows->seen && who.knows->seen->leaves[size_t(block)]; }

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

void forget_all_accesses() {
  for (auto& r : regions) forget_accesses(*r);
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
  check_race(*r, p, bytes, who, kind, at);
}

void access(const void* p, size_t bytes, Access kind, const Site& site) {
  want_aligned(p, unsigned(bytes), "an access", site);
  access(actor(self()), p, bytes, kind, place_of(site));
}

void want_shared(const void* p, const char* what, const Site& site) {
  const Region* r = find_region(p);
  if (r == nullptr || r->shared_of != int(block().index)) misuse("not this block's shared memory", what, site);
}

void want_aligned(const void* p, unsigned bytes, const char* what, const Site& site) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) misuse("misaligned: " + std::to_string(bytes) + " bytes", what, site);
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
