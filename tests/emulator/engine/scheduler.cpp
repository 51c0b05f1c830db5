// Runs a launch: fibers, the order of blocks and warps, and what ends it.
#include <sys/mman.h>

#include "fiber.h"
#include "machine.h"

namespace fastlm::emulator {

Machine machine;
const Place* here = nullptr;

namespace {

constexpr size_t kStack = 64 << 10;
constexpr uint64_t kCanary = 0x5AFE57ACC0FFEE00;
constexpr unsigned kParkAfter = 8, kGiveUpAfter = 400;  // polls in vain; rounds of them when nothing else runs

void* scheduler_stack = nullptr;
void (*body)(void*) = nullptr;
void* body_context = nullptr;
std::vector<unsigned char*> free_stacks;
std::vector<Block*> ready_blocks;

unsigned char* take_stack() {
  if (free_stacks.empty()) {
    constexpr size_t kMany = 256;
    void* p = mmap(nullptr, kStack * kMany, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) std::abort();
    for (size_t i = kMany; i-- > 0;) free_stacks.push_back(static_cast<unsigned char*>(p) + i * kStack);
  }
  unsigned char* stack = free_stacks.back();
  free_stacks.pop_back();
  *reinterpret_cast<uint64_t*>(stack) = kCanary;
  return stack;
}

void to_scheduler() { switch_fiber(&self().stack_pointer, scheduler_stack); }

void start_fiber() {
  body(body_context);
  finish_thread(self());
  self().done = true;
  to_scheduler();
  std::abort();
}

void run_thread(Thread& t) {
  machine.current = &t;
  here = &t.place;
  if (t.stack == nullptr) {
    t.stack = take_stack();
    t.stack_pointer = new_fiber(t.stack, t.stack + kStack, start_fiber);
  }
  machine.accesses = 0;
  switch_fiber(&scheduler_stack, t.stack_pointer);
  machine.current = nullptr;
  if (*reinterpret_cast<uint64_t*>(t.stack) != kCanary && machine.failure.empty()) {
    machine.failure = "stack overflow of " + describe(t);
  }
  if (t.done) {
    free_stacks.push_back(t.stack);
    t.stack = nullptr;
    t.knows = {};
  }
}

uint3 unfold(unsigned i, const dim3& size) { return {i % size.x, i / size.x % size.y, i / size.x / size.y}; }

void begin_block(Block& b) {
  const Launch& launch = machine.launch;
  const unsigned n = launch.block.x * launch.block.y * launch.block.z;
  b.left = n;
  b.slowness = draw(3) * 7;
  b.threads.resize(n);
  b.warps.resize((n + 31) / 32);
  b.barrier.expected = n;
  for (unsigned i = 0; i < n; ++i) {
    Thread& t = b.threads[i];
    t.place = {unfold(i, launch.block), unfold(b.index, launch.grid), launch.block, launch.grid};
    t.id = b.index * times.per_block() + i;
    t.lane = i % 32;
    t.warp = &b.warps[i / 32];
    t.warp->block = &b;
    t.warp->lanes.push_back(&t);
  }
  for (Thread& t : b.threads) wake(t);
  if (launch.shared == 0) return;
  b.shared = &add_region("shared memory of block " + std::to_string(b.index), launch.shared, 128, 2, Mode::write);
  b.shared->shared_of = int(b.index);
  std::memset(b.shared->begin, 0xFF, launch.shared);  // NaN in every format
}

void begin_cluster(Cluster& c) {
  c.expected = 0;
  for (Block* b : c.blocks) {
    begin_block(*b);
    c.expected += b->left;
  }
  c.left = unsigned(c.blocks.size());
}

void end_block(Block& b) {
  if (!machine.failure.empty()) return;
  check_mbarriers_at_end(b);
  check_peers_at_end(b);
  --b.cluster->left;
  b.threads.clear();
  b.warps.clear();
}

// One turn: some lanes of a warp of a random block, each until it waits.
void turn() {
  Block* b = ready_blocks[draw(unsigned(ready_blocks.size()))];
  if (draw(16) < b->slowness && ready_blocks.size() > 1) b = ready_blocks[draw(unsigned(ready_blocks.size()))];
  unsigned which = draw(unsigned(b->warps.size()));
  while (!(b->ready >> which & 1)) which = (which + 1) % unsigned(b->warps.size());
  Warp& w = b->warps[which];
  const unsigned rotation = draw(32);
  uint32_t lanes = w.ready;  // those that are woken meanwhile come next time
  for (unsigned i = 0; i < 32 && machine.failure.empty(); ++i) {
    const unsigned lane = (i + rotation) % 32;
    if (!(lanes >> lane & 1)) continue;
    run_thread(*w.lanes[lane]);
    if (w.lanes[lane]->done) w.ready &= ~(1u << lane);
  }
  if (w.ready == 0) b->ready &= ~(1u << which);
  if (b->ready == 0) std::erase(ready_blocks, b);
  if (b->left == 0) end_block(*b);
}

void unpark_all() {
  for (Thread* t : std::exchange(machine.parked, {})) wake(*t);
}

void run_all() {
  const unsigned count = unsigned(machine.clusters.size());
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; ++i) order[i] = i;
  for (unsigned i = count; i > 1; --i) std::swap(order[i - 1], order[draw(i)]);
  const unsigned resident = machine.launch.cooperative ? count : 1 + draw(8);
  unsigned begun = 0;
  unsigned rounds = 0;
  uint64_t then = 0;
  while (machine.failure.empty()) {
    unsigned running = 0;
    if (begun < count) {
      for (const Cluster& c : machine.clusters) running += c.left > 0;
    }
    for (; begun < count && running < resident; ++running) begin_cluster(machine.clusters[order[begun++]]);
    if (!ready_blocks.empty()) {
      if (machine.in_flight && draw(8) == 0) land_a_bulk_copy();
      turn();
      continue;
    }
    if (machine.in_flight) {
      land_a_bulk_copy();
      continue;
    }
    unsigned left = 0;
    for (auto& b : machine.blocks) left += b->left;
    if (left == 0 && begun == count) return;
    rounds = then == machine.progress ? rounds + 1 : 0;
    then = machine.progress;
    if (machine.parked.empty() || rounds == kGiveUpAfter) {
      fail("hang: " + describe_waiting() + describe_mbarriers() +
           (begun < count ? "; " + std::to_string(count - begun) + " blocks or clusters that have not begun" : ""));
    }
    unpark_all();
  }
}

}  // namespace

