// csrc/lstm_forward.cu with the warps that are shipped. Plans are of all tilings, kernels of one: they take long to
// compile.
#define FASTLM_LSTM_WARPS 8
#include "lstm.h"

namespace fastlm::lstm {
constexpr Tiling kOne[] = {kForward[2]};
}
#define kForward kOne
#define kMulticast kOne
#define kCluster kOne
#include "lstm_forward.cpp"
