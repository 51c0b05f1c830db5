// The element types of kernels, for units that see no torch header.
#pragma once
#include <cstdint>

namespace fastlm {

enum class DType : int32_t { f32, bf16, f16 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

}  // namespace fastlm

// Runs the statement with `scalar_t` bound to the C++ type of a DType.
#define FASTLM_DISPATCH(dtype, ...)    \
  switch (dtype) {                     \
    case ::fastlm::DType::f32: {       \
      using scalar_t = float;          \
      __VA_ARGS__;                     \
      break;                           \
    }                                  \
    case ::fastlm::DType::bf16: {      \
      using scalar_t = ::fastlm::bf16; \
      __VA_ARGS__;                     \
      break;                           \
    }                                  \
    case ::fastlm::DType::f16: {       \
      using scalar_t = ::fastlm::f16;  \
      __VA_ARGS__;                     \
      break;                           \
    }                                  \
  }