void fail(const std::string& why) {
  if (machine.failure.empty()) machine.failure = why;
  if (machine.current == nullptr) throw Ended();
  to_scheduler();
  std::abort();
}

void wake(Thread& t) {
  Warp& w = *t.warp;
  Block& b = *w.block;
  t.waits_for = nullptr;
  if (b.ready == 0) ready_blocks.push_back(&b);
  w.ready |= 1u << t.lane;
  b.ready |= 1u << (&w - b.warps.data());
}

void suspend(const char* what, const Site& site) {
  Thread& t = self();
  t.waits_for = what;
  t.site = site;
  t.warp->ready &= ~(1u << t.lane);
  if (!t.copies.empty()) land_some_copies(t);
  to_scheduler();
}

// A thread that polls in vain sleeps until something changes: else it would take all the time.
void poll(const char* what, const Site& site) {
  Thread& t = self();
  if (t.seen_progress != machine.progress) {
    t.seen_progress = machine.progress;
    t.fruitless = 0;
  }
  if (!t.copies.empty()) land_some_copies(t);
  if (++t.fruitless % kParkAfter == 0) {
    t.waits_for = what;
    t.site = site;
    t.warp->ready &= ~(1u << t.lane);
    machine.parked.push_back(&t);
  }
  to_scheduler();
}

void yield() { to_scheduler(); }

void progress() {
  ++machine.progress;
  unpark_all();
}

void run(const Launch& launch, void (*kernel)(void*), void* context) {
  if (!machine.failure.empty()) return;
  const unsigned per_block = launch.block.x * launch.block.y * launch.block.z;
  const unsigned blocks = launch.grid.x * launch.grid.y * launch.grid.z;
  if (per_block == 0 || per_block > 1024 || blocks == 0 || launch.grid.x % launch.cluster) {
    machine.failure =
        "a launch that no GPU takes: " + std::to_string(blocks) + " blocks of " + std::to_string(per_block);
    return;
  }
  const size_t arrays = region_count();
  forget_all_accesses();
  times = {blocks, (per_block + 31) / 32 * 32};
  machine.launch = launch;
  body = kernel;
  body_context = context;
  machine.clusters.resize(blocks / launch.cluster);
  for (unsigned i = 0; i < blocks; ++i) {
    machine.blocks.push_back(std::make_unique<Block>());
    Block& b = *machine.blocks.back();
    b.index = i;
    b.rank = i % launch.cluster;
    b.cluster = &machine.clusters[i / launch.cluster];
    b.cluster->blocks.push_back(&b);
  }
  try {
    run_all();
  } catch (Ended) {
  }
  for (auto& b : machine.blocks) {
    for (Thread& t : b->threads) {
      if (t.stack != nullptr) free_stacks.push_back(t.stack);
    }
  }
  ready_blocks.clear();
  machine.parked.clear();
  forget_releases();
  forget_mbarriers();
  machine.clusters.clear();
  machine.blocks.clear();
  remove_regions(arrays);
}

}  // namespace fastlm::emulator
