// csrc/lstm_backward.cu with the warps that are shipped, and kernels of one tiling.
#define FASTLM_LSTM_WARPS 8
#include "lstm.h"

namespace fastlm::lstm {
constexpr Tiling kOne[] = {kBackward[1]};
}
#define kBackward kOne
#include "lstm_backward.cpp"
