// The one file that knows Python: tensors in, read through DLPack's C exchange interface, kernels
// called without the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>

#include "kernels.h"
#include "operands.h"

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

using Kernel = void (*nw::Kernels::*)(const nw::Call&);

void run(Kernel which, nw::Call& call) {
  const nw::Kernels* const kernels = call.mask ? selected->masked : selected;
  const auto kernel = kernels->*which;
  // The fused backward's sums are nobody's result: they live at the head of the scratch.
  const bool own_sums = call.dy && (call.moments || call.constant) && !call.sums;
  const int64_t head = own_sums ? (2 * call.channels * 8 + 63) / 64 * 64 : 0;
  char* memory = static_cast<char*>(scratch.take(head + kernels->scratch_bytes(call)));
  if (own_sums) call.sums = reinterpret_cast<double*>(memory);
  call.scratch = memory + head;
  // Handing over the interpreter costs as much as a small batch does.
  if (call.outer * call.channels * call.inner < 16384) {
    kernel(call);
  } else {
    nb::gil_scoped_release release;
    kernel(call);
  }
  scratch.done();
}

const nw::dlpack::ExchangeApi* exchange = nullptr;

// The operands of one call. Each function says whether the tensor is there (or None where that is
// allowed) and fits; the kernels run only if all did. Nothing is reported: the caller brings what
// does not fit into shape, or takes another backend, which explains.
class Operands {
 public:
  nw::Call call;
  bool fit = true;

  void block(nb::handle x, int64_t channel_dim) {
    fit = view(x, x_) && nw::set_block(call, x_, channel_dim);
    call.x = nw::address(x_);
  }
  void mask(nb::handle t, int64_t channel_dim) {
    nw::dlpack::Tensor v;
    if (t.is_none()) return;
    fit = fit && view(t, v) && nw::mask_of_block(v, x_, channel_dim) &&
          (call.inner == 1 || call.inner >= nw::kMaskedRun);
    if (fit) call.mask = static_cast<const uint8_t*>(nw::address(v));
  }
  // The size of axis `d` if it is the outermost in memory (and not the channels'), else 0.
  int64_t outermost(int64_t d) const {
    for (int k = 0; k < x_.ndim; ++k)
      if (k != d && x_.shape[k] != 1 && x_.strides[k] > x_.strides[d]) return 0;
    return x_.shape[d];
  }
  void channels_of(nb::handle vector) {
    nw::dlpack::Tensor v;
    fit = view(vector, v) && v.ndim == 1;
    call.channels = fit ? v.shape[0] : 0;
  }
  void* like(nb::handle t) {
    nw::dlpack::Tensor v;
    if (t.is_none()) return nullptr;
    fit = fit && view(t, v) && nw::same_block(v, x_);
    return fit ? nw::address(v) : nullptr;
  }
  nw::Vector vector(nb::handle t) {
    nw::dlpack::Tensor v;
    if (t.is_none()) return {};
    fit = fit && view(t, v) && v.ndim == 1 && nw::packed(v, call.channels);
    const int dtype = fit ? nw::dtype_code(v.dtype) : -1;
    fit = dtype >= 0;
    return fit ? nw::Vector{nw::address(v), dtype} : nw::Vector{};
  }
  double* rows(nb::handle t, int64_t count) {
    nw::dlpack::Tensor v;
    if (t.is_none()) return nullptr;
    fit = fit && view(t, v) && nw::packed(v, count * call.channels) &&
          nw::dtype_code(v.dtype) == nw::kFloat64;
    return fit ? static_cast<double*>(nw::address(v)) : nullptr;
  }
  int64_t* counter(nb::handle t) {
    nw::dlpack::Tensor v;
    if (t.is_none()) return nullptr;
    fit = fit && view(t, v) && nw::packed(v, 1) && v.dtype.code == 0 && v.dtype.bits == 64;
    return fit ? static_cast<int64_t*>(nw::address(v)) : nullptr;
  }

 private:
  nw::dlpack::Tensor x_{};

  static bool view(nb::handle t, nw::dlpack::Tensor& out) {
    if (exchange->tensor_from_object(t.ptr(), &out) == 0) return true;
    PyErr_Clear();
    return false;
  }
};

