// The ways of h from the blocks that make it to those that multiply with it. A way has four parts: begin, before the
// first step; multiply, once h of the step before is there; publish, by the thread that has two units of a row, and
// published, by all when they have; and end.
#pragma once
#include "lstm.cuh"
#include "lstm_args.h"

namespace fastlm::lstm {

// What a block knows of the portion of the batch that it works at.
struct Turn {
  int step, pass, portion, rows;
  unsigned sequence;  // of all turns
  bool last;          // of the step
};

// Word `pair` of lane `lane` in a fragment of h: its row of the batch and the first of its two units.
struct Place {
  int row, unit;
};

FASTLM_DEVICE Place place_of(int portion, int tile, int columns, int n, int lane, int pair) {
  return {(portion * columns + n) * 8 + lane / 4, 16 * tile + 4 * (lane % 4) + 2 * pair};
}

// The word of the state before the first step; zero where there is no row or unit.
FASTLM_DEVICE uint32_t first_word(const Forward& a, const Place& at, bool low) {
  if (at.row >= a.B || at.unit >= a.H) return 0;
  const int64_t i = int64_t{at.row} * a.H + at.unit;
  const float up = state_up(a.plan.tiling.split), h = load(a.h0, i, a.state) * up;
  float2 left;
  const uint32_t high = pair_of(h, at.unit + 1 < a.H ? load(a.h0, i + 1, a.state) * up : 0.0f, left);
  return low ? pair_of(left.x, left.y, left) : high;
}

// What all ways share: where things lie. `operands` are in shared memory.
template <bool SPLIT, int MT, int NT>
struct Way {
  static constexpr int WORDS = words_of(SPLIT), TILE = NT * 32 * WORDS;  // 32-bit words of a lane, of a tile
  const Forward& a;
  uint32_t* operands;
  const int replica, tiles16, operand, portions;

  FASTLM_DEVICE Way(const Forward& args, unsigned char* shared)
      : a(args),
        operands(reinterpret_cast<uint32_t*>(shared)),
        replica(blockIdx.x / args.plan.groups),
        tiles16((args.H + 15) / 16),
        operand(tiles16 * TILE),
        portions((args.B + 8 * NT - 1) / (8 * NT)) {}

  FASTLM_DEVICE uint32_t* exchanged(int step, int portion) const {
    return a.exchange + (int64_t{step} * portions + portion) * operand;
  }
  FASTLM_DEVICE uint32_t* flags(int pass) const {
    return a.flags + (int64_t{replica} * a.plan.passes + pass) * a.plan.groups;
  }
  // The word of an operand that has units `unit` and `unit` + 1 of a row of the portion.
  FASTLM_DEVICE static int word_of(int row, int unit) {
    const int lane = row % 8 * 4 + unit % 16 / 4;
    return unit / 16 * TILE + (row / 8 * 32 + lane) * WORDS + unit % 4 / 2;
  }
  // Waits for the blocks that make units `first` to `last`.
  FASTLM_DEVICE void wait_for_units(const Turn& turn, int first, int last,
                                    ptx::Site site = ptx::Site::current()) const {
    wait_for(flags(turn.pass), first / (4 * MT), min(last, a.H - 1) / (4 * MT), uint32_t(turn.step), site);
  }
  FASTLM_DEVICE void raise_flag(const Turn& turn, ptx::Site site = ptx::Site::current()) const {
    if (thread() == 0) ptx::store_release(flags(turn.pass) + blockIdx.x % a.plan.groups, uint32_t(turn.step) + 1, site);
  }
  // The product with an operand in shared memory.
  template <typename Weights>
  FASTLM_DEVICE void multiply_operand(const Weights& weights, float (&sums)[MT][NT][4], const uint32_t* from) const {
    const int lane = thread() % 32, first = ptx::uniform(thread() / 32) * a.plan.depth;
    clear(sums);
#pragma unroll
    for (int k = 0; k < Weights::kKept; ++k) {
      if (k >= a.plan.depth || first + k >= tiles16) continue;
      Words<SPLIT> columns[NT];
#pragma unroll
      for (int n = 0; n < NT; ++n) columns[n].read(from + (first + k) * TILE + (n * 32 + lane) * WORDS);
      weights.template multiply<true>(sums, columns, k);
    }
#pragma unroll 1
    for (int k = Weights::kKept; k < min(a.plan.depth, tiles16 - first); ++k) {
      Words<SPLIT> columns[NT];
#pragma unroll
      for (int n = 0; n < NT; ++n) columns[n].read(from + (first + k) * TILE + (n * 32 + lane) * WORDS);
      weights.template multiply<false>(sums, columns, k);
    }
  }
};

// Through global memory. With POLL a word says itself that it has come; else flags say it of all words of a block,
// which waits for them in the turn that needs them or, as at a barrier of the grid, before it goes on.
template <bool POLL, bool SPLIT, int MT, int NT>
struct Global : Way<SPLIT, MT, NT> {
  using Base = Way<SPLIT, MT, NT>;
  using Base::Base, Base::a, Base::exchanged, Base::tiles16, Base::TILE;

