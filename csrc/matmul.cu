// A product of float32 matrices with factors of 11 bits, whatever PyTorch's setting for matrices says: an LSTM follows
// its setting for recurrent layers, as cuDNN's does with all of its products.
#include "common.cuh"

// Of cuBLAS, which PyTorch brings along; null where it has another library.
extern "C" __attribute__((weak)) int cublasGemmEx(void* handle, int transpose_a, int transpose_b, int m, int n, int k,
                                                  const void* alpha, const void* a, int type_a, int pitch_a,
                                                  const void* b, int type_b, int pitch_b, const void* beta, void* c,
                                                  int type_c, int pitch_c, int compute, int algorithm);

namespace fastlm {
namespace {

constexpr int kFloat = 0, kTf32 = 77, kAnyAlgorithm = -1;  // CUDA_R_32F, CUBLAS_COMPUTE_32F_FAST_TF32, _GEMM_DEFAULT

// A matrix as the library takes it: rows or columns in a piece, at a distance from each other.
struct Operand {
  Tensor x;
  bool transposed;
  int64_t pitch;
};

Operand operand(const Tensor& x) {
  if (x.stride(1) == 1 && x.stride(0) >= x.size(1)) return {x, false, x.stride(0)};
  if (x.stride(0) == 1 && x.stride(1) >= x.size(0)) return {x, true, x.stride(1)};
  const Tensor whole = contiguous(x);
  return {whole, false, whole.size(1)};
}

}  // namespace

bool multiply_tf32(const Tensor& a_, const Tensor& b_, const Tensor& out) {
  const Operand a = operand(a_), b = operand(b_);
  const int64_t M = a_.size(0), K = a_.size(1), N = b_.size(1);
  if (M * N * K == 0 || cublasGemmEx == nullptr || std::max({M, N, K, a.pitch, b.pitch}) > INT32_MAX) return false;
  void* handle = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle));
  const float one = 1.0f, zero = 0.0f;
  // The library's matrices lie in columns: ours are their transposes, and so is the product, b^T a^T.
  const int status = cublasGemmEx(handle, b.transposed, a.transposed, int(N), int(M), int(K), &one,
                                  b.x.const_data_ptr(), kFloat, int(b.pitch), a.x.const_data_ptr(), kFloat,
                                  int(a.pitch), &zero, out.mutable_data_ptr(), kFloat, int(N), kTf32, kAnyAlgorithm);
  STD_TORCH_CHECK(status == 0, "cublasGemmEx failed with status ", status);
  return true;
}

namespace {

Tensor matmul_tf32(const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0), "a and b must be [M, K] and [K, N]");
  STD_TORCH_CHECK(a.scalar_type() == ScalarType::Float && b.scalar_type() == ScalarType::Float,
                  "a and b must be float32");
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  const Tensor out = torch::stable::new_empty(a, {a.size(0), b.size(1)});
  if (multiply_tf32(a, b, out)) return out;
  std::array<StableIValue, 2> stack{torch::stable::detail::from(a), torch::stable::detail::from(b)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_IMPL(fastlm, CUDA, m) { m.impl("matmul_tf32", TORCH_BOX(&fastlm::matmul_tf32)); }