bool moments(nb::handle x, nb::handle mask, int64_t channel_dim, nb::handle out) {
  Operands o;
  o.block(x, channel_dim);
  o.mask(mask, channel_dim);
  o.call.moments = o.rows(out, 3);
  if (o.fit) run(&nw::Kernels::moments, o.call);
  return o.fit;
}

// Training writes `moments`; eval reads `mean` and `var`, with `moments` None.
bool forward(nb::handle x, nb::handle y, nb::handle moments, nb::handle mean, nb::handle var,
             nb::handle weight, nb::handle bias, nb::handle residual, nb::handle mask,
             int64_t channel_dim, double eps, int activation, double slope) {
  Operands o;
  o.block(x, channel_dim);
  o.mask(mask, channel_dim);
  o.call.y = o.like(y);
  o.call.moments = o.rows(moments, 3);
  o.call.mean = o.vector(mean);
  o.call.var = o.vector(var);
  o.call.weight = o.vector(weight);
  o.call.bias = o.vector(bias);
  o.call.residual = o.like(residual);
  o.call.eps = eps;
  o.call.activation = activation;
  o.call.slope = slope;
  if (o.fit) run(o.call.moments ? &nw::Kernels::train_forward : &nw::Kernels::normalize, o.call);
  return o.fit;
}

// Ghost batches: `size` samples at a time are a batch of their own, the last may be smaller. The
// batch axis is the outermost in memory, so each is a block of its own, one after the other.
struct Ghosts {
  Operands o;
  int64_t samples = 0, size = 0, count = 0, element = 0;

  void block(nb::handle x, int64_t channel_dim, int64_t batch_dim, int64_t ghost_size) {
    o.block(x, channel_dim);
    samples = o.fit ? o.outermost(batch_dim) : 0;
    o.fit = o.fit && samples > 0;
    if (!o.fit) return;
    size = ghost_size;
    count = (samples + size - 1) / size;
    element = o.call.dtype == nw::kFloat64 ? 8 : o.call.dtype == nw::kFloat32 ? 4 : 2;
  }
  // The call of ghost g; with one channel the samples are in `inner`, else in `outer`.
  nw::Call part(int64_t g) const {
    nw::Call call = o.call;
    const int64_t begin = g * size, length = begin + size <= samples ? size : samples - begin;
    int64_t& axis = call.outer % samples == 0 ? call.outer : call.inner;
    const int64_t bytes = call.outer * call.channels * call.inner / samples * begin * element;
    axis = axis / samples * length;
    const auto shift = [&](auto& p) {
      if (p) p = (decltype(+p))((uintptr_t)p + bytes);
    };
    shift(call.x), shift(call.residual), shift(call.output), shift(call.dy);
    shift(call.y), shift(call.dx), shift(call.dresidual);
    if (call.moments) call.moments += g * 3 * call.channels;
    call.parts = count;
    return call;
  }
};

// y; `moments` of each ghost (ghosts, 3, C); `whole`, their merge (3, C).
bool ghost_forward(nb::handle x, nb::handle y, nb::handle moments, nb::handle whole,
                   nb::handle weight, nb::handle bias, nb::handle residual, int64_t size,
                   int64_t channel_dim, int64_t batch_dim, double eps, int activation, double slope) {
  Ghosts ghosts;
  Operands& o = ghosts.o;
  ghosts.block(x, channel_dim, batch_dim, size);
  if (!o.fit) return false;
  o.call.y = o.like(y);
  o.call.moments = o.rows(moments, 3 * ghosts.count);
  o.call.weight = o.vector(weight);
  o.call.bias = o.vector(bias);
  o.call.residual = o.like(residual);
  o.call.eps = eps;
  o.call.activation = activation;
  o.call.slope = slope;
  double* const n = o.rows(whole, 3);
  if (!o.fit) return false;
  const int64_t channels = o.call.channels;
  double *const mean = n + channels, *const m2 = mean + channels;
  for (int64_t g = 0; g < ghosts.count; ++g) {
    nw::Call call = ghosts.part(g);
    run(&nw::Kernels::train_forward, call);
    const double *gn = call.moments, *gmean = gn + channels, *gm2 = gmean + channels;
    for (int64_t c = 0; c < channels; ++c) {  // Chan, Golub & LeVeque 1979, eq. 2.1
      if (g == 0) {
        n[c] = gn[c], mean[c] = gmean[c], m2[c] = gm2[c];
        continue;
      }
      const double delta = gmean[c] - mean[c], all = n[c] + gn[c], share = gn[c] / all;
      m2[c] += gm2[c] + delta * delta * n[c] * share;
      mean[c] += delta * share;
      n[c] = all;
    }
  }
  return true;
}

