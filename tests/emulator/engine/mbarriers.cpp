// Barriers in shared memory and the bulk copies that report to them. The copies that report to one barrier are an
// actor, whose time is the phase: known to whoever waited for it.
#include <unordered_map>

#include "machine.h"

namespace fastlm::emulator {
namespace {

struct Barrier {
  Block* home = nullptr;
  unsigned count = 0, pending = 0, phase = 0;
  int64_t bytes = 0;  // still to come in this phase
  bool fenced = false;
  uint32_t id = 0;  // of the copies that report here
  Gathering gathering;
  Knowledge released;
  std::vector<Thread*> waiting;
};

struct Flight {
  Barrier* barrier;
  unsigned char* to;
  const unsigned char* from;
  unsigned bytes;
  uint32_t at;
  Knowledge knows;
};

std::unordered_map<const void*, Barrier> barriers;
std::vector<Flight> flights;

Barrier& barrier_at(uint64_t* p, const char* what, const Site& site) {
  access(p, 8, Access::atomic_read, site);  // ordered after its initialisation
  const auto found = barriers.find(p);
  if (found == barriers.end()) misuse("an mbarrier that nobody made", what, site);
  Barrier& b = found->second;
  if (b.home != &block() && !b.fenced) misuse("missing fence_mbarrier_init", what, site);
  return b;
}

void end_phase_if_complete(Barrier& b) {
  if (b.pending || b.bytes > 0) return;
  if (b.bytes < 0) {
    fail("wrong byte count: an mbarrier of block " + std::to_string(b.home->index) + " got " +
         std::to_string(-b.bytes) + " bytes more than it was to expect");
  }
  ++b.phase;
  b.pending = b.count;
  b.released.learn(b.gathering.sum);
  raise(b.released.seen, b.id, b.phase);
  b.gathering.clear();
  for (Thread* t : b.waiting) wake(*t);
  b.waiting.clear();
}

void arrive(Barrier& b) {
  b.gathering.add(self());
  ++self().now;
  --b.pending;
  end_phase_if_complete(b);
}

// What the copy does while it is under way: checked when it sets out, for its thread, and when it lands, in the phase
// of that moment.
void check(const Flight& f, uint32_t whose) {
  const Actor copy{whose, f.barrier->id, f.barrier->phase + 1, &f.knows, true};
  access(copy, f.from, f.bytes, Access::padding, f.at);
  access(copy, f.to, f.bytes, Access::write, f.at);
}

}  // namespace

void mbarrier_init(uint64_t* p, unsigned count, Site site) {
  const Region* r = find_region(p);
  if (r == nullptr || r->shared_of != int(block().index))
    misuse("not this block's shared memory", "mbarrier_init", site);
  access(p, 8, Access::write, site);
  Barrier& b = barriers[p];
  const bool known = b.home != nullptr;
  if (!known && block().mbarriers == Times::kBarriers)
    misuse("more mbarriers than the emulator counts", "mbarrier_init", site);
  const uint32_t id = known ? b.id : block().index * times.per_block() + 2 * times.threads + block().mbarriers++;
  const unsigned phase = b.phase;
  b = {};
  b.home = &block();
  b.count = b.pending = count;
  b.phase = phase + phase % 2;  // times go on, parity starts at 0
  b.id = id;
  self().fresh_barriers.push_back(p);
}

void fence_mbarrier_init(Site site) {
  if (!keeps("fence_mbarrier_init", site)) return;
  for (uint64_t* p : self().fresh_barriers) barriers[p].fenced = true;
  self().fresh_barriers.clear();
}

void mbarrier_expect(uint64_t* p, unsigned bytes, Site site) {
  if (!keeps("mbarrier_expect", site)) return;
  Barrier& b = barrier_at(p, "mbarrier_expect", site);
  if (b.home != &block()) misuse("mbarrier_expect of another block's barrier", "mbarrier_expect", site);
  b.bytes += bytes;
  arrive(b);
}

void mbarrier_arrive(uint64_t* p, Site site) {
  if (keeps("mbarrier_arrive", site)) arrive(barrier_at(p, "mbarrier_arrive", site));
}

void mbarrier_wait(uint64_t* p, unsigned parity, Site site) {
  if (!keeps("mbarrier_wait", site)) return;
  Barrier& b = barrier_at(p, "mbarrier_wait", site);
  if (b.home != &block()) misuse("mbarrier_wait at another block's barrier", "mbarrier_wait", site);
  while (b.phase % 2 == parity) {
    b.waiting.push_back(&self());
    suspend("mbarrier_wait", site);
  }
  self().knows.learn(b.released);
}

void copy_bulk(void* shared, const void* global, unsigned bytes, uint64_t* barrier, uint16_t ranks, Site site) {
  const auto odd = reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global) | bytes;
  if (odd % 16 || bytes == 0) misuse("misaligned: a bulk copy", "copy_bulk", site);
  const Block& mine = block();
  if (ranks == 0 || ranks >> mine.cluster->blocks.size()) misuse("no such rank", "copy_bulk", site);
  for (unsigned rank = 0; rank < mine.cluster->blocks.size(); ++rank) {
    if (!(ranks >> rank & 1)) continue;
    auto* there = static_cast<uint64_t*>(map_rank(barrier, rank, site));
    Barrier& b = barrier_at(there, "copy_bulk", site);
    if (!b.fenced) misuse("missing fence_mbarrier_init", "copy_bulk", site);
    flights.push_back({&b, static_cast<unsigned char*>(map_rank(shared, rank, site)),
                       static_cast<const unsigned char*>(global), bytes, place_of(site), self().knows});
    check(flights.back(), self().id);
  }
  machine.in_flight = flights.size();
  ++self().now;
}

void fence_async(Site site) {
  if (!keeps("fence_async", site)) return;
  Thread& t = self();
  join(t.knows.fenced, t.knows.seen);
  raise(t.knows.fenced, t.id, t.now);
  ++t.now;
}

void land_a_bulk_copy() {
  std::swap(flights[draw(unsigned(flights.size()))], flights.back());
  const Flight f = std::move(flights.back());
  flights.pop_back();
  machine.in_flight = flights.size();
  check(f, f.barrier->id);
  std::memcpy(f.to, f.from, f.bytes);
  Barrier& b = *f.barrier;
  b.bytes -= f.bytes;
  b.gathering.sum.learn(f.knows);  // what its thread had learnt, not what that thread itself has done
  end_phase_if_complete(b);
}

void check_mbarriers_at_end(const Block& block) {
  for (const Flight& f : flights) {
    if (f.barrier->home == &block) fail("block " + std::to_string(block.index) + " has ended before a bulk copy came");
  }
  for (auto& [p, b] : barriers) {
    if (b.home == &block && b.bytes != 0) {
      fail("wrong byte count: block " + std::to_string(block.index) + " has ended, an mbarrier of it still expects " +
           std::to_string(b.bytes) + " bytes");
    }
  }
}

std::string describe_mbarriers() {
  std::string text;
  for (auto& [p, b] : barriers) {
    if (b.waiting.empty()) continue;
    text += "; an mbarrier of block " + std::to_string(b.home->index) + " lacks " + std::to_string(b.pending) +
            " arrivals and " + std::to_string(b.bytes) + " bytes";
  }
  return text;
}

void forget_mbarriers() {
  barriers.clear();
  flights.clear();
  machine.in_flight = 0;
}

}  // namespace fastlm::emulator
