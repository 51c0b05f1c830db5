// The happens-before check of every access (Flanagan and Freund, "FastTrack", PLDI 2009): a cell remembers its last
// write and the reads since, and each must be known to whoever comes next.
#include "machine.h"

namespace fastlm::emulator {

Times times;

namespace {

constexpr uint32_t kInitialised = ~0u;  // the writer was an earlier launch

bool before(const Actor& who, uint32_t id, uint32_t time) {
  return id == who.thread || time_of(who.knows->seen, id) >= time;
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

void report(const char* fault, const Region& r, const unsigned char* p, const char* does, const Actor& who, uint32_t at,
            const std::string& other) {
  const std::string copy = who.id == who.thread ? "" : " a copy of";
  fail(std::string(fault) + ": " + r.name + ", byte " + std::to_string(p - r.begin) + " of " + std::to_string(r.bytes) +
       ", " + does + " by" + copy + " " + describe(who.thread) + " at " + describe_place(at) + other);
}

void check_race(Region& r, const unsigned char* p, size_t bytes, const Actor& who, Access kind, uint32_t at) {
  const size_t first = size_t(p - r.begin) / r.granule, last = (size_t(p - r.begin) + bytes - 1) / r.granule;
  for (size_t i = first; i <= last; ++i) check(r, r.begin + i * r.granule, r.cells[i], who, kind, at);
}

void forget_accesses(Region& r) {
  r.further.clear();
  for (Cell& c : r.cells) c = {c.written || c.writer == kInitialised ? kInitialised : 0, 0, 0, 0, 0, 0, 0, 0};
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

}  // namespace fastlm::emulator