// dx, dresidual; `parameters` (2, C): the gradients of weight and bias over all ghosts.
bool ghost_backward(nb::handle dy, nb::handle x, nb::handle moments, nb::handle weight,
                    nb::handle bias, nb::handle residual, nb::handle output, nb::handle dx,
                    nb::handle dresidual, nb::handle sums, nb::handle parameters, int64_t size,
                    int64_t channel_dim, int64_t batch_dim, double eps, int activation,
                    double slope) {
  Ghosts ghosts;
  Operands& o = ghosts.o;
  ghosts.block(x, channel_dim, batch_dim, size);
  if (!o.fit) return false;
  o.call.dy = o.like(dy);
  o.call.moments = o.rows(moments, 3 * ghosts.count);
  o.call.weight = o.vector(weight);
  o.call.bias = o.vector(bias);
  o.call.residual = o.like(residual);
  o.call.output = o.like(output);
  o.call.dx = o.like(dx);
  o.call.dresidual = o.like(dresidual);
  o.call.sums = o.rows(sums, 2);
  o.call.eps = eps;
  o.call.activation = activation;
  o.call.slope = slope;
  double* const dweight = o.rows(parameters, 2);
  if (!o.fit) return false;
  const int64_t channels = o.call.channels;
  double* const dbias = dweight + channels;
  for (int64_t c = 0; c < 2 * channels; ++c) dweight[c] = 0;
  for (int64_t g = 0; g < ghosts.count; ++g) {
    nw::Call call = ghosts.part(g);
    run(&nw::Kernels::train_backward, call);
    const double *n = call.moments, *m2 = n + 2 * channels;
    for (int64_t c = 0; c < channels; ++c) {
      dbias[c] += call.sums[c];
      dweight[c] += call.sums[channels + c] / std::sqrt(m2[c] / n[c] + eps);
    }
  }
  return true;
}

// What is asked of torch, kept for the process.
struct Torch {
  PyObject *tensor, *parameter, *empty_like, *grad_enabled, *dispatch_modes, *is_neg;
};
Torch torch;
bool enabled = true;

nb::object called(PyObject* result) {
  if (!result) throw nb::python_error();
  return nb::steal(result);
}
bool truth(PyObject* result) { return PyObject_IsTrue(called(result).ptr()) != 0; }

// A result in the layout of `t`, or None for None.
nb::object result_like(nb::handle t) {
  if (t.is_none()) return nb::none();
  return called(PyObject_CallOneArg(torch.empty_like, t.ptr()));
}

// Operands and results of a fused backward, results allocated here: in the autograd engine every
// line of Python costs twice what it does in a loop, as its code is out of the cache.
struct FusedBackward {
  nb::object dx = nb::none(), dresidual = nb::none(), dweight = nb::none(), dbias = nb::none();

  // By moments, or by mean and var as constants. Says whether everything fitted.
  bool compute(nb::handle dy, nb::handle x, nb::handle moments, nb::handle mean, nb::handle var,
               nb::handle weight, nb::handle bias, nb::handle residual, nb::handle output,
               nb::handle mask, bool residual_gradient, int64_t channel_dim, double eps,
               int activation, double slope) {
    Operands o;
    o.block(x, channel_dim);
    o.mask(mask, channel_dim);
    o.call.dy = o.like(dy);
    o.call.moments = o.rows(moments, 3);
    o.call.mean = o.vector(mean);
    o.call.var = o.vector(var);
    o.call.constant = moments.is_none();
    o.call.weight = o.vector(weight);
    o.call.bias = o.vector(bias);
    o.call.residual = o.like(residual);
    o.call.output = o.like(output);
    if (!o.fit) return false;
    dx = result_like(x);
    if (residual_gradient) dresidual = result_like(x);
    dweight = result_like(weight);
    dbias = result_like(bias);
    o.call.dx = o.like(dx);
    o.call.dresidual = o.like(dresidual);
    o.call.dweight = const_cast<void*>(o.vector(dweight).data);
    o.call.dbias = const_cast<void*>(o.vector(dbias).data);
    o.call.eps = eps;
    o.call.activation = activation;
    o.call.slope = slope;
    if (!o.fit) return false;
    run(o.call.constant ? &nw::Kernels::eval_backward : &nw::Kernels::train_backward, o.call);
    return true;
  }
};