  FASTLM_DEVICE void begin() {}

  template <int WAVE, typename Weights>
  FASTLM_DEVICE void multiply(const Weights& weights, float (&sums)[MT][NT][4], const Turn& turn) {
    const int first = ptx::uniform(thread() / 32) * a.plan.depth, count = min(a.plan.depth, tiles16 - first);
    if (count <= 0) return clear(sums);
    if (!POLL && a.plan.exchange == Exchange::flags && turn.step > 0)
      this->wait_for_units(turn, 16 * first, 16 * (first + count) - 1);
    const uint32_t* from = exchanged(turn.step, turn.portion) + first * TILE;
    weights.template multiply_exchanged<WAVE, POLL>(sums, from, count, turn.rows, [](const auto&) {});
  }

  FASTLM_DEVICE void publish(const Turn& turn, int row, int unit, const uint32_t (&words)[2]) {
    uint32_t* to = exchanged(turn.step + 1, turn.portion) + this->word_of(row, unit);
    publish_word<POLL>(to, words[0]);
    if constexpr (SPLIT) publish_word<POLL>(to + 2, words[1]);
  }

  FASTLM_DEVICE void published(const Turn& turn) {
    if constexpr (!POLL) {
      ptx::sync_block();
      this->raise_flag(turn);
      if (a.plan.exchange == Exchange::flags) return;
      Turn next = turn;
      ++next.step;
      this->wait_for_units(next, 0, a.H - 1);
    }
  }

  FASTLM_DEVICE void end() {}
};

template <bool SPLIT, int MT, int NT>
using Polled = Global<true, SPLIT, MT, NT>;
template <bool SPLIT, int MT, int NT>
using Flagged = Global<false, SPLIT, MT, NT>;

// Each rank of a cluster fetches a share of the operand for all of them, as soon as the flags of those who make it are
// up, into one of two buffers. `full` counts the bytes of a buffer, `drained` the ranks that are done with it.
template <bool SPLIT, int MT, int NT>
struct Multicast : Way<SPLIT, MT, NT> {
  using Base = Way<SPLIT, MT, NT>;
  using Base::a, Base::exchanged, Base::tiles16, Base::TILE, Base::operands, Base::operand;
  uint64_t *full, *drained;

  FASTLM_DEVICE Multicast(const Forward& args, unsigned char* shared)
      : Base(args, shared), full(reinterpret_cast<uint64_t*>(ptx::shared_memory())), drained(full + 2) {}

  FASTLM_DEVICE void begin() {
    if (thread() == 0) {
      for (int i = 0; i < 2; ++i) {
        ptx::mbarrier_init(full + i, 1);
        ptx::mbarrier_init(drained + i, unsigned(a.plan.cluster));
      }
      ptx::fence_mbarrier_init();
    }
    ptx::cluster_sync();
  }

