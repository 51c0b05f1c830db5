// Small kernels for tests/test_emulator.py: each is right with fault == kNone, and each other fault is one that the
// emulator is to find. What can be found by taking a call away has no fault here.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx.h"

using namespace fastlm;

namespace {

enum Fault {
  kNone,
  kOutside,        // of an array
  kOutsideShared,  // of shared memory
  kMisaligned,
  kDivergence,
  kEarlyExit,
  kDeadlock,
  kNobodySets,
  kTooFewBytes,  // expected by a barrier
  kTooManyBytes,
  kUninitialised,
  kWritesInput,
  kTooFewBlocks,
  kRaceAcrossBlocks,
  kPlainPoll,
  kNoOrder,  // a shuffle is no barrier
  kOutsidePeer,
};

constexpr int kThreads = 64;

// out[i] = the sum over the block of x: staged in shared memory, read by all.
void block_sum(const float* x, float* out, int steps, Fault fault) {
  float* staged = reinterpret_cast<float*>(ptx::shared_memory());
  const int tid = int(threadIdx.x), at = int(blockIdx.x) * kThreads + tid;
  float total = 0.0f;
  for (int step = 0; step < steps; ++step) {
    if (fault != kUninitialised || tid != 7) staged[tid] = x[fault == kOutside ? at + 1 : at] * float(step + 1);
    if (fault == kOutsideShared) staged[kThreads + tid] = 0.0f;
    if (fault == kEarlyExit && tid == 5) return;
    if (fault == kDivergence && tid < 16) {
      ptx::sync_block();
    } else {
      ptx::sync_block();
    }
    for (int i = 0; i < kThreads; ++i) total += staged[i];
    ptx::sync_block();
  }
  if (fault == kMisaligned) {
    const float2 pair = *reinterpret_cast<const float2*>(x + 1);
    total += pair.x + pair.y;
  }
  if (fault == kWritesInput) const_cast<float*>(x)[at] = total;
  out[at] = total;
  if (fault == kRaceAcrossBlocks && tid == 0) out[0] = total;
}

// A warp turns its values round through shared memory and adds all of them by shuffles.
void warps(const float* x, float* out, Fault fault) {
  const int tid = int(threadIdx.x), lane = tid % 32, warp = ptx::uniform(tid / 32);
  float* mine = reinterpret_cast<float*>(ptx::shared_memory()) + warp * 32;
  mine[lane] = x[tid];
  if (fault == kNoOrder) {
    ptx::shuffle(x[tid], 0);
  } else {
    ptx::sync_warp();
  }
  const float turned = mine[31 - lane];
  float sum = turned;
  for (int mask = 16; mask > 0; mask /= 2) sum += ptx::shuffle_xor(sum, mask);
  const float first = ptx::shuffle(turned, 31);
  const bool both = ptx::any(turned == x[tid]) || !ptx::all(first == x[warp * 32]);
  out[tid] = both ? -1.0f : sum + turned;
}

// The first warp fills a slot, the others read it: two named barriers between them.
void named(const float* x, float* out, int steps, Fault fault) {
  float* slot = reinterpret_cast<float*>(ptx::shared_memory());
  const int tid = int(threadIdx.x), threads = int(blockDim.x);
  float total = 0.0f;
  if (tid < 32) {
    for (int step = 0; step < steps; ++step) {
      if (step > 0) ptx::sync_named(fault == kDeadlock ? 1 : 2, unsigned(threads));  // the slot is free
      slot[tid] = x[step * 32 + tid];
      ptx::sync_named(fault == kDeadlock ? 2 : 1, unsigned(threads));  // the slot is full
    }
  } else {
    for (int step = 0; step < steps; ++step) {
      ptx::sync_named(1, unsigned(threads));
      total += slot[tid % 32];
      if (step + 1 < steps) ptx::sync_named(2, unsigned(threads));
    }
    out[tid - 32] = total;
  }
}

// Sums rows of x, 4 floats a thread, with the next row's copy under way.
void pipeline(const float* x, float* out, int rows, int used) {
  float* staged = reinterpret_cast<float*>(ptx::shared_memory());  // [2][4 kThreads]
  const int tid = int(threadIdx.x);
  const auto fetch = [&](int row) {
    if (row < rows) {
      ptx::copy_async_16(staged + (ptx::side(unsigned(row)) * kThreads + unsigned(tid)) * 4,
                         x + (row * kThreads + tid) * 4, row < used);
    }
    ptx::copy_async_commit();
  };
  float total = 0.0f;
  fetch(0);
  for (int row = 0; row < rows; ++row) {
    fetch(row + 1);
    ptx::copy_async_wait<1>();
    ptx::sync_block();
    for (int i = 0; i < 4; ++i) total += staged[(row % 2 * kThreads + (tid + 1) % kThreads) * 4 + i];
    ptx::sync_block();
  }
  out[tid] = total;
}

// d = a b for one 16 x 16 by 16 x 8 product, and for b as one 16-bit matrix of a pair.
template <bool bf16>
void product(const uint16_t* a, const uint16_t* b, float* d) {
  uint16_t* rows = reinterpret_cast<uint16_t*>(ptx::shared_memory());  // a [16][24], then b transposed [8][24]
  const int lane = int(threadIdx.x);
  for (int i = lane; i < 16 * 16; i += 32) rows[i / 16 * 24 + i % 16] = a[i];
  for (int i = lane; i < 16 * 8; i += 32) rows[(16 + i % 8) * 24 + i / 8] = b[i];
  ptx::sync_warp();
  uint32_t A[4], B[2];
  ptx::ldmatrix_x4(A, rows + lane % 16 * 24 + lane / 16 * 8);
  ptx::ldmatrix_x2(B, rows + (16 + lane % 8) * 24 + lane / 8 % 2 * 8);
  float sum[4] = {};
  if (bf16) {
    ptx::mma_bf16(sum, A, B[0], B[1]);
  } else {
    ptx::mma_f16(sum, A, B[0], B[1]);
  }
  for (int r = 0; r < 4; ++r) d[(lane / 4 + r / 2 * 8) * 8 + lane % 4 * 2 + r % 2] = sum[r];
}

// Two calls for one place of the kernel, of which a test takes away each by itself.
void wait_for(const uint32_t* flags, int count, uint32_t epoch, Fault fault, ptx::Site site = ptx::Site::current()) {
  const int tid = int(threadIdx.x);
  if (tid < count) {
    while ((fault == kPlainPoll ? flags[tid] : ptx::load_acquire(flags + tid, site)) < epoch) {
    }
  }
  ptx::sync_block(site);
}

// Each step every block writes its share, raises its flag, and adds what all have written.
void exchange(float* shares, uint32_t* flags, float* out, int steps, Fault fault) {
  const int tid = int(threadIdx.x), blocks = int(gridDim.x);
  float total = 0.0f;
  for (uint32_t epoch = 1; epoch <= uint32_t(steps); ++epoch) {
    float* now = shares + ptx::side(epoch) * unsigned(blocks * kThreads);
    now[int(blockIdx.x) * kThreads + tid] = float(epoch) * float(blockIdx.x + 1) + total;
    ptx::sync_block();
    if (tid == 0 && (fault != kNobodySets || blockIdx.x != 1)) ptx::store_release(flags + blockIdx.x, epoch);
    wait_for(flags, blocks, epoch, fault);
    for (int b = 0; b < blocks; ++b) total += ptx::load_l2(now + b * kThreads + tid) * 0.125f;
  }
  out[int(blockIdx.x) * kThreads + tid] = total;
}

// The same by words that carry their epoch: no flag, no barrier.
void tagged(uint2* shares, float* out, int steps) {
  const int tid = int(threadIdx.x), blocks = int(gridDim.x);
  float total = 0.0f;
  for (uint32_t epoch = 1; epoch <= uint32_t(steps); ++epoch) {
    uint2* now = shares + ptx::side(epoch) * unsigned(blocks * kThreads);
    const float mine = float(epoch) * float(blockIdx.x + 1) + total;
    ptx::store_relaxed(now + int(blockIdx.x) * kThreads + tid, make_uint2(__float_as_uint(mine), epoch));
    for (int b = 0; b < blocks; ++b) {
      uint2 got;
      do {
        got = ptx::load_relaxed_x2(now + b * kThreads + tid);
      } while (got.y != epoch);
      total += __uint_as_float(got.x) * 0.125f;
    }
  }
  out[int(blockIdx.x) * kThreads + tid] = total;
}

void atomics(uint32_t* words, uint32_t* out) {
  const uint32_t at = blockIdx.x * kThreads + threadIdx.x;
  out[ptx::atomic_add(words, 1)] = 1;  // a ticket each
  ptx::atomic_max(words + 1, at);
  ptx::atomic_or(words + 2, 1u << at % 32);
  ptx::store_relaxed(words + 3, 5);
}

// The order of blocks decides: wrong on purpose.
void tickets(uint32_t* words, float* out) {
  if (threadIdx.x == 0) out[ptx::atomic_add(words, 1)] = float(blockIdx.x);
}

void needless(float* out) {
  ptx::sync_block();  // needless
  out[threadIdx.x] = 1.0f;
}

// Every block hands each peer a number through that peer's shared memory, and reads its neighbour's at the end.
void peers(float* out, int steps, Fault fault) {
  float* inbox = reinterpret_cast<float*>(ptx::shared_memory());  // [2][ranks][kThreads]
  const unsigned rank = ptx::cluster_rank(), ranks = 4, tid = threadIdx.x;
  float total = float(rank);
  ptx::cluster_sync();  // all have begun
  for (unsigned epoch = 0; epoch < unsigned(steps); ++epoch) {
    float* now = inbox + ptx::side(epoch) * ranks * kThreads;
    for (unsigned r = 0; r < ranks; ++r) ptx::map_rank(now, r)[rank * kThreads + tid] = total + float(r);
    if (fault == kOutsidePeer) ptx::map_rank(inbox, 1)[2 * ranks * kThreads] = total;
    ptx::cluster_arrive();
    const float half = total * 0.5f;
    ptx::cluster_wait();
    total = half;
    for (unsigned r = 0; r < ranks; ++r) total += now[r * kThreads + tid];
  }
  total += ptx::map_rank(inbox, (rank + 1) % ranks)[tid];
  if (fault == kEarlyExit && rank == 2) return;
  ptx::cluster_sync();  // nobody ends before its memory is read
  out[blockIdx.x * kThreads + tid] = total;
}

// Each block writes a slice of `rows` in global memory; each row then goes to all shared memories by bulk copies, a
// part from each block, through two stages with a full and an empty barrier each.
void multicast(float* rows, float* out, int steps, Fault fault) {
  unsigned char* shared = ptx::shared_memory();
  constexpr unsigned kRanks = 2, kPart = kThreads, kRow = kRanks * kPart;
  float* stage = reinterpret_cast<float*>(shared);  // [2][kRow]
  uint64_t* full = reinterpret_cast<uint64_t*>(shared + 2 * kRow * sizeof(float));
  uint64_t* empty = full + 2;
  const unsigned rank = ptx::cluster_rank(), tid = threadIdx.x;
  for (int s = 0; s < steps; ++s)
    rows[unsigned(s) * kRow + rank * kPart + tid] = float(s + 1) * float(rank * kPart + tid);
  ptx::fence_async();
  if (tid == 0) {
    for (int i = 0; i < 2; ++i) {
      ptx::mbarrier_init(full + i, 1);
      ptx::mbarrier_init(empty + i, kRanks * kThreads);
    }
    ptx::fence_mbarrier_init();
  }
  ptx::cluster_sync();
  float total = 0.0f;
  for (unsigned s = 0; s < unsigned(steps); ++s) {
    const unsigned i = s % 2, round = s / 2;
    if (tid == 0) {
      if (round > 0) ptx::mbarrier_wait(empty + i, (round - 1) % 2);
      ptx::mbarrier_expect(full + i, kRow * 4 + (fault == kTooManyBytes ? 16 : 0) - (fault == kTooFewBytes ? 16 : 0));
      ptx::copy_bulk(stage + i * kRow + rank * kPart, rows + s * kRow + rank * kPart, kPart * 4, full + i, 3);
    }
    ptx::mbarrier_wait(full + i, round % 2);
    for (unsigned j = 0; j < kRow; ++j) total += stage[i * kRow + j];
    // A part sets out when all threads of both blocks have read what it overwrites.
    for (unsigned r = 0; r < kRanks; ++r) ptx::mbarrier_arrive(ptx::map_rank(empty + i, r));
  }
  ptx::cluster_sync();
  out[blockIdx.x * kThreads + tid] = total;
}

}  // namespace

