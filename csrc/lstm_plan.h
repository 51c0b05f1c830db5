// How the persistent LSTM kernels divide a layer over a GPU: a pure function of sizes, with no CUDA call in it.
//
// A block is 8 warps. It multiplies a tile of the masked weight, 16 * tiles rows by 16 * depth columns a warp, with the
// exchanged columns of 8 * columns rows of the batch, and adds the warps' sums in shared memory. Forward, the rows are
// the four gates of 4 * tiles units and the columns all units. Backward, the rows are the units of a group, the columns
// the gates of those units that belong to the same slice in every group: block (slice, group) hands the sums of each
// rank of its group to that rank. `kept` of the `depth` column tiles stay in registers, the others in shared memory.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <iterator>

namespace fastlm::lstm {

#ifndef FASTLM_LSTM_WARPS  // a test has fewer, for which small layers are large
#define FASTLM_LSTM_WARPS 8
#endif
constexpr int kWarps = FASTLM_LSTM_WARPS, kThreads = 32 * kWarps;
constexpr int64_t kFragment = 512;  // bytes of one 16 x 16 tile of weights in the registers of a warp

enum class Exchange : int {
  data,       // through global memory, a word saying itself that it has arrived
  flags,      // through global memory, after a flag of every block: to compare with, not for split
  grid,       // through global memory, after a barrier of all blocks: slow and obvious, for tests, not for split
  multicast,  // flags; a cluster fetches once what all its blocks need
  cluster,    // the layer in one cluster, through its shared memory
};

// An instantiation of a kernel. `split`: float32 as float16 high + low. Of the column tiles of a warp, `kept` have
// their weights in registers, and `wave` are fetched at a time.
struct Tiling {
  bool split;
  int tiles, kept, wave, columns;
};

// What 255 registers hold: 4 * tiles * kept of weights, 2 (split: 4) * wave * columns of what is fetched, and
// 4 * tiles * columns of sums.
constexpr Tiling kForward[] = {
    {false, 1, 5, 5, 1}, {false, 1, 5, 5, 3}, {false, 2, 9, 9, 1}, {false, 2, 9, 9, 3}, {false, 3, 9, 9, 1},
    {false, 3, 6, 9, 3}, {false, 4, 8, 8, 1}, {false, 4, 6, 6, 3}, {false, 8, 4, 5, 1},  //
    {true, 1, 5, 5, 1},  {true, 1, 5, 5, 2},  {true, 2, 9, 9, 1},  {true, 2, 7, 7, 2},  {true, 3, 9, 9, 1},
    {true, 3, 6, 6, 2},
};
constexpr Tiling kMulticast[] = {{false, 3, 9, 9, 3}, {false, 3, 9, 9, 5}};
constexpr Tiling kCluster[] = {{false, 7, 4, 4, 1}, {false, 7, 3, 3, 3}};
constexpr Tiling kBackward[] = {
    {false, 1, 9, 9, 1}, {false, 2, 9, 9, 1}, {false, 2, 9, 9, 3}, {false, 4, 9, 9, 1},
    {false, 4, 7, 7, 2}, {false, 5, 5, 5, 1}, {false, 5, 4, 5, 3},  //
    {true, 1, 9, 9, 1},  {true, 1, 5, 5, 2},  {true, 2, 9, 9, 1},  {true, 2, 5, 5, 2},
    {true, 3, 9, 9, 1},  {true, 4, 6, 6, 2},  {true, 5, 5, 5, 1},  {true, 5, 4, 4, 2},
};

// What a plan may use.
struct Device {
  int multiprocessors;
  int shared;       // bytes of shared memory a block may have
  int clusters[5];  // how many clusters of 1, 2, 4, 8 and 16 blocks run at once; zeros before Hopper
};

struct Plan {
  Tiling tiling;
  Exchange exchange;
  int units;          // of a block; forward 4 * tiles
  int slices;         // backward: ranks of a group; forward 1
  int groups;         // a replica is slices * groups blocks
  int replicas;       // independent copies of the layer, each with rows of the batch of its own
  int passes;         // portions of 8 * columns rows that a replica takes in turn at every step
  int depth;          // tiles of 16 columns a warp
  int sides;          // buffers for the sums of the warps
  int cluster;        // blocks of a cluster; backward, more than one means that a group adds up in its shared memory
  int64_t shared;     // bytes
  float nanoseconds;  // of a step, by the estimate below; 0: there is no plan

