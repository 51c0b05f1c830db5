// In the ThreadSanitizer build alone, linked into _C in front of libtorch: the parallel-for on threads that the
// sanitizer sees. It knows nothing of libgomp's fork and join, so all that threads hand over through them would look
// like a race.
#ifndef FASTLM_ISA
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <exception>
#include <thread>
#include <vector>

namespace {
thread_local uint32_t thread_index = 0;
thread_local bool inside = false;
}  // namespace

// One piece a thread, all at the same time, as PyTorch's, whatever the grain: small shapes get threads too.
extern "C" AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, ParallelFunc body, void* context) {
  uint32_t wanted = 1;
  torch_get_num_threads(&wanted);
  const int64_t pieces = inside ? 1 : std::min<int64_t>(wanted, end - begin);
  std::vector<std::exception_ptr> errors(std::max<int64_t>(pieces, 0));
  const auto run = [&](int64_t piece) {
    const bool before = inside;
    if (pieces > 1) inside = true, thread_index = uint32_t(piece);
    try {
      body(begin + (end - begin) * piece / pieces, begin + (end - begin) * (piece + 1) / pieces, context);
    } catch (...) {
      errors[piece] = std::current_exception();
    }
    if (pieces > 1) inside = before, thread_index = 0;
  };
  std::vector<std::thread> threads;
  for (int64_t piece = 1; piece < pieces; ++piece) threads.emplace_back(run, piece);
  if (pieces > 0) run(0);
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors)
    if (error) std::rethrow_exception(error);
  return AOTI_TORCH_SUCCESS;
}

extern "C" AOTITorchError torch_get_thread_idx(uint32_t* index) {
  *index = thread_index;
  return AOTI_TORCH_SUCCESS;
}
#endif