extern "C" {

void toy_block_sum(const float* x, float* out, int blocks, int steps, int fault) {
  emulator::launch({unsigned(blocks), kThreads, kThreads * 4}, [&] { block_sum(x, out, steps, Fault(fault)); });
}

void toy_warps(const float* x, float* out, int threads, int fault) {
  emulator::launch({1, unsigned(threads), unsigned(threads) * 4}, [&] { warps(x, out, Fault(fault)); });
}

void toy_named(const float* x, float* out, int steps, int fault) {
  emulator::launch({1, 96, 32 * 4}, [&] { named(x, out, steps, Fault(fault)); });
}

void toy_pipeline(const float* x, float* out, int rows, int used) {
  emulator::launch({1, kThreads, 2 * kThreads * 16}, [&] { pipeline(x, out, rows, used); });
}

void toy_product(const uint16_t* a, const uint16_t* b, float* d, int bf16) {
  emulator::launch({1, 32, 24 * 24 * 2}, [&] { bf16 ? product<true>(a, b, d) : product<false>(a, b, d); });
}

void toy_exchange(float* shares, uint32_t* flags, float* out, int blocks, int steps, int fault) {
  emulator::launch({.grid = unsigned(blocks), .block = kThreads, .cooperative = fault != kTooFewBlocks},
                   [&] { exchange(shares, flags, out, steps, Fault(fault)); });
}

void toy_tagged(uint2* shares, float* out, int blocks, int steps) {
  emulator::launch({.grid = unsigned(blocks), .block = kThreads, .cooperative = true},
                   [&] { tagged(shares, out, steps); });
}

void toy_atomics(uint32_t* words, uint32_t* out, int blocks) {
  emulator::launch({unsigned(blocks), kThreads}, [&] { atomics(words, out); });
}

void toy_tickets(uint32_t* words, float* out, int blocks) {
  emulator::launch({unsigned(blocks), kThreads}, [&] { tickets(words, out); });
}

void toy_needless(float* out) {
  emulator::launch({1, kThreads}, [&] { needless(out); });
  emulator::launch({1, kThreads}, [&] { out[threadIdx.x] += 1.0f; });  // what an earlier launch wrote is there
}

void toy_peers(float* out, int steps, int fault) {
  emulator::launch({.grid = 8, .block = kThreads, .shared = 2 * 4 * kThreads * 4, .cluster = 4},
                   [&] { peers(out, steps, Fault(fault)); });
}

void toy_multicast(float* rows, float* out, int steps, int fault) {
  emulator::launch({.grid = 2, .block = kThreads, .shared = 2 * 2 * kThreads * 4 + 32, .cluster = 2},
                   [&] { multicast(rows, out, steps, Fault(fault)); });
}
}