// (dx, dresidual or None, dweight or None, dbias or None), or None if something does not fit.
nb::object fused_backward(nb::handle dy, nb::handle x, nb::handle moments, nb::handle mean,
                          nb::handle var, nb::handle weight, nb::handle bias, nb::handle residual,
                          nb::handle output, nb::handle mask, bool residual_gradient,
                          int64_t channel_dim, double eps, int activation, double slope) {
  FusedBackward b;
  if (!b.compute(dy, x, moments, mean, var, weight, bias, residual, output, mask,
                 residual_gradient, channel_dim, eps, activation, slope))
    return nb::none();
  return nb::make_tuple(b.dx, b.dresidual, b.dweight, b.dbias);
}

// The body of an autograd node: see ops/cpu.py. Each call into Python costs 0.6 us here.
nb::object gradients(nb::handle dy, nb::tuple saved, nb::tuple option, bool train) {
  const PyTypeObject* type = Py_TYPE(dy.ptr());
  if (!enabled ||
      (type != (PyTypeObject*)torch.tensor && type != (PyTypeObject*)torch.parameter))
    return nb::none();
  // A lazy negation (the imaginary part of a conjugate): memory holds -dy, and DLPack does not tell.
  if (truth(PyObject_CallNoArgs(torch.grad_enabled)) ||
      truth(PyObject_CallNoArgs(torch.dispatch_modes)) ||
      truth(PyObject_CallOneArg(torch.is_neg, dy.ptr())))
    return nb::none();
  const nb::object none = nb::none();
  const size_t kept = train ? 4 : 5;
  const bool more = saved.size() > kept;
  const nb::object first = saved[3], second = train ? none : nb::object(saved[4]);
  FusedBackward b;
  if (!b.compute(dy, saved[0], train ? first : none, train ? none : first, second, saved[1], saved[2],
                 more ? nb::object(saved[kept]) : none, more ? nb::object(saved[kept + 1]) : none,
                 more ? nb::object(saved[kept + 2]) : none,
                 nb::cast<bool>(option[6]), nb::cast<int64_t>(option[0]), nb::cast<double>(option[1]),
                 nb::cast<int>(option[3]), nb::cast<double>(option[4])))
    return nb::none();
  const Py_ssize_t size = nb::cast<Py_ssize_t>(option[5]);
  PyObject* result = PyTuple_New(size);
  if (!result) throw nb::python_error();
  const nb::object* given[] = {&b.dx, &b.dweight, &b.dbias, &b.dresidual};
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* item = i < 4 ? given[i]->ptr() : Py_None;
    Py_INCREF(item);
    PyTuple_SET_ITEM(result, i, item);
  }
  return nb::steal(result);
}
nb::object train_gradients(nb::handle dy, nb::tuple saved, nb::tuple options) {
  return gradients(dy, saved, options, true);
}
nb::object eval_gradients(nb::handle dy, nb::tuple saved, nb::tuple options) {
  return gradients(dy, saved, options, false);
}

// backward_input if `dx` is given, else backward_reduce.
bool backward(nb::handle dy, nb::handle x, nb::handle mean, nb::handle var, nb::handle weight,
              nb::handle bias, nb::handle residual, nb::handle output, nb::handle mask,
              nb::handle sums, double count, nb::handle dx, nb::handle dresidual, int64_t channel_dim,
              double eps, int activation, double slope) {
  Operands o;
  o.block(x, channel_dim);
  o.mask(mask, channel_dim);
  o.call.dy = o.like(dy);
  o.call.mean = o.vector(mean);
  o.call.var = o.vector(var);
  o.call.weight = o.vector(weight);
  o.call.bias = o.vector(bias);
  o.call.residual = o.like(residual);
  o.call.output = o.like(output);
  o.call.sums = o.rows(sums, 2);
  o.call.count = count;
  o.call.dx = o.like(dx);
  o.call.dresidual = o.like(dresidual);
  o.call.eps = eps;
  o.call.activation = activation;
  o.call.slope = slope;
  if (o.fit)
    run(o.call.dx ? &nw::Kernels::backward_input : &nw::Kernels::backward_reduce, o.call);
  return o.fit;
}

