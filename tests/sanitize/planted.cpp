// Bugs on purpose, compiled like an operator: what a sanitizer does not report here, it would not report elsewhere.
#include <cstdint>

namespace fastlm {
enum class Planted : int64_t {  // in the order of planted.py
  nothing,                      // a piece waits for the other and reads what it wrote: correct
  vector_read,
  partial_read,
  vector_write,
  stream_write,
  stack,
  overflow,
  shift,
  race,
  vector_race,
  relaxed_flag,
};

struct PlantedArgs {
  float* x;
  int64_t count;
  Planted bug;
  int* ready;
};
}  // namespace fastlm

#ifdef FASTLM_ISA
#include "simd.h"

namespace fastlm::FASTLM_ISA {

// Pieces 0 and 1, each on a thread of its own.
void planted(const PlantedArgs& a, int64_t begin, int64_t end) {
  float* x = a.x;
  for (int64_t piece = begin; piece < end; ++piece) {
    switch (a.bug) {
      case Planted::nothing:
      case Planted::relaxed_flag: {
        const bool nothing = a.bug == Planted::nothing;
        if (piece == 0) {
          store(x, splat(1.0f));
          __atomic_store_n(a.ready, 1, nothing ? __ATOMIC_RELEASE : __ATOMIC_RELAXED);
        } else {
          while (__atomic_load_n(a.ready, nothing ? __ATOMIC_ACQUIRE : __ATOMIC_RELAXED) == 0) {
          }
          store(x + kWidth, load(x));
        }
        break;
      }
      case Planted::vector_read:
        if (piece == 0) store(x, load(x + a.count - kWidth + 1));
        break;
      case Planted::partial_read:
        if (piece == 0) store(x, load(x + a.count - 1, 2));
        break;
      case Planted::vector_write:
        if (piece == 0) store(x + a.count - kWidth + 1, load(x));
        break;
      case Planted::stream_write:
        if (piece == 0) stream(x + a.count - kWidth + 1, load(x));
        break;
      case Planted::stack: {
        float tile[64];
        store(tile, load(x));
        const float* past = tile + a.count;
        asm("" : "+r"(past));  // else the bounds of the type are what is reported
        x[piece] = past[piece];
        break;
      }
      case Planted::overflow:
        x[piece] = float(int32_t(a.count) + INT32_MAX);
        break;
      case Planted::shift:
        x[piece] = float(int32_t(1) << a.count);
        break;
      case Planted::race:
        x[0] = float(piece);
        break;
      case Planted::vector_race:
        store(x, splat(float(piece)));
        break;
    }
  }
}

}  // namespace fastlm::FASTLM_ISA

#else
#include "common.h"

FASTLM_KERNEL(planted, void, const PlantedArgs&, int64_t, int64_t)

namespace fastlm {
namespace {

// With the kernel of any instruction set that this machine has, not only the one chosen at load.
void run(const Tensor& x, int64_t bug, int64_t set) {
#if defined(__x86_64__)
  constexpr decltype(planted_kernel) kKernels[] = {&baseline::planted, &avx2::planted, &avx512::planted,
                                                   &avx512_bf16::planted};
#else
  constexpr decltype(planted_kernel) kKernels[] = {&baseline::planted};
#endif
  int ready = 0;
  const PlantedArgs args{static_cast<float*>(x.mutable_data_ptr()), x.numel(), Planted{bug}, &ready};
  torch::stable::parallel_for(0, 2, 1, [&](int64_t begin, int64_t end) { kKernels[set](args, begin, end); });
}

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_FRAGMENT(fastlm, m) { m.def("planted(Tensor x, int bug, int set) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) { m.impl("planted", TORCH_BOX(&fastlm::run)); }
#endif
