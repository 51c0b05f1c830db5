// What the emulated kernels need of the CUDA runtime's header, so that no toolkit is needed to run them on a CPU.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
#define __shared__ static_assert(false, "shared memory is ptx::shared_memory()")

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Aligned as on a GPU, where a vector is one access and traps elsewhere.
#define FASTLM_VECTORS(scalar, name)                                            \
  struct alignas(2 * sizeof(scalar)) name##2 { scalar x, y; };                  \
  struct alignas(4 * sizeof(scalar)) name##4 { scalar x, y, z, w; };            \
  __forceinline__ name##2 make_##name##2(scalar x, scalar y) { return {x, y}; } \
  __forceinline__ name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
FASTLM_VECTORS(float, float)
FASTLM_VECTORS(int, int)
FASTLM_VECTORS(unsigned, uint)
#undef FASTLM_VECTORS

template <typename To, typename From>
__forceinline__ To fastlm_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

__forceinline__ unsigned __float_as_uint(float x) { return fastlm_bits<unsigned>(x); }
__forceinline__ int __float_as_int(float x) { return fastlm_bits<int>(x); }
__forceinline__ float __uint_as_float(unsigned x) { return fastlm_bits<float>(x); }
__forceinline__ float __int_as_float(int x) { return fastlm_bits<float>(x); }
__forceinline__ unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t{a} * b >> 32); }
__forceinline__ int __popc(unsigned x) { return __builtin_popcount(x); }
__forceinline__ int __ffs(int x) { return __builtin_ffs(x); }
__forceinline__ int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
__forceinline__ float __expf(float x) { return expf(x); }
__forceinline__ float __logf(float x) { return logf(x); }
__forceinline__ float __fdividef(float x, float y) { return x / y; }
__forceinline__ float __frcp_rn(float x) { return 1.0f / x; }
__forceinline__ float __fmul_rn(float x, float y) { return x * y; }
__forceinline__ float __fadd_rn(float x, float y) { return x + y; }
__forceinline__ float rsqrtf(float x) { return 1.0f / sqrtf(x); }

template <typename T>
__forceinline__ T __ldg(const T* p) {
  return *p;
}

template <typename T>
__forceinline__ T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
__forceinline__ T max(T a, T b) {
  return a < b ? b : a;
}
__forceinline__ float min(float a, float b) { return fminf(a, b); }
__forceinline__ float max(float a, float b) { return fmaxf(a, b); }
