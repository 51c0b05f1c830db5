// float16 for the emulated kernels: the names of CUDA's header that they use, with the CPU's own conversions.
#pragma once
#include "cuda_runtime.h"
#ifdef __F16C__
#include <immintrin.h>
#endif

struct __half_raw {
  unsigned short x;
};

struct __half {
  unsigned short bits;
  __half() = default;
  __forceinline__ __half(__half_raw raw) : bits(raw.x) {}
};

struct alignas(4) __half2 {
  __half x, y;
};

__forceinline__ float __half2float(__half x) {
#ifdef __F16C__
  return _cvtsh_ss(x.bits);
#else
  return float(fastlm_bits<_Float16>(x.bits));
#endif
}

__forceinline__ __half __float2half_rn(float x) {
#ifdef __F16C__
  return __half_raw{_cvtss_sh(x, 0)};
#else
  return __half_raw{fastlm_bits<unsigned short>(_Float16(x))};
#endif
}

__forceinline__ __half __float2half(float x) { return __float2half_rn(x); }
__forceinline__ __half __ushort_as_half(unsigned short x) { return __half_raw{x}; }
__forceinline__ unsigned short __half_as_ushort(__half x) { return x.bits; }
__forceinline__ __half2 __halves2half2(__half x, __half y) { return {x, y}; }
__forceinline__ __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
__forceinline__ __half2 __float22half2_rn(float2 v) { return __floats2half2_rn(v.x, v.y); }
__forceinline__ float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
__forceinline__ float __low2float(__half2 v) { return __half2float(v.x); }
__forceinline__ float __high2float(__half2 v) { return __half2float(v.y); }
