// Every PTX instruction and every synchronisation that a kernel uses, one function each: its meaning under the emulator
// (tests/emulator, where the sources run on a CPU), then the instruction. Kernels reach these in no other way.
//
// A function that orders memory or waits knows the place that calls it, so that a test can take each call away in turn.
// Where an argument is a place in shared memory, its address is generic. What needs sm_90 traps on less.
#pragma once
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstdio>

#ifdef FASTLM_EMULATED
#include "emulator.h"
#define FASTLM_EITHER(emulated, ...) return emulated
#else
#define FASTLM_EITHER(emulated, ...) __VA_ARGS__
#endif

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FASTLM_SM90(...) __VA_ARGS__
#else
#define FASTLM_SM90(...) __trap()
#endif

#define FASTLM_PTX __device__ __forceinline__

namespace fastlm::ptx {

#ifdef FASTLM_EMULATED
using Site = emulator::Site;
#else
struct Site {  // nothing on a GPU
  __host__ __device__ static constexpr Site current() { return {}; }
};
#endif

#if defined(FASTLM_BOUNDED_SPIN) && !defined(FASTLM_EMULATED)
static __device__ unsigned waited_in_vain;  // of one source's kernels; the host reads and clears it
#endif

#ifndef FASTLM_EMULATED
FASTLM_PTX uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
#endif

// threadIdx.x, read anew at every call: what follows from it is not kept in registers that other things need.
FASTLM_PTX int thread() {
  FASTLM_EITHER(int(threadIdx.x), {
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
  });
}

// ---- Barriers of a block

FASTLM_PTX void sync_block(Site site = Site::current()) { FASTLM_EITHER(emulator::sync_block(site), __syncthreads()); }

FASTLM_PTX void sync_warp(Site site = Site::current()) { FASTLM_EITHER(emulator::sync_warp(site), __syncwarp()); }

// `threads` of the block meet, whole warps; id 1 to 15, as 0 is sync_block.
FASTLM_PTX void sync_named(unsigned id, unsigned threads, Site site = Site::current()) {
  FASTLM_EITHER(emulator::sync_named(id, threads, site),
                asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"));
}

// ---- Matrices, by a whole warp: D += A(16 x 16, row) B(16 x 8, column), fragments as the PTX manual has them

FASTLM_PTX void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site = Site::current()) {
  FASTLM_EITHER(
      emulator::mma_f16(d, a, b0, b1, site),
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                   "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" : "+f"(d[0]),
                   "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)));
}

FASTLM_PTX void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site = Site::current()) {
  FASTLM_EITHER(
      emulator::mma_bf16(d, a, b0, b1, site),
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                   "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" : "+f"(d[0]),
                   "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)));
}

// 8 x 8 matrices of 16-bit elements: lanes 8 i to 8 i + 7 give the rows of matrix i, 16 bytes each.
FASTLM_PTX void ldmatrix_x2(uint32_t (&r)[2], const void* row, Site site = Site::current()) {
  FASTLM_EITHER(emulator::ldmatrix(r, row, site),
                asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]),
                             "=r"(r[1]) : "r"(shared_address(row)) : "memory"));
}

FASTLM_PTX void ldmatrix_x4(uint32_t (&r)[4], const void* row, Site site = Site::current()) {
  FASTLM_EITHER(emulator::ldmatrix(r, row, site),
                asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]),
                             "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory"));
}

// ---- The warp, whole

FASTLM_PTX float shuffle_xor(float x, int lane_mask, Site site = Site::current()) {
  FASTLM_EITHER(emulator::shuffle_xor(x, lane_mask, site), return __shfl_xor_sync(0xFFFFFFFFu, x, lane_mask));
}

FASTLM_PTX uint32_t shuffle_xor(uint32_t x, int lane_mask, Site site = Site::current()) {
  FASTLM_EITHER(emulator::shuffle_xor(x, lane_mask, site), return __shfl_xor_sync(0xFFFFFFFFu, x, lane_mask));
}

FASTLM_PTX float shuffle(float x, int lane, Site site = Site::current()) {
  FASTLM_EITHER(emulator::shuffle(x, lane, site), return __shfl_sync(0xFFFFFFFFu, x, lane));
}

