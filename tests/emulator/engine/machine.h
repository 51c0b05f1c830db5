// The state of a launch, inside the emulator.
#pragma once
#include <memory>
#include <string>

#include "../emulator.h"
#include "clock.h"

namespace fastlm::emulator {

// ---- Memory that is watched

// The last accesses of a granule of memory: ids, times and places in the code. Of the readers: a warp and its lanes;
// more of them are in list `further` of the region.
struct Cell {
  uint32_t writer, written, write_at;
  uint32_t readers, read, lanes, read_at, further;
};
constexpr uint32_t kAtomic = 1u << 31;  // in a writer's id and a reader's warp

struct Readers {
  uint32_t warp, time, lanes, at;
};

enum class Mode { read, write, update };  // of what a test hands over: input, poisoned output, both

struct Region {
  std::string name;
  unsigned char* begin = nullptr;
  size_t bytes = 0, granule = 2;
  Mode mode = Mode::read;
  bool alive = true;
  std::vector<Cell> cells;
  std::vector<std::vector<Readers>> further;
  int shared_of = -1;  // the block whose shared memory it is
};

struct Actor {  // who accesses: a thread, or a copy that works for it
  uint32_t thread, id, time;
  const Knowledge* knows;
  bool async = false;  // a bulk copy, which sees ordinary writes only past a fence
};

enum class Access { read, write, atomic_read, atomic_write, padding };  // padding: a read of what may be never used

Region& add_region(std::string name, size_t bytes, size_t align, size_t granule, Mode mode);
void remove_regions(size_t first);
size_t region_count();
Region* find_region(const void* p);
void forget_accesses(Region& region);
void forget_all_accesses();
// Reports a fault of the running thread and does not return when there is one.
void access(const Actor& actor, const void* p, size_t bytes, Access kind, uint32_t at);
void access(const void* p, size_t bytes, Access kind, const Site& site);  // of the running thread
void check_race(Region& r, const unsigned char* p, size_t bytes, const Actor& who, Access kind, uint32_t at);
void want_shared(const void* p, const char* what, const Site& site);
void want_aligned(const void* p, unsigned bytes, const char* what, const Site& site);

// ---- Threads, warps, blocks, clusters

struct Block;
struct Warp;

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  unsigned bytes;
  bool inside;
  uint32_t group;
};

struct Thread {
  Place place;
  uint32_t id = 0, now = 1;
  unsigned lane = 0;
  Warp* warp = nullptr;
  bool done = false, arrived_at_cluster = false;
  unsigned cluster_phase = 0, fruitless = 0;
  uint64_t seen_progress = 0;
  Knowledge knows;
  std::vector<Copy> copies;
  uint32_t group = 1;  // of the next cp.async
  std::vector<uint64_t*> fresh_barriers;
  const char* waits_for = nullptr;  // and where, for reports
  Site site;
  void* stack_pointer = nullptr;
  unsigned char* stack = nullptr;
};

// Collects what several threads know, for what waits for all of them.
struct Gathering {
  Knowledge sum;
  Ref<Clock> last_seen;
  void add(Thread& t);
  void clear() { *this = {}; }
};

struct Warp {
  Block* block = nullptr;
  std::vector<Thread*> lanes;
  uint32_t ready = 0;  // lanes that can run
  // The instruction at which lanes wait for the rest of the warp.
  uint32_t arrived = 0;
  const char* what = nullptr;
  Site site;
  const void* operands[32] = {};
};

struct Meeting {  // a barrier of whole warps
  unsigned expected = 0, arrived = 0;
  Gathering gathering;
  std::vector<Warp*> waiting;
};

struct Cluster;
struct Block {
  unsigned index = 0, rank = 0;  // in the grid, in the cluster
  Cluster* cluster = nullptr;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  uint32_t ready = 0;     // warps with ready lanes
  unsigned left = 0;      // threads that have not ended
  unsigned slowness = 0;  // of 16 turns, passes so many on
  Meeting barrier, named[16];
  Region* shared = nullptr;
  unsigned mbarriers = 0;
  Knowledge at_end;  // of all threads that have ended
};

struct Cluster {
  std::vector<Block*> blocks;
  unsigned arrived = 0, phase = 0, expected = 0, left = 0;
  Gathering gathering;
  Knowledge released;
  std::vector<Thread*> waiting;
};

struct Machine {
  uint64_t random = 1;
  Launch launch;
  Thread* current = nullptr;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Cluster> clusters;
  std::string failure;
  uint64_t progress = 1;  // counts what ends a poll
  uint64_t accesses = 0;  // of the running thread since it runs
  size_t in_flight = 0;   // bulk copies
  std::vector<Thread*> parked;
};
extern Machine machine;

inline Thread& self() { return *machine.current; }
inline Warp& warp() { return *self().warp; }
inline Block& block() { return *self().warp->block; }
inline unsigned draw(unsigned n) {  // below n
  machine.random ^= machine.random << 13;
  machine.random ^= machine.random >> 7;
  machine.random ^= machine.random << 17;
  return unsigned((machine.random >> 11) % n);
}
inline Actor actor(const Thread& t) { return {t.id, t.id, t.now, &t.knows}; }
inline uint32_t copier(const Thread& t) { return t.id + times.threads; }

uint32_t place_of(const Site& site);
std::string describe_place(uint32_t at);
std::string describe_waiting();
std::string describe_mbarriers();
std::string in(const char* what, const Site& site);
std::string describe(uint32_t id);
std::string describe(const Thread& t);
std::string describe(const Site& site);
struct Ended {};                                 // thrown by fail outside of a thread
[[noreturn]] void fail(const std::string& why);  // ends the launch
[[noreturn]] void misuse(const std::string& fault, const char* what, const Site& site);  // by the running thread
[[noreturn]] void report(const char* fault, const Region& r, const unsigned char* p, const char* does, const Actor& who,
                         uint32_t at, const std::string& other = {});

void wake(Thread& t);
void wake_others(Warp& w);
bool meet_warp(const char* what, const Site& site, const void* operand = nullptr);
void suspend(const char* what, const Site& site);  // until woken
void poll(const char* what, const Site& site);     // lets others run before it looks
void yield();
void progress();                                 // something changed that a poll may see
bool keeps(const char* what, const Site& site);  // passes the call site; false when the test took it away

void finish_thread(Thread& t);
void land_some_copies(Thread& t);
void land_a_bulk_copy();
void check_mbarriers_at_end(const Block& b);
void check_peers_at_end(Block& b);
void forget_releases();
void forget_mbarriers();

}  // namespace fastlm::emulator
