// What the host functions of all operators share: tensors, checks, dtypes. LibTorch stable ABI only.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <optional>
#include <tuple>

#include "dtype.h"
#include "isa.h"

namespace fastlm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
  }
}

// Raw pointers need contiguous inputs: autograd hands in expanded gradients with stride 0.
using torch::stable::contiguous;

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& x) {
  return x.has_value() ? std::optional<Tensor>(torch::stable::contiguous(*x)) : std::nullopt;
}

inline uint64_t read_seed(const Tensor& seed) {
  STD_TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long, "seed must be an int64 scalar tensor");
  return uint64_t(*static_cast<const int64_t*>(seed.const_data_ptr()));
}

// Ask for huge pages under a large new tensor: at 4 KB a page the first touch costs as much as a memory-bound kernel.
inline void prefer_huge_pages(const Tensor& x) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(x.mutable_data_ptr());
  const uintptr_t end = begin + uintptr_t(x.numel()) * x.element_size();
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (first + kPage <= last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

inline const void* data(const std::optional<Tensor>& x) { return x.has_value() ? x->const_data_ptr() : nullptr; }

}  // namespace fastlm