FASTLM_PTX uint32_t shuffle(uint32_t x, int lane, Site site = Site::current()) {
  FASTLM_EITHER(emulator::shuffle(x, lane, site), return __shfl_sync(0xFFFFFFFFu, x, lane));
}

FASTLM_PTX bool any(bool x, Site site = Site::current()) {
  FASTLM_EITHER(emulator::any(x, site), return __any_sync(0xFFFFFFFFu, x));
}

FASTLM_PTX bool all(bool x, Site site = Site::current()) {
  FASTLM_EITHER(!emulator::any(!x, site), return __all_sync(0xFFFFFFFFu, x));
}

// The value of lane 0, which the compiler then knows to be one for the warp.
FASTLM_PTX int uniform(int x, Site site = Site::current()) {
  FASTLM_EITHER(emulator::shuffle(x, 0, site), return __shfl_sync(0xFFFFFFFFu, x, 0));
}

// Of two pairs of unsigned 16-bit numbers the larger ones.
FASTLM_PTX uint32_t max_pairs(uint32_t a, uint32_t b) {
  FASTLM_EITHER((a >> 16 > b >> 16 ? a : b) >> 16 << 16 | ((a & 0xFFFF) > (b & 0xFFFF) ? a & 0xFFFF : b & 0xFFFF),
                return __vmaxu2(a, b));
}

// ---- Asynchronous copies of a thread, in groups that complete in order

// 16 aligned bytes, past L1; zeros when not inside.
FASTLM_PTX void copy_async_16(void* shared, const void* global, bool inside = true, Site site = Site::current()) {
  FASTLM_EITHER(emulator::copy_async(shared, global, 16, inside, site),
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                             "r"(inside ? 16 : 0) : "memory"));
}

// 4, 8 or 16 aligned bytes; what can pass L1 does.
template <int bytes>
FASTLM_PTX void copy_async(void* shared, const void* global, Site site = Site::current()) {
  FASTLM_EITHER(
      emulator::copy_async(shared, global, bytes, true, site),
      if constexpr (bytes == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
      } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(shared)), "l"(global), "n"(bytes)
                     : "memory");
      });
}

FASTLM_PTX void copy_async_commit(Site site = Site::current()) {
  FASTLM_EITHER(emulator::copy_async_commit(site), asm volatile("cp.async.commit_group;" :: : "memory"));
}

// Until at most the last `left` groups of the thread are under way.
template <int left>
FASTLM_PTX void copy_async_wait(Site site = Site::current()) {
  FASTLM_EITHER(emulator::copy_async_wait(left, site), asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory"));
}

// ---- Words in global memory that other blocks poll or write meanwhile: past L1, no race, and in themselves no order.
// Each word is for itself, so that whoever reads it may do so with others or alone.

FASTLM_PTX uint32_t load_relaxed(const uint32_t* p, Site site = Site::current()) {
  FASTLM_EITHER(emulator::load_relaxed(p, site), {
    uint32_t x;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
  });
}

FASTLM_PTX uint2 load_relaxed_x2(const uint2* p, Site site = Site::current()) {
  FASTLM_EITHER(emulator::load_relaxed_x2(p, site), {
    uint2 x;
    asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(p) : "memory");
    return x;
  });
}

FASTLM_PTX uint4 load_relaxed_x4(const uint4* p, Site site = Site::current()) {
  FASTLM_EITHER(emulator::load_relaxed_x4(p, site), {
    uint4 x;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(p)
                 : "memory");
    return x;
  });
}

FASTLM_PTX void store_relaxed(uint32_t* p, uint32_t x, Site site = Site::current()) {
  FASTLM_EITHER(emulator::store_relaxed(p, x, site),
                asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory"));
}

FASTLM_PTX void store_relaxed(uint2* p, uint2 x, Site site = Site::current()) {
  FASTLM_EITHER(emulator::store_relaxed(p, x, site),
                asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(x.x), "r"(x.y) : "memory"));
}

// What was written before a release is seen after the acquire that reads its word.
FASTLM_PTX uint32_t load_acquire(const uint32_t* p, Site site = Site::current()) {
  FASTLM_EITHER(emulator::load_acquire(p, site), {
    uint32_t x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
  });
}