  template <int WAVE, typename Weights>
  FASTLM_DEVICE void multiply(const Weights& weights, float (&sums)[MT][NT][4], const Turn& turn) {
    const unsigned buffer = ptx::side(turn.sequence), use = turn.sequence / 2;
    uint32_t* to = operands + buffer * operand;
    if (thread() < 32) {
      const int share = (tiles16 + a.plan.cluster - 1) / a.plan.cluster, first = int(ptx::cluster_rank()) * share;
      const int count = min(share, tiles16 - first);
      if (count > 0 && turn.step > 0) this->wait_for_units(turn, 16 * first, 16 * (first + count) - 1);
      if (thread() == 0) {
        if (use > 0) ptx::mbarrier_wait(drained + buffer, (use - 1) & 1);
        ptx::fence_async();
        ptx::mbarrier_expect(full + buffer, unsigned(operand) * 4);
        if (count > 0)
          ptx::copy_bulk(to + first * TILE, exchanged(turn.step, turn.portion) + first * TILE,
                         unsigned(count) * TILE * 4, full + buffer, uint16_t((1u << a.plan.cluster) - 1));
      }
    }
    ptx::mbarrier_wait(full + buffer, use & 1);
    this->multiply_operand(weights, sums, to);
  }

  FASTLM_DEVICE void publish(const Turn& turn, int row, int unit, const uint32_t (&words)[2]) {
    exchanged(turn.step + 1, turn.portion)[this->word_of(row, unit)] = words[0];
  }

  // All warps have multiplied: a barrier of the block lies between.
  FASTLM_DEVICE void published(const Turn& turn) {
    ptx::sync_block();
    this->raise_flag(turn);
    if (thread() >= 32 && thread() < 32 + a.plan.cluster)
      ptx::mbarrier_arrive(ptx::map_rank(drained + ptx::side(turn.sequence), thread() - 32));
  }

  FASTLM_DEVICE void end() { ptx::cluster_sync(); }  // nobody leaves while others may still arrive at its barriers
};

// The layer in one cluster: every pair of units goes straight into the shared memory of all ranks, into one of two
// operands of the portion.
template <bool SPLIT, int MT, int NT>
struct Cluster : Way<SPLIT, MT, NT> {
  using Base = Way<SPLIT, MT, NT>;
  using Base::Base, Base::a, Base::TILE, Base::WORDS, Base::operands, Base::operand, Base::replica;

  FASTLM_DEVICE uint32_t* buffer(int pass, int step, ptx::Site site = ptx::Site::current()) const {
    return operands + (2 * pass + ptx::side(unsigned(step), site)) * operand;
  }

  FASTLM_DEVICE void begin() {
    for (int pass = 0; pass < a.plan.passes; ++pass)
      for (int i = thread(); i < operand; i += kThreads) {
        const int n = i / (32 * WORDS) % NT, lane = i / WORDS % 32;
        const Place at = place_of(replica + pass * a.plan.replicas, i / TILE, NT, n, lane, i % 2);
        operands[2 * pass * operand + i] = first_word(a, at, i % WORDS >= 2);
        operands[(2 * pass + 1) * operand + i] = 0;
      }
    ptx::cluster_sync();
  }

  template <int WAVE, typename Weights>
  FASTLM_DEVICE void multiply(const Weights& weights, float (&sums)[MT][NT][4], const Turn& turn) {
    if (turn.pass == 0 && turn.step > 0) ptx::cluster_wait();
    this->multiply_operand(weights, sums, buffer(turn.pass, turn.step));
  }

  FASTLM_DEVICE void publish(const Turn& turn, int row, int unit, const uint32_t (&words)[2]) {
    if (turn.step + 1 == a.T) return;  // others may be gone
    uint32_t* to = buffer(turn.pass, turn.step + 1) + this->word_of(row, unit);
    for (int rank = 0; rank < a.plan.cluster; ++rank) *ptx::map_rank(to, unsigned(rank)) = words[0];
  }

  FASTLM_DEVICE void published(const Turn& turn) {
    if (turn.last && turn.step + 1 < a.T) ptx::cluster_arrive();
  }

  FASTLM_DEVICE void end() {}
};

}  // namespace fastlm::lstm
