// fastlm._host: how the persistent LSTM would be launched, on any GPU and for many sizes at once.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <iterator>

#include "lstm_plan.h"

namespace py = pybind11;

namespace {

using namespace fastlm::lstm;

constexpr int kFields = 15;
using Sizes = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

std::array<int64_t, kFields> fields_of(const Plan& p) {
  const Tiling& t = p.tiling;
  return {int64_t(std::ceil(p.nanoseconds)),
          t.tiles,
          t.kept,
          t.wave,
          t.columns,
          p.units,
          p.slices,
          p.groups,
          p.replicas,
          p.passes,
          p.depth,
          p.sides,
          p.cluster,
          p.blocks(),
          p.shared};
}

py::array_t<int64_t> lstm_plans(bool backward, bool split, int exchange, bool clusters, int multiprocessors, int shared,
                                const std::array<int, 5>& cluster_counts, const Sizes& hidden, const Sizes& batch) {
  const auto check = [](bool right, const char* what) {
    if (!right) throw py::value_error(what);
  };
  const auto sizes = [](const Sizes& x) {
    return std::all_of(x.data(), x.data() + x.size(), [](int64_t n) { return n > 0 && n < INT32_MAX; });
  };
  check(exchange >= 0 && exchange <= int(Exchange::cluster), "exchange must be 0 to 4");
  check(multiprocessors > 0 && shared >= 0, "multiprocessors must be positive, shared not negative");
  check(std::ranges::min(cluster_counts) >= 0, "cluster_counts must not be negative");
  check(hidden.ndim() == 1 && batch.ndim() == 1 && hidden.size() == batch.size(),
        "hidden and batch must have one dimension and the same length");
  check(sizes(hidden) && sizes(batch), "hidden and batch must be positive and below 2^31 - 1");
  Device device{multiprocessors, shared, {}};
  std::ranges::copy(cluster_counts, device.clusters);
  py::array_t<int64_t> plans({hidden.size(), py::ssize_t(kFields)});
  const int64_t *H = hidden.data(), *B = batch.data(), count = hidden.size();
  int64_t* out = plans.mutable_data();
  const py::gil_scoped_release release;
  for (int64_t i = 0; i < count; ++i) {
    const Plan p = backward ? plan_backward(H[i], B[i], split, Exchange(exchange), clusters, device)
                            : plan_forward(H[i], B[i], split, Exchange(exchange), device);
    out = std::ranges::copy(fields_of(p), out).out;
  }
  return plans;
}

}  // namespace

void define_lstm_plans(py::module_& m) {
  m.attr("LSTM_PLAN_FIELDS") =
      py::make_tuple("nanoseconds", "tiles", "kept", "wave", "columns", "units", "slices", "groups", "replicas",
                     "passes", "depth", "sides", "cluster", "blocks", "shared");
  m.def("lstm_plans", &lstm_plans, py::arg("backward"), py::arg("split"), py::arg("exchange"), py::arg("clusters"),
        py::arg("multiprocessors"), py::arg("shared"), py::arg("cluster_counts"), py::arg("hidden"), py::arg("batch"),
        "Plans of the persistent LSTM on a GPU for pairs of sizes -> int64 [N, fields], zeros where there is none.\n\n"
        "exchange: a number of csrc/lstm_plan.h; shared: bytes a block may have; cluster_counts: how many clusters of\n"
        "1, 2, 4, 8 and 16 blocks run at once. Raises ValueError for what no device or layer is.");
}
