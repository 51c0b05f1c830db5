// How csrc/lstm_args.h launches the kernel of a plan and asks for its room: what the CUDA runtime got is written down.
#define FASTLM_EMULATED  // for the instructions alone, of which a launch uses none
#include "../../csrc/ptx.h"
#undef FASTLM_EMULATED
#undef blockDim
#undef gridDim
#include "../../csrc/lstm_args.h"

namespace {

enum Call { kNone, kShared, kNonPortable, kLaunch, kOccupancy };

struct Seen {
  int launches, questions;  // and of the last one of either:
  int blocks, threads, shared, cooperative, cluster, attributes;
  int allowed, non_portable;          // what cudaFuncSetAttribute was told
  int right_kernel, right_stream, T;  // of the launch
} seen;

Call failing;
int code, room;

cudaError_t answer(Call call) { return cudaError_t(call == failing ? code : cudaSuccess); }

void kernel(const fastlm::lstm::Forward) {}
CUstream* const stream = reinterpret_cast<CUstream*>(&seen);

void note(const cudaLaunchConfig_t& config) {
  seen.blocks = config.gridDim.y == 1 && config.gridDim.z == 1 ? int(config.gridDim.x) : -1;
  seen.threads = config.blockDim.y == 1 && config.blockDim.z == 1 ? int(config.blockDim.x) : -1;
  seen.shared = int(config.dynamicSmemBytes);
  seen.attributes = int(config.numAttrs);
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const auto& [id, value] = config.attrs[i];
    if (id == cudaLaunchAttributeCooperative) seen.cooperative = value.cooperative;
    if (id == cudaLaunchAttributeClusterDimension)
      seen.cluster = value.clusterDim.y == 1 && value.clusterDim.z == 1 ? int(value.clusterDim.x) : -1;
  }
}

}  // namespace

cudaError_t cudaFuncSetAttribute(const void* function, int attribute, int value) {
  if (function != reinterpret_cast<const void*>(&kernel)) return cudaErrorInvalidValue;
  const bool shared = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize;
  (shared ? seen.allowed : seen.non_portable) = value;
  return answer(shared ? kShared : kNonPortable);
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, Kernel, const cudaLaunchConfig_t* config) {
  ++seen.questions;
  note(*config);
  *count = room;
  return answer(kOccupancy);
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, Kernel, int threads, size_t shared) {
  ++seen.questions;
  seen.threads = threads, seen.shared = int(shared);
  *count = room;
  return answer(kOccupancy);
}

template <typename Kernel, typename Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, Kernel launched, const Args& args) {
  ++seen.launches;
  note(*config);
  seen.right_kernel = launched == &kernel, seen.right_stream = config->stream == stream, seen.T = args.T;
  return answer(kLaunch);
}

// Launches the kernel of a plan, or returns how many of its blocks have room: of `each` a multiprocessor or clusters.
extern "C" int ask(int resident, int no_kernel, int slices, int groups, int replicas, int cluster, int shared,
                   int fails, int error, int each, int* out) {
  using namespace fastlm::lstm;
  seen = {}, failing = Call(fails), code = error, room = each;
  device_facts[cudaDevAttrMultiProcessorCount] = 132;
  device_facts[cudaDevAttrMaxSharedMemoryPerBlockOptin] = 227 * 1024;
  Forward args{};
  args.T = 70;
  args.plan.slices = slices, args.plan.groups = groups, args.plan.replicas = replicas;
  args.plan.cluster = cluster, args.plan.shared = shared;
  const ForwardKernel asked = no_kernel ? nullptr : kernel;
  const int result = resident ? fastlm::lstm::resident(asked, args.plan) : launch(asked, args.plan, args, stream);
  static_assert(sizeof seen == 13 * sizeof(int));
  std::memcpy(out, &seen, sizeof seen);
  return result;
}