  constexpr int blocks() const { return slices * groups * replicas; }
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- Shared memory of a block, in the order in which it lies there ------------------------------------------------

constexpr int64_t whole_lines(int64_t bytes) { return ceil_div(bytes, 128) * 128; }

// Weights beyond the registers. The low halves of split ones are never kept.
constexpr int64_t tail_bytes(const Tiling& t, int depth) {
  const int64_t beyond = depth > t.kept ? depth - t.kept : 0;
  return kWarps * kFragment * t.tiles * (beyond + (t.split ? depth : 0));
}

// What a thread remembers of a portion of the batch: forward the cells of its pairs of units, backward dc, dh and what
// the next scale follows from.
constexpr int pairs(const Tiling& t) { return int(ceil_div(16 * t.tiles * t.columns, kThreads)); }
constexpr int64_t state_bytes(int passes, int floats) { return int64_t{4} * kThreads * floats * passes; }

// A portion of the batch as operand of the product: `width` numbers of each row.
constexpr int64_t operand_bytes(const Tiling& t, int64_t width) {
  return (t.split ? 512 : 256) * t.columns * ceil_div(width, 16);
}

// One column tile of every warp on its way to the registers; the pitch keeps its 8-byte reads in different banks.
constexpr int kStagePitch = 16 * kWarps + 16;
constexpr int64_t stage_bytes(const Tiling& t) { return whole_lines((t.split ? 4 : 2) * 16 * t.tiles * kStagePitch); }

// The sums of the warps, [warp][row of the batch][pitch]; the pitch keeps the stores of a fragment in different banks.
constexpr int sum_pitch(const Tiling& t) { return 16 * t.tiles + 4; }
constexpr int64_t sum_bytes(const Tiling& t) { return whole_lines(4 * kWarps * 8 * t.columns * sum_pitch(t)); }

constexpr int kInputs = 9;  // backward, what a thread brings for its next turn, and its place

// What the ranks of a cluster hand to one of them.
constexpr int64_t inbox_bytes(const Plan& p) { return whole_lines(4 * p.slices * p.units * 8 * p.tiling.columns); }

constexpr int operands_in_shared(const Plan& p) {
  return p.exchange == Exchange::multicast ? 2 : p.exchange == Exchange::cluster ? 2 * p.passes : 0;
}

// While the weights come in, what will be kept and a column tile of every warp lie there.
constexpr int64_t kept_bytes(const Tiling& t, int depth) {
  return kWarps * kFragment * t.tiles * smaller(t.kept, depth);
}
constexpr int64_t load_bytes(const Tiling& t, int depth) {
  return larger(tail_bytes(t, depth), kept_bytes(t, depth)) + stage_bytes(t);
}

constexpr int64_t forward_shared(const Plan& p, int64_t H) {
  const Tiling& t = p.tiling;
  const int64_t states = state_bytes(p.passes, 2 * pairs(t)) + state_bytes(1, 8 * pairs(t));
  const int64_t operands = operands_in_shared(p) * operand_bytes(t, H);
  const int64_t steps = tail_bytes(t, p.depth) + states + operands + p.sides * sum_bytes(t);
  return 128 + larger(steps, load_bytes(t, p.depth));
}

constexpr int64_t backward_shared(const Plan& p) {
  const Tiling& t = p.tiling;
  const int64_t states = state_bytes(p.passes, 4) + state_bytes(1, kInputs);
  const int64_t inbox = p.cluster > 1 ? 2 * inbox_bytes(p) : 0;
  const int64_t steps = tail_bytes(t, p.depth) + states + inbox + p.sides * sum_bytes(t);
  return 128 + larger(steps, load_bytes(t, p.depth));
}

// ---- The time of a step ---------------------------------------------------------------------------------------------

// Rates by which plans are compared, from what is published about Hopper; none of them is measured.
constexpr float kClock = 1.7f;            // GHz
constexpr float kProducts = 2048 * 0.6f;  // multiplications a cycle and multiprocessor, of 16-bit numbers by mma.sync
constexpr float kSharedBytes = 128;       // a cycle and multiprocessor
constexpr float kGlobalBytes = 5500;      // a nanosecond from level 2, to all together
constexpr float kRound = 700;             // nanoseconds from a store to its arrival in another block
constexpr float kFlagRound = 1000;        // the same with a flag in between
constexpr float kClusterRound = 400;      // within a cluster
constexpr float kElementwise = 200;       // a portion

constexpr float product_time(const Plan& p) {
  const Tiling& t = p.tiling;
  const float products = float(16 * t.tiles) * (8 * t.columns) * (16 * kWarps * p.depth) * (t.split ? 3 : 1);
  const float bytes = float(tail_bytes(t, p.depth)) + 2.0f * float(sum_bytes(t));
  return (products / kProducts + bytes / kSharedBytes) / kClock + (p.sides == 1 ? 30.0f : 0.0f);
}

// Portions follow each other without a pause once there are enough of them to cover the way of one.
constexpr float step_time(const Plan& p, float portion, float way) {
  return portion * float(p.passes) > way + portion ? portion * float(p.passes) : way + portion;
}

constexpr float exchange_time(Exchange exchange) {
  return exchange == Exchange::data ? kRound : exchange == Exchange::cluster ? kClusterRound : kFlagRound;
}

constexpr float forward_time(const Plan& p, int64_t H) {
  const float fetched = float(operand_bytes(p.tiling, H)) * float(p.blocks());
  const float fetch = p.exchange == Exchange::cluster ? 0.0f : fetched / float(p.cluster) / kGlobalBytes;
  return step_time(p, product_time(p) + kElementwise + fetch, exchange_time(p.exchange));
}

constexpr float backward_time(const Plan& p) {
  const float width = float(p.groups) * p.units * 4;
  const float fetch = float(operand_bytes(p.tiling, int64_t(width))) * float(p.blocks()) / kGlobalBytes;
  const float handed = 4.0f * p.slices * p.units * 8 * p.tiling.columns * float(p.blocks());  // out, and in again
  const float hand = p.cluster > 1 ? kClusterRound : kFlagRound + 2 * handed / kGlobalBytes;
  // A portion waits for its group before the next one begins.
  return float(p.passes) * (product_time(p) + kElementwise + fetch + hand + exchange_time(p.exchange));
}

// A step of the other way, a product of the vendor's library and a kernel for the rest: what the host takes to ask for
// both, or reading the weights once more and multiplying at half of the peak. Beyond it no plan is worth while.
constexpr float alternating_time(int64_t H, int64_t B, bool split) {
  const float weights = 4.0f * float(H) * float(H), bytes = weights * (split ? 4 : 2);
  const float work = 3000 + bytes / kGlobalBytes + weights * float(B) / (split ? 20e3f : 200e3f);
  return work > 10000 ? work : 10000;
}

// ---- The choice -----------------------------------------------------------------------------------------------------

constexpr bool has_kernel(const Tiling& t, Exchange exchange) {
  return !t.split || (exchange != Exchange::flags && exchange != Exchange::grid);
}

constexpr int log2_of(int n) { return n <= 1 ? 0 : 1 + log2_of(n / 2); }

// The better of two plans; the one that leaves more multiprocessors free where they are alike.
constexpr bool better(const Plan& a, const Plan& b) {
  return b.nanoseconds == 0 || a.nanoseconds < b.nanoseconds ||
         (a.nanoseconds == b.nanoseconds && a.blocks() < b.blocks());
}

// Whether as many blocks as the plan has run at once, each with its shared memory.
constexpr bool fits(const Plan& p, const Device& d) {
  if (p.shared > d.shared || p.blocks() > d.multiprocessors) return false;
  return p.cluster == 1 || p.blocks() / p.cluster <= d.clusters[log2_of(p.cluster)];
}

// Takes the plan into account with every number of replicas, if it fits.
template <typename Shared, typename Time>
constexpr void consider(const Plan& shape, int64_t B, const Device& d, Plan& best, Shared shared, Time time) {
  const int64_t portions = ceil_div(B, 8 * shape.tiling.columns);
  const int64_t most = smaller(portions, d.multiprocessors / (shape.slices * shape.groups));
  for (int replicas = 1, passes = 0; replicas <= most; ++replicas) {
    Plan p = shape;
    p.replicas = replicas;
    p.passes = int(ceil_div(portions, replicas));
    if (p.passes == passes) continue;  // more blocks for nothing
    passes = p.passes;
    p.shared = shared(p);
    if (p.shared > d.shared && p.sides == 2) {
      p.sides = 1;
      p.shared = shared(p);
    }
    if (!fits(p, d)) continue;
    p.nanoseconds = time(p);
    if (better(p, best)) best = p;
  }
}

// The plan of the forward pass with one kind of exchange; `nanoseconds` is 0 when none fits. `only`: the place of the
// one tiling of the table that a test wants.
constexpr Plan plan_forward(int64_t H, int64_t B, bool split, Exchange exchange, const Device& d, int only = -1) {
  Plan best{};
  const auto shared = [&](const Plan& p) { return forward_shared(p, H); };
  const auto time = [&](const Plan& p) { return forward_time(p, H); };
  const auto one = [&](const Tiling& t, int cluster) {
    const int64_t blocks = ceil_div(H, 4 * t.tiles);
    if (t.split != split || !has_kernel(t, exchange) || blocks > d.multiprocessors ||
        (exchange == Exchange::cluster && blocks > cluster))
      return;
    const int groups = int(ceil_div(blocks, cluster) * cluster), depth = int(ceil_div(H, 16 * kWarps));
    consider({t, exchange, 4 * t.tiles, 1, groups, 0, 0, depth, 2, cluster, 0, 0}, B, d, best, shared, time);
  };
  const auto all = [&](const auto& table, std::initializer_list<int> clusters) {
    for (int i = 0; i < int(std::size(table)); ++i)
      for (const int cluster : clusters)
        if (only < 0 || i == only) one(table[i], cluster);
  };
  if (exchange == Exchange::multicast) {
    all(kMulticast, {2, 4, 8});
  } else if (exchange == Exchange::cluster) {
    all(kCluster, {2, 4, 8, 16});
  } else {
    all(kForward, {1});
  }
  return best;
}

// The plan of the backward pass; `clusters`: whether groups add up within clusters or through global memory.
constexpr Plan plan_backward(int64_t H, int64_t B, bool split, Exchange exchange, bool clusters, const Device& d,
                             int only = -1) {
  Plan best{};
  const auto shared = [](const Plan& p) { return backward_shared(p); };
  const auto time = [](const Plan& p) { return backward_time(p); };
  for (int i = 0; i < int(std::size(kBackward)); ++i) {
    const Tiling& t = kBackward[i];
    if (t.split != split || !has_kernel(t, exchange) || (only >= 0 && i != only)) continue;
    for (const int slices : {1, 2, 4, 8, 16}) {
      if (clusters && (slices == 1 || exchange != Exchange::data)) continue;
      for (int units = 1; units * slices <= 16 * t.tiles && units * 8 * t.columns <= kThreads; ++units) {
        const int64_t groups = ceil_div(H, slices * units);
        if (groups * slices > d.multiprocessors) continue;
        const int depth = int(ceil_div(groups * units, 4 * kWarps));
        const Plan p{t, exchange, units, slices, int(groups), 0, 0, depth, 1, clusters ? slices : 1, 0, 0};
        consider(p, B, d, best, shared, time);
      }
    }
  }
  return best;
}

}  // namespace fastlm::lstm