FASTLM_PTX void store_release(uint32_t* p, uint32_t x, Site site = Site::current()) {
  FASTLM_EITHER(emulator::store_release(p, x, site),
                asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory"));
}

// Plain loads past L1, which does not see what other blocks write.
FASTLM_PTX float load_l2(const float* p) {
  FASTLM_EITHER(*p, {
    float x;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(x) : "l"(p) : "memory");
    return x;
  });
}

FASTLM_PTX uint2 load_l2(const uint2* p) {
  FASTLM_EITHER((uint2{p->x, p->y}), {
    uint2 x;
    asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(p) : "memory");
    return x;
  });
}

FASTLM_PTX uint4 load_l2(const uint4* p) {
  FASTLM_EITHER((uint4{p->x, p->y, p->z, p->w}), {
    uint4 x;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(p)
                 : "memory");
    return x;
  });
}

// Relaxed, at the scope of the GPU; each gives the value before.
FASTLM_PTX uint32_t atomic_max(uint32_t* p, uint32_t x, Site site = Site::current()) {
  FASTLM_EITHER(emulator::atomic(p, [x](uint32_t old) { return old > x ? old : x; }, site), return atomicMax(p, x));
}

FASTLM_PTX uint32_t atomic_add(uint32_t* p, uint32_t x, Site site = Site::current()) {
  FASTLM_EITHER(emulator::atomic(p, [x](uint32_t old) { return old + x; }, site), return atomicAdd(p, x));
}

FASTLM_PTX uint32_t atomic_or(uint32_t* p, uint32_t x, Site site = Site::current()) {
  FASTLM_EITHER(emulator::atomic(p, [x](uint32_t old) { return old | x; }, site), return atomicOr(p, x));
}

// How long a loop waits for other blocks: without end, but in a build with FASTLM_BOUNDED_SPIN two seconds. It then
// says where, and every later wait ends at once, so that the kernel comes back, with results that are worth nothing.
struct Patience {
#if defined(FASTLM_BOUNDED_SPIN) && !defined(FASTLM_EMULATED)
  uint64_t since = 0;
  FASTLM_PTX bool ended(const char* what) {
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    if (since == 0) since = now;
    if (now - since < 2000000000 && *static_cast<volatile unsigned*>(&waited_in_vain) == 0) return false;
    if (atomicExch(&waited_in_vain, 1) == 0) printf("fastlm: block %u waited in vain for %s\n", blockIdx.x, what);
    return true;
  }
#else
  FASTLM_PTX bool ended(const char*) { return false; }
#endif
};

// ---- Clusters (sm_90)

FASTLM_PTX void cluster_arrive(Site site = Site::current()) {
  FASTLM_EITHER(emulator::cluster_arrive(site),
                FASTLM_SM90(__syncwarp(); asm volatile("barrier.cluster.arrive.release.aligned;" :: : "memory")));
}

FASTLM_PTX void cluster_wait(Site site = Site::current()) {
  FASTLM_EITHER(emulator::cluster_wait(site),
                FASTLM_SM90(asm volatile("barrier.cluster.wait.acquire.aligned;" :: : "memory")));
}

// All threads of the cluster meet; what was written in it before, to shared memory anywhere or to global, is seen.
FASTLM_PTX void cluster_sync(Site site = Site::current()) {
  FASTLM_EITHER(emulator::cluster_sync(site), {
    cluster_arrive();
    cluster_wait();
  });
}

FASTLM_PTX unsigned cluster_rank() {
  FASTLM_EITHER(emulator::cluster_rank(), {
    unsigned rank = 0;
    FASTLM_SM90(asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank)));
    return rank;
  });
}

// The same place in the shared memory of another block of the cluster, for plain loads and stores.
template <typename T>
FASTLM_PTX T* map_rank(T* mine, unsigned rank, Site site = Site::current()) {
  FASTLM_EITHER(static_cast<T*>(emulator::map_rank(mine, rank, site)), {
    T* theirs = nullptr;
    FASTLM_SM90(asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(mine), "r"(rank)));
    return theirs;
  });
}

