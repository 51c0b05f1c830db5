// csrc/qrnn_pool.cu under the emulator, on grids of `rows` rows, as many channels a thread as leave `busy` blocks.
#include "qrnn_pool.cu"

using namespace fastlm;

namespace {

template <typename T>
void run(QrnnPool<T>& a, int gates, bool forward, const int64_t* seed, double zoneout, int rows, int busy) {
  set_zoneout(a, seed, zoneout);
  launch(a, gates, forward, busy, [&](auto kernel, dim3 blocks, size_t shared) {
    emulator::launch({dim3(blocks.x, unsigned(rows)), kThreads, shared}, [&] {
      const QrnnPool<T> arguments = a;
      kernel(arguments);
    });
  });
}

}  // namespace

extern "C" void qrnn_pool_fwd(int dtype, int count, const void* gates, const void* c0, int wide, const int64_t* seed,
                              double zoneout, int reverse, void* h, void* c_n, float* kept, int64_t steps,
                              int64_t batch, int64_t hidden, int rows, int busy) {
  FASTLM_CUDA_DISPATCH(DType(dtype), {
    QrnnPool<scalar_t> a{};
    a.gates = static_cast<const scalar_t*>(gates);
    a.c0 = c0, a.wide = wide, a.reverse = reverse;
    a.h = static_cast<scalar_t*>(h);
    a.c_n = c_n, a.kept = kept;
    a.steps = steps, a.batch = batch, a.hidden = hidden;
    run(a, count, true, seed, zoneout, rows, busy);
  });
}

extern "C" void qrnn_pool_bwd(int dtype, int count, const void* dh, const void* dc_n, int wide, const void* gates,
                              float* kept, const int64_t* seed, double zoneout, int reverse, void* dgates, float* dc0,
                              int64_t steps, int64_t batch, int64_t hidden, int rows, int busy) {
  FASTLM_CUDA_DISPATCH(DType(dtype), {
    QrnnPool<scalar_t> a{};
    a.gates = static_cast<const scalar_t*>(gates), a.dh = static_cast<const scalar_t*>(dh);
    a.dc_n = dc_n, a.wide = wide, a.reverse = reverse;
    a.kept = kept, a.dc0 = dc0;
    a.dgates = static_cast<scalar_t*>(dgates);
    a.steps = steps, a.batch = batch, a.hidden = hidden;
    run(a, count, false, seed, zoneout, rows, busy);
  });
}
