// Runs CUDA sources on a CPU: what a kernel's source and its test see of the emulator.
//
// Each thread is a fiber. Blocks run in a random order at random speeds (one seed is one schedule), shared memory
// starts as NaN, asynchronous copies land at a random moment before they are waited for. A kernel's source is compiled
// with -fsanitize=thread and linked without it: the compiler's calls at every load and store come to engine/,
// which checks bounds and happens-before, so that a race is found whatever the schedule was. What is found ends the
// launch, with block, thread and source line. Neither resource limits nor speed show here, nor what a cache may hold.
//
// This header has no templates of the standard library, whose instrumented copies the linker could give to the
// emulator.
#pragma once
#include <cuda_runtime.h>

#include <source_location>

namespace fastlm::emulator {

using Site = std::source_location;

struct Launch {
  dim3 grid, block;
  size_t shared = 0;         // bytes
  unsigned cluster = 1;      // neighbours in x
  bool cooperative = false;  // else a block may have to wait until another one has ended
};

struct Place {
  uint3 thread, block;
  dim3 block_size, grid;
};
extern const Place* here;  // of the running thread

void run(const Launch& launch, void (*body)(void*), void* context);

// Runs `kernel` as every thread of the grid; after a fault, this and later launches do nothing.
template <typename Kernel>
void launch(const Launch& launch, Kernel kernel) {
  run(launch, [](void* context) { (*static_cast<Kernel*>(context))(); }, &kernel);
}

// The functions of csrc/ptx.h, which says what each one means.
void sync_block(Site site);
void sync_warp(Site site);
void sync_named(unsigned id, unsigned threads, Site site);

void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site);
void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site);
void ldmatrix(uint32_t* r, unsigned matrices, const void* row, Site site);
template <unsigned matrices>
void ldmatrix(uint32_t (&r)[matrices], const void* row, Site site) {
  ldmatrix(r, matrices, row, site);
}

uint32_t shuffle(uint32_t x, int lane, Site site);
uint32_t shuffle_xor(uint32_t x, int lane_mask, Site site);
bool any(bool x, Site site);
inline float shuffle(float x, int lane, Site site) { return __uint_as_float(shuffle(__float_as_uint(x), lane, site)); }
inline int shuffle(int x, int lane, Site site) { return int(shuffle(unsigned(x), lane, site)); }
inline float shuffle_xor(float x, int lane_mask, Site site) {
  return __uint_as_float(shuffle_xor(__float_as_uint(x), lane_mask, site));
}

void copy_async(void* shared, const void* global, unsigned bytes, bool inside, Site site);
void copy_async_commit(Site site);
void copy_async_wait(int left, Site site);

uint32_t load_relaxed(const uint32_t* p, Site site);
uint2 load_relaxed_x2(const uint2* p, Site site);
uint4 load_relaxed_x4(const uint4* p, Site site);
void store_relaxed(uint32_t* p, uint32_t x, Site site);
void store_relaxed(uint2* p, uint2 x, Site site);
uint32_t load_acquire(const uint32_t* p, Site site);
void store_release(uint32_t* p, uint32_t x, Site site);
uint32_t before_atomic(uint32_t* p, Site site);
void after_atomic(uint32_t* p, uint32_t x);
template <typename Change>
uint32_t atomic(uint32_t* p, Change change, Site site) {
  const uint32_t old = before_atomic(p, site);
  after_atomic(p, change(old));
  return old;
}

void cluster_arrive(Site site);
void cluster_wait(Site site);
void cluster_sync(Site site);
unsigned cluster_rank();
void* map_rank(void* mine, unsigned rank, Site site);

void mbarrier_init(uint64_t* barrier, unsigned count, Site site);
void fence_mbarrier_init(Site site);
void mbarrier_expect(uint64_t* barrier, unsigned bytes, Site site);
void mbarrier_arrive(uint64_t* barrier, Site site);
void mbarrier_wait(uint64_t* barrier, unsigned parity, Site site);
void copy_bulk(void* shared, const void* global, unsigned bytes, uint64_t* barrier, uint16_t ranks, Site site);
void fence_async(Site site);

unsigned side(unsigned epoch, Site site);
unsigned char* shared_memory();

}  // namespace fastlm::emulator

#define threadIdx (::fastlm::emulator::here->thread)
#define blockIdx (::fastlm::emulator::here->block)
#define blockDim (::fastlm::emulator::here->block_size)
#define gridDim (::fastlm::emulator::here->grid)