// ---- Barriers in shared memory (sm_90): phase n ends when `count` arrivals and all bytes expected in it have come

FASTLM_PTX void mbarrier_init(uint64_t* barrier, unsigned count, Site site = Site::current()) {
  FASTLM_EITHER(emulator::mbarrier_init(barrier, count, site),
                FASTLM_SM90(asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                                         "r"(count) : "memory")));
}

// After mbarrier_init and before the cluster barrier that lets others, and asynchronous copies, reach the new barrier.
FASTLM_PTX void fence_mbarrier_init(Site site = Site::current()) {
  FASTLM_EITHER(emulator::fence_mbarrier_init(site),
                FASTLM_SM90(asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory")));
}

// One arrival, and `bytes` more to come in this phase by copy_bulk.
FASTLM_PTX void mbarrier_expect(uint64_t* barrier, unsigned bytes, Site site = Site::current()) {
  FASTLM_EITHER(
      emulator::mbarrier_expect(barrier, bytes, site),
      FASTLM_SM90(asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                               "r"(bytes) : "memory")));
}

// One arrival, at a barrier of this block or of another one of the cluster (map_rank).
FASTLM_PTX void mbarrier_arrive(uint64_t* barrier, Site site = Site::current()) {
  FASTLM_EITHER(emulator::mbarrier_arrive(barrier, site),
                FASTLM_SM90(asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                    shared_address(barrier)) : "memory")));
}

// Until the phase of this parity has ended: 0 for the first, 1 for the second, 0 for the third.
FASTLM_PTX void mbarrier_wait(uint64_t* barrier, unsigned parity, Site site = Site::current()) {
  FASTLM_EITHER(
      emulator::mbarrier_wait(barrier, parity, site), FASTLM_SM90({
        uint32_t done;
        do {
          asm volatile(
              "{\n.reg .pred done;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], %2;\n"
              "selp.u32 %0, 1, 0, done;\n}"
              : "=r"(done)
              : "r"(shared_address(barrier)), "r"(parity)
              : "memory");
        } while (done == 0);
      }));
}

// Copies `bytes` (a multiple of 16, as the addresses are) to the same place in each block of the cluster whose bit is
// set in `ranks`, and counts them at the same barrier of that block. One thread calls it.
FASTLM_PTX void copy_bulk(void* shared, const void* global, unsigned bytes, uint64_t* barrier, uint16_t ranks,
                          Site site = Site::current()) {
  FASTLM_EITHER(
      emulator::copy_bulk(shared, global, bytes, barrier, ranks, site),
      FASTLM_SM90(asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast"
                               "::cluster [%0], [%1], %2, [%3], %4;" ::"r"(shared_address(shared)),
                               "l"(global), "r"(bytes), "r"(shared_address(barrier)), "h"(ranks) : "memory")));
}

// Between ordinary accesses, of this thread or seen by it, and a copy_bulk from or to the same place.
FASTLM_PTX void fence_async(Site site = Site::current()) {
  FASTLM_EITHER(emulator::fence_async(site), FASTLM_SM90(asm volatile("fence.proxy.async;" :: : "memory")));
}

// ---- Arithmetic: one instruction each, denormal numbers flushed to zero

// 2 to the x, with a relative error of 2^-22; exp2f has three instructions more.
FASTLM_PTX float exp2(float x) {
  FASTLM_EITHER((x < -126.0f ? 0.0f : std::exp2(x)), {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  });
}

// 1 / x, with an error of one unit in the last place; 0 for infinity.
FASTLM_PTX float reciprocal(float x) {
  FASTLM_EITHER(1.0f / x, {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  });
}

// ---- Memory of a block

// Which of two buffers is this epoch's: a name, so that a test can take the second one away.
FASTLM_PTX unsigned side(unsigned epoch, Site site = Site::current()) {
  FASTLM_EITHER(emulator::side(epoch, site), return epoch & 1);
}

// All of the launch's dynamic shared memory, 128-byte aligned. There is no other.
FASTLM_PTX unsigned char* shared_memory() {
  FASTLM_EITHER(emulator::shared_memory(), {
    extern __shared__ __align__(128) unsigned char memory[];
    return memory;
  });
}

}  // namespace fastlm::ptx
