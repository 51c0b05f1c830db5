// Kernels built once per instruction set, and the choice among them at load time.
#pragma once

namespace fastlm {

int instruction_set();  // 0 baseline, 1 avx2, 2 avx512, 3 avx512_bf16

}  // namespace fastlm

// Declares `name` in the namespace of each instruction set and a pointer `name##_kernel` to the one of this
// machine.
#if defined(__x86_64__)
#define FASTLM_KERNEL(name, ret, ...)                                                            \
  namespace fastlm::baseline {                                                                   \
  ret name(__VA_ARGS__);                                                                         \
  }                                                                                              \
  namespace fastlm::avx2 {                                                                       \
  ret name(__VA_ARGS__);                                                                         \
  }                                                                                              \
  namespace fastlm::avx512 {                                                                     \
  ret name(__VA_ARGS__);                                                                         \
  }                                                                                              \
  namespace fastlm::avx512_bf16 {                                                                \
  ret name(__VA_ARGS__);                                                                         \
  }                                                                                              \
  namespace fastlm {                                                                             \
  static ret (*const name##_kernel)(__VA_ARGS__) = instruction_set() == 3   ? &avx512_bf16::name \
                                                   : instruction_set() == 2 ? &avx512::name      \
                                                   : instruction_set() == 1 ? &avx2::name        \
                                                                            : &baseline::name;   \
  }
#else
#define FASTLM_KERNEL(name, ret, ...)                               \
  namespace fastlm::baseline {                                      \
  ret name(__VA_ARGS__);                                            \
  }                                                                 \
  namespace fastlm {                                                \
  static ret (*const name##_kernel)(__VA_ARGS__) = &baseline::name; \
  }
#endif
