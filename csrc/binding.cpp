// The one file that knows Python: integers in (addresses, sizes, codes), kernels called without the
// GIL. No tensors cross here: binding five of them costs 10 us a call, as integers 0.3 us.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <string>

#include "kernels.h"

namespace nb = nanobind;

namespace {

using Address = uintptr_t;

const nw::Kernels* selected = nullptr;

// Scratch of the calling thread, kept between calls up to 4 MiB: a fresh allocation of that size
// costs page faults each time.
class Scratch {
 public:
  void* take(int64_t bytes) {
    if (size_t(bytes) > capacity_) {
      const size_t rounded = (size_t(bytes) + 4095) / 4096 * 4096;
      void* fresh = std::aligned_alloc(64, rounded);
      if (!fresh) throw std::bad_alloc();
      memory_.reset(fresh);
      capacity_ = rounded;
    }
    return memory_.get();
  }
  void done() {
    if (capacity_ > (size_t(4) << 20)) {
      memory_.reset();
      capacity_ = 0;
    }
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t capacity_ = 0;
};
thread_local Scratch scratch;

void run(void (*kernel)(const nw::Call&), nw::Call& call) {
  // The fused backward's sums are nobody's result: they live at the head of the scratch.
  const bool own_sums = call.dy && call.moments && !call.sums;
  const int64_t head = own_sums ? (2 * call.channels * 8 + 63) / 64 * 64 : 0;
  char* memory = static_cast<char*>(scratch.take(head + selected->scratch_bytes(call)));
  if (own_sums) call.sums = reinterpret_cast<double*>(memory);
  call.scratch = memory + head;
  {
    nb::gil_scoped_release release;
    kernel(call);
  }
  scratch.done();
}

nw::Call block(int64_t outer, int64_t channels, int64_t inner, int dtype) {
  nw::Call call;
  call.outer = outer;
  call.channels = channels;
  call.inner = inner;
  call.dtype = dtype;
  return call;
}
nw::Vector vector(Address data, int dtype) {
  return {reinterpret_cast<const void*>(data), dtype};
}
template <class T = void> T* at(Address a) { return reinterpret_cast<T*>(a); }

void moments(Address x, int64_t outer, int64_t channels, int64_t inner, int dtype, Address out) {
  nw::Call call = block(outer, channels, inner, dtype);
  call.x = at(x);
  call.moments = at<double>(out);
  run(selected->moments, call);
}

// Exactly one of `moments` (written: training) and `mean` with `var` (read) is given.
void forward(Address x, Address y, Address residual, int64_t outer, int64_t channels, int64_t inner,
             int dtype, Address weight, int weight_dtype, Address bias, int bias_dtype, double eps,
             int activation, double slope, Address moments, Address mean, int mean_dtype,
             Address var, int var_dtype) {
  nw::Call call = block(outer, channels, inner, dtype);
  call.x = at(x);
  call.y = at(y);
  call.residual = at(residual);
  call.weight = vector(weight, weight_dtype);
  call.bias = vector(bias, bias_dtype);
  call.eps = eps;
  call.activation = activation;
  call.slope = slope;
  call.moments = at<double>(moments);
  call.mean = vector(mean, mean_dtype);
  call.var = vector(var, var_dtype);
  run(moments ? selected->train_forward : selected->normalize, call);
}

// With `moments` the fused training backward; without, backward_input if `dx` is given, else
// backward_reduce.
void backward(Address dy, Address x, Address residual, Address output, Address dx,
              Address dresidual, int64_t outer, int64_t channels, int64_t inner, int dtype,
              Address weight, int weight_dtype, Address bias, int bias_dtype, double eps,
              int activation, double slope, Address moments, Address mean, int mean_dtype,
              Address var, int var_dtype, Address sums, double count, Address dweight,
              Address dbias) {
  nw::Call call = block(outer, channels, inner, dtype);
  call.dy = at(dy);
  call.x = at(x);
  call.residual = at(residual);
  call.output = at(output);
  call.dx = at(dx);
  call.dresidual = at(dresidual);
  call.weight = vector(weight, weight_dtype);
  call.bias = vector(bias, bias_dtype);
  call.eps = eps;
  call.activation = activation;
  call.slope = slope;
  call.moments = at<double>(moments);
  call.mean = vector(mean, mean_dtype);
  call.var = vector(var, var_dtype);
  call.sums = at<double>(sums);
  call.count = count;
  call.dweight = at(dweight);
  call.dbias = at(dbias);
  run(moments ? selected->train_backward
              : (dx ? selected->backward_input : selected->backward_reduce),
      call);
}

void update_running(int64_t channels, Address moments, Address mean, int mean_dtype, Address var,
                    int var_dtype, Address tracked, Address nonfinite, double momentum,
                    bool skip_nonfinite) {
  nw::RunningUpdate u;
  u.channels = channels;
  u.moments = at<double>(moments);
  u.mean = at(mean);
  u.var = at(var);
  u.mean_dtype = mean_dtype;
  u.var_dtype = var_dtype;
  u.tracked = at<int64_t>(tracked);
  u.nonfinite = at<int64_t>(nonfinite);
  u.momentum = momentum;
  u.skip_nonfinite = skip_nonfinite;
  nw::update_running(u);
}

nb::list instruction_sets() {
  nb::list names;
  for (int i = 0; i < nw::instruction_set_count(); ++i) names.append(nw::instruction_set(i)->name);
  return names;
}

void use(const std::string& name) {
  for (int i = 0; i < nw::instruction_set_count(); ++i)
    if (name == nw::instruction_set(i)->name) {
      selected = nw::instruction_set(i);
      return;
    }
  throw nb::value_error(("no instruction set " + name + " on this processor").c_str());
}

}  // namespace

NB_MODULE(_native, m) {
  selected = nw::instruction_set(nw::instruction_set_count() - 1);
  m.def("moments", &moments);
  m.def("forward", &forward);
  m.def("backward", &backward);
  m.def("update_running", &update_running);
  m.def("instruction_sets", &instruction_sets);
  m.def("instruction_set", [] { return selected->name; });
  m.def("select", &use);
  m.def("set_parallel_for",
        [](Address f) { nw::parallel_for = reinterpret_cast<nw::ParallelFor>(f); });
  m.def("set_thread_count",
        [](Address f) { nw::thread_count = reinterpret_cast<nw::ThreadCount>(f); });
  m.def("has_parallel_for", [] { return nw::parallel_for != nullptr; });
}