#include "binding_sets.h"

bool update_running(nb::handle moments, nb::handle mean, nb::handle var, nb::handle tracked,
                    nb::handle nonfinite, double momentum, bool skip_nonfinite) {
  Operands o;
  o.channels_of(mean);
  const nw::Vector running_mean = o.vector(mean), running_var = o.vector(var);
  nw::RunningUpdate u;
  u.channels = o.call.channels;
  u.moments = o.rows(moments, 3);
  u.mean = const_cast<void*>(running_mean.data);
  u.var = const_cast<void*>(running_var.data);
  u.mean_dtype = running_mean.dtype;
  u.var_dtype = running_var.dtype;
  u.tracked = o.counter(tracked);
  u.nonfinite = o.counter(nonfinite);
  u.momentum = momentum;
  u.skip_nonfinite = skip_nonfinite;
  if (o.fit) nw::update_running(u);
  return o.fit;
}

// The table of functions in torch.Tensor.__dlpack_c_exchange_api__, kept for the process.
void set_exchange(nb::handle capsule) {
  void* table = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  if (!table) throw nb::python_error();
  const auto* api = static_cast<const nw::dlpack::ExchangeApi*>(table);
  if (api->version.major != 1 || !api->tensor_from_object)
    throw nb::value_error("DLPack's C exchange interface of major version 1 is needed");
  exchange = api;
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
  using nb::arg;
  // clang-format off
  m.def("moments", &moments, arg(), arg().none(), arg(), arg());
  m.def("forward", &forward, arg(), arg(), arg().none(), arg().none(), arg().none(), arg().none(),
        arg().none(), arg().none(), arg().none(), arg(), arg(), arg(), arg());
  m.def("backward", &backward, arg(), arg(), arg(), arg(), arg().none(), arg().none(), arg().none(),
        arg().none(), arg().none(), arg().none(), arg(), arg().none(), arg().none(), arg(), arg(),
        arg(), arg());
  m.def("fused_backward", &fused_backward, arg(), arg(), arg().none(), arg().none(), arg().none(),
        arg().none(), arg().none(), arg().none(), arg().none(), arg().none(), arg(), arg(), arg(),
        arg(), arg());
  m.def("ghost_forward", &ghost_forward, arg(), arg(), arg(), arg(), arg().none(), arg().none(),
        arg().none(), arg(), arg(), arg(), arg(), arg(), arg());
  m.def("ghost_backward", &ghost_backward, arg(), arg(), arg(), arg().none(), arg().none(),
        arg().none(), arg().none(), arg(), arg().none(), arg(), arg(), arg(), arg(), arg(), arg(),
        arg(), arg());
  m.def("update_running", &update_running, arg(), arg(), arg(), arg().none(), arg().none(), arg(),
        arg());
  // clang-format on
  bind_sets(m);
  m.def("set_exchange", &set_exchange);
  m.def("train_gradients", &train_gradients);
  m.def("eval_gradients", &eval_gradients);
  m.def("enable", [](bool on) { enabled = on; });
  m.def("set_torch", [](nb::object tensor, nb::object parameter, nb::object empty_like,
                        nb::object grad_enabled, nb::object dispatch_modes) {
    nb::object is_neg = tensor.attr("is_neg");
    torch = {tensor.release().ptr(),       parameter.release().ptr(),      empty_like.release().ptr(),
             grad_enabled.release().ptr(), dispatch_modes.release().ptr(), is_neg.release().ptr()};
  });
  m.def("instruction_sets", &instruction_sets);
  m.def("instruction_set", [] { return selected->name; });
  m.def("select", &use);
  m.def("set_parallel_for",
        [](Address f) { nw::parallel_for = reinterpret_cast<nw::ParallelFor>(f); });
  m.def("set_thread_count",
        [](Address f) { nw::thread_count = reinterpret_cast<nw::ThreadCount>(f); });
  m.def("caches", [] { return nb::make_tuple(nw::caches.second, nw::caches.last); });
  m.def("set_caches", [](int64_t second, int64_t last) { nw::caches = {second, last}; });
  m.def("has_parallel_for", [] { return nw::parallel_for != nullptr; });
}
