// Rows times a packed weight, for products that meet the same weight many times. A panel holds kCols columns of the
// weight, step by step of the inner dimension; a step is one 32-bit word a column: a float, or where the instruction
// set multiplies them, a pair of bf16. The left operand is one word a row and step.
#pragma once
#include "simd.h"

namespace fastlm::FASTLM_ISA {
namespace {

constexpr int64_t kVectors = 4, kCols = kVectors * kWidth;
#if defined(__AVX512F__)
constexpr int64_t kTile = 7;  // rows: 28 accumulators and 4 weights are all 32 registers
#elif defined(__aarch64__)
constexpr int64_t kTile = 6;
#else
constexpr int64_t kTile = 3;  // 12 accumulators of 16 registers
#endif
constexpr int64_t kBlock = 576;  // steps multiplied at a time: a panel's part stays in the second-level cache

// What an element is multiplied as.
template <typename T>
struct Operand {
  using type = float;
};
#if defined(__AVX512BF16__)
template <>
struct Operand<bf16> {
  using type = bf16;
};
#endif

template <typename E>
constexpr int64_t kPair = 4 / sizeof(E);  // elements of a word

template <typename E>
FASTLM_INLINE int64_t words(int64_t elements) {
  return (elements + kPair<E> - 1) / kPair<E>;
}

// acc += weights * x. The compiler would keep x in a register of its own, and there is none: hence the assembler.
template <typename E>
FASTLM_INLINE void multiply_add(vec& acc, vec weights, const E* x) {
#if defined(__AVX512F__)
  struct Word {
    E elements[kPair<E>];
  };
  const Word& word = *reinterpret_cast<const Word*>(x);
  if constexpr (sizeof(E) == 2)
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(weights), "m"(word));
  else
    asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(weights), "m"(word));
#else
  acc += weights * splat(*x);
#endif
}

// Where the words of the left operand are: word(i, step) is at x + i * row + step * step, counted in elements.
template <typename E>
struct RowMajor {
  const E* x;
  int64_t row;
  static constexpr int64_t step = kPair<E>;
};

template <typename E>
struct Interleaved {  // the rows of a tile side by side
  const E* x;
  static constexpr int64_t row = kPair<E>, step = kTile * kPair<E>;
};

// tile[i][j] (+)= sum over `count` steps of word(i, step) * panel word(step, j), for kRows rows and kUsed vectors of
// columns. Every block of steps starts from zero and is added as a whole: the error grows with the block and not with
// the sum. A function of its own: inlined, its accumulators would have to share the registers.
template <typename E, int kRows, int kUsed, typename Left>
__attribute__((noinline)) void multiply_block(Left left, const E* panel, int64_t count, const char* ahead, float* tile,
                                              bool add) {
  vec acc[kRows][kUsed] = {};
  for (int64_t step = 0; step < count; ++step) {
    const E* row = panel + step * kCols * kPair<E>;
    vec weights[kUsed];
#pragma GCC unroll 4
    for (int v = 0; v < kUsed; ++v) std::memcpy(&weights[v], row + v * kWidth * kPair<E>, sizeof(vec));
#pragma GCC unroll 4
    for (int64_t byte = 0; byte < kCols * 4; byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(row + 12 * kCols * kPair<E>) + byte);
    prefetch(ahead + step * 64);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kUsed; ++v) multiply_add(acc[i][v], weights[v], left.x + i * left.row + step * left.step);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kUsed; ++v) {
      float* out = tile + i * kCols + v * kWidth;
      store(out, add ? load(out) + acc[i][v] : acc[i][v]);
    }
}

template <typename E, int kRows, typename Left>
void multiply_vectors(Left left, const E* panel, int64_t count, int64_t vectors, const char* ahead, float* tile,
                      bool add) {
  switch (vectors) {
    case 1:
      return multiply_block<E, kRows, 1>(left, panel, count, ahead, tile, add);
    case 2:
      return multiply_block<E, kRows, 2>(left, panel, count, ahead, tile, add);
    case 3:
      return multiply_block<E, kRows, 3>(left, panel, count, ahead, tile, add);
    default:
      return multiply_block<E, kRows, 4>(left, panel, count, ahead, tile, add);
  }
}

// The same for a number of rows up to kTile and of vectors up to kVectors.
template <typename E, typename Left>
void multiply_tile(Left left, int64_t rows, const E* panel, int64_t count, int64_t vectors, const char* ahead,
                   float* tile, bool add) {
  switch (rows) {
    case 1:
      return multiply_vectors<E, 1>(left, panel, count, vectors, ahead, tile, add);
    case 2:
      return multiply_vectors<E, 2>(left, panel, count, vectors, ahead, tile, add);
    case 3:
      return multiply_vectors<E, 3>(left, panel, count, vectors, ahead, tile, add);
#if defined(__AVX512F__) || defined(__aarch64__)
    case 4:
      return multiply_vectors<E, 4>(left, panel, count, vectors, ahead, tile, add);
    case 5:
      return multiply_vectors<E, 5>(left, panel, count, vectors, ahead, tile, add);
    case 6:
      return multiply_vectors<E, 6>(left, panel, count, vectors, ahead, tile, add);
#endif
#if defined(__AVX512F__)
    case 7:
      return multiply_vectors<E, 7>(left, panel, count, vectors, ahead, tile, add);
#endif
  }
}

}  // namespace
}  // namespace fastlm::FASTLM_ISA
