// bfloat16 for the emulated kernels: the names of CUDA's header that they use.
#pragma once
#include "cuda_runtime.h"

struct __nv_bfloat16_raw {
  unsigned short x;
};

struct __nv_bfloat16 {
  unsigned short bits;
  __nv_bfloat16() = default;
  __forceinline__ __nv_bfloat16(__nv_bfloat16_raw raw) : bits(raw.x) {}
};

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

__forceinline__ float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }

__forceinline__ __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned bits = __float_as_uint(x), even = bits >> 16 & 1;
  return __nv_bfloat16_raw{static_cast<unsigned short>(x != x ? 0x7FFF : (bits + 0x7FFF + even) >> 16)};
}

__forceinline__ __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }
__forceinline__ __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) { return __nv_bfloat16_raw{x}; }
__forceinline__ unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
__forceinline__ __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
__forceinline__ __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
__forceinline__ float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }
__forceinline__ float __low2float(__nv_bfloat162 v) { return __bfloat162float(v.x); }
__forceinline__ float __high2float(__nv_bfloat162 v) { return __bfloat162float(v.y); }
