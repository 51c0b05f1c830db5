// Which instruction set the CPU kernels run with: the best that machine and build have, or what FASTLM_CPU
// names.
#include "isa.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace fastlm {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

int best() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? (__builtin_cpu_supports("avx512bf16") ? 3 : 2) : avx2 ? 1 : 0;
#else
  return 0;
#endif
}

int choose() {
  const char* wanted = std::getenv("FASTLM_CPU");
  const int top = best();
  if (wanted == nullptr || *wanted == '\0') return top;
  for (int i = 0; i <= top; ++i)
    if (std::strcmp(wanted, kNames[i]) == 0) return i;
  std::fprintf(stderr, "fastlm: FASTLM_CPU=%s is not something this CPU has; using %s\n", wanted, kNames[top]);
  return top;
}

}  // namespace

int instruction_set() {
  static const int chosen = choose();
  return chosen;
}

}  // namespace fastlm

extern "C" __attribute__((visibility("default"))) int fastlm_instruction_set() { return fastlm::instruction_set(); }
