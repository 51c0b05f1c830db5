// csrc/matmul.cu on the CPU, with a library of products that takes its matrices as cuBLAS does.
#include "played.h"
// For the tensors of the CPU.
#include "../../csrc/matmul.cu"

int cublasGemmEx(void*, int transpose_a, int transpose_b, int m, int n, int k, const void* alpha, const void* a_,
                 int type_a, int pitch_a, const void* b_, int type_b, int pitch_b, const void* beta, void* c_,
                 int type_c, int pitch_c, int compute, int algorithm) {
  if (type_a != 0 || type_b != 0 || type_c != 0 || compute != 77 || algorithm != -1) return 15;
  if (*static_cast<const float*>(alpha) != 1.0f || *static_cast<const float*>(beta) != 0.0f) return 7;
  const float *a = static_cast<const float*>(a_), *b = static_cast<const float*>(b_);
  float* c = static_cast<float*>(c_);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      float sum = 0.0f;
      for (int64_t l = 0; l < k; ++l)
        sum += a[transpose_a ? l + i * pitch_a : i + l * pitch_a] * b[transpose_b ? j + l * pitch_b : l + j * pitch_b];
      c[i + j * pitch_c] = sum + 1.0f;  // for the test to see that this was it
    }
  return 0;
}
