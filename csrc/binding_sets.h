// The part of binding.cpp that serves the norms of sets (layer, RMS, group, instance norm).
//
// `sets_*` take the view as four numbers and say whether everything fitted; the operators call them.
// `direct_*` are whole eager calls on plain tensors: they check, allocate and compute, or return
// None for a call that is not of that kind. On (2, 16) torch.nn's own call takes no longer than four
// lines of Python do.
#pragma once

struct SetOperands {
  nw::SetCall call;
  bool fit = true;

  void block(nb::handle x) {
    fit = view(x, x_) && nw::on_cpu(x_);
    call.dtype = fit ? nw::dtype_code(x_.dtype) : -1;
    size_ = 1;
    for (int d = 0; fit && d < x_.ndim; ++d) size_ *= x_.shape[d];
    fit = fit && call.dtype >= 0 && size_ > 0 && nw::packed(x_, size_);
    call.x = nw::address(x_);
  }
  void set_view(int64_t samples, int64_t groups, int64_t runs, int64_t length) {
    call.samples = samples, call.groups = groups, call.runs = runs, call.length = length;
    fit = fit && samples * groups * runs * length == size_;
  }
  // From what the caller was given: normalized_shape, a tuple; or how many groups the channels of
  // axis 1 make.
  void set_view(nb::handle spec) {
    if (!fit) return;
    if (PyTuple_Check(spec.ptr())) {
      const Py_ssize_t axes = PyTuple_GET_SIZE(spec.ptr());
      if (axes < 1 || axes > x_.ndim) return refuse();
      int64_t features = 1;
      for (Py_ssize_t d = 0; d < axes; ++d) {
        const int64_t wanted = PyLong_AsLongLong(PyTuple_GET_ITEM(spec.ptr(), d));
        if (wanted == -1 && PyErr_Occurred()) PyErr_Clear();
        if (wanted != x_.shape[x_.ndim - axes + d]) return refuse();
        shape_[d] = wanted;
        features *= wanted;
      }
      rank_ = int(axes);
      set_view(size_ / features, 1, features, 1);
    } else {
      const int64_t groups = PyLong_AsLongLong(spec.ptr());
      if (groups == -1 && PyErr_Occurred()) PyErr_Clear();
      if (x_.ndim < 2 || groups < 1 || x_.shape[1] % groups != 0) return refuse();
      shape_[0] = x_.shape[1], rank_ = 1;
      set_view(x_.shape[0], groups, x_.shape[1] / groups, size_ / x_.shape[0] / x_.shape[1]);
      // One value in all: an error, which the slow way explains.
      if (call.samples * call.runs * call.length == 1) return refuse();
    }
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
    fit = fit && view(t, v) && nw::packed(v, call.groups * call.runs);
    for (int d = 0; fit && d < rank_; ++d) fit = v.ndim == rank_ && v.shape[d] == shape_[d];
    const int dtype = fit ? nw::dtype_code(v.dtype) : -1;
    fit = dtype >= 0;
    return fit ? nw::Vector{nw::address(v), dtype} : nw::Vector{};
  }
  double* moments(nb::handle t) {
    nw::dlpack::Tensor v;
    if (t.is_none()) return nullptr;
    fit = fit && view(t, v) && nw::packed(v, 3 * call.samples * call.groups) &&
          nw::dtype_code(v.dtype) == nw::kFloat64;
    return fit ? static_cast<double*>(nw::address(v)) : nullptr;
  }
  // Worth keeping moments for: to take those of a small tensor again costs less than a tensor does
  // (0.2 against 1.5 us); of a large one a fifth of its backward.
  bool keeps() const { return size_ >= 16384; }
  int64_t sets() const { return call.samples * call.groups; }

  void options(double eps, int activation, double slope, bool centred) {
    call.eps = eps;
    call.activation = activation;
    call.slope = slope;
    call.centred = centred;
  }
  void run(void (*kernel)(const nw::SetCall&)) {
    call.scratch = scratch.take(selected->sets_scratch_bytes(call));
    if (size_ < 16384) {
      kernel(call);
    } else {
      nb::gil_scoped_release release;
      kernel(call);
    }
    scratch.done();
  }

 private:
  nw::dlpack::Tensor x_{};
  int64_t size_ = 0, shape_[nw::kMaxRank] = {};
  int rank_ = 0;  // of shape_, the parameters'; 0: any

  void refuse() { fit = false; }
  static bool view(nb::handle t, nw::dlpack::Tensor& out) {
    if (exchange->tensor_from_object(t.ptr(), &out) == 0) return out.ndim <= nw::kMaxRank;
    PyErr_Clear();
    return false;
  }
};

bool sets_forward(nb::handle x, nb::handle weight, nb::handle bias, nb::handle residual,
                  nb::handle y, nb::handle moments, int64_t samples, int64_t groups, int64_t runs,
                  int64_t length, double eps, int activation, double slope, bool centred) {
  SetOperands o;
  o.block(x);
  o.set_view(samples, groups, runs, length);
  o.call.weight = o.vector(weight);
  o.call.bias = o.vector(bias);
  o.call.residual = o.like(residual);
  o.call.y = o.like(y);
  o.call.moments = o.moments(moments);
  o.options(eps, activation, slope, centred);
  if (o.fit) o.run(selected->sets_forward);
  return o.fit;
}

// Operands and results of a backward, results allocated here.
struct SetsBackward {
  nb::object dx = nb::none(), dresidual = nb::none(), dweight = nb::none(), dbias = nb::none();

  bool compute(SetOperands& o, nb::handle dy, nb::handle x, nb::handle moments, nb::handle weight,
               nb::handle bias, nb::handle residual, nb::handle output, bool residual_gradient) {
    o.call.dy = o.like(dy);
    o.call.moments = o.moments(moments);
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
    if (o.fit) o.run(selected->sets_backward);
    return o.fit;
  }
};

nb::object sets_backward(nb::handle dy, nb::handle x, nb::handle moments, nb::handle weight,
                         nb::handle bias, nb::handle residual, nb::handle output,
                         bool residual_gradient, int64_t samples, int64_t groups, int64_t runs,
                         int64_t length, double eps, int activation, double slope, bool centred) {
  SetOperands o;
  o.block(x);
  o.set_view(samples, groups, runs, length);
  o.options(eps, activation, slope, centred);
  SetsBackward b;
  if (!b.compute(o, dy, x, moments, weight, bias, residual, output, residual_gradient))
    return nb::none();
  return nb::make_tuple(b.dx, b.dresidual, b.dweight, b.dbias);
}

// A plain tensor whose memory holds its values, or None.
bool plain_tensor(nb::handle t) {
  if (t.is_none()) return true;
  const PyTypeObject* type = Py_TYPE(t.ptr());
  return (type == (PyTypeObject*)torch.tensor || type == (PyTypeObject*)torch.parameter) &&
         !truth(PyObject_CallOneArg(torch.is_neg, t.ptr()));
}

// Allocates moments: a function of how many sets there are.
nb::object* new_moments = nullptr;

// y, or (y, moments) if the call is recorded and they are worth keeping. The caller has seen to
// compilers and transforms.
nb::object direct_forward(nb::handle x, nb::handle weight, nb::handle bias, nb::handle residual,
                          nb::handle spec, double eps, int activation, double slope, bool centred,
                          bool recorded) {
  if (!enabled || !(eps >= 0) || !plain_tensor(x) || !plain_tensor(weight) || !plain_tensor(bias) ||
      !plain_tensor(residual) || truth(PyObject_CallNoArgs(torch.dispatch_modes)))
    return nb::none();
  SetOperands o;
  o.block(x);
  o.set_view(spec);
  o.call.weight = o.vector(weight);
  o.call.bias = o.vector(bias);
  o.call.residual = o.like(residual);
  if (!o.fit) return nb::none();
  nb::object y = result_like(x);
  o.call.y = o.like(y);
  o.options(eps, activation, slope, centred);
  const bool keep = o.fit && recorded && o.keeps() && new_moments;
  const nb::object moments = keep ? (*new_moments)(o.sets()) : nb::none();
  o.call.moments = o.moments(moments);
  if (!o.fit) return nb::none();
  o.run(selected->sets_forward);
  return keep ? nb::make_tuple(y, moments) : y;
}

// The body of an autograd node: (dy, ctx.saved_tensors, options) -> the gradients of its arguments.
// saved: x, weight, bias, and, if there is one of them, moments, residual, output; options: spec, eps, code,
// slope, centred, whether the residual wants its gradient, how many arguments the node has.
nb::object direct_backward(nb::handle dy, nb::tuple saved, nb::tuple option) {
  if (!enabled || truth(PyObject_CallNoArgs(torch.grad_enabled)) ||
      truth(PyObject_CallNoArgs(torch.dispatch_modes)) || !plain_tensor(dy))
    return nb::none();
  const nb::object x = saved[0], weight = saved[1], bias = saved[2];
  const bool more = saved.size() > 3;
  const nb::object moments = more ? nb::object(saved[3]) : nb::none();
  const nb::object residual = more ? nb::object(saved[4]) : nb::none();
  const nb::object output = more ? nb::object(saved[5]) : nb::none();
  SetOperands o;
  o.block(x);
  o.set_view(option[0]);
  const int activation = nb::cast<int>(option[2]);
  o.options(nb::cast<double>(option[1]), activation, nb::cast<double>(option[3]),
            nb::cast<bool>(option[4]));
  const bool residual_gradient = nb::cast<bool>(option[5]);
  SetsBackward b;
  // Without an activation the residual's gradient is dy itself.
  if (!o.fit || !b.compute(o, dy, x, moments, weight, bias, residual, output,
                           residual_gradient && activation != nw::kNone))
    return nb::none();
  if (residual_gradient && activation == nw::kNone) b.dresidual = nb::borrow(dy);
  const Py_ssize_t size = nb::cast<Py_ssize_t>(option[6]);
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

void bind_sets(nb::module_& m) {
  using nb::arg;
  m.def("sets_forward", &sets_forward, arg(), arg().none(), arg().none(), arg().none(), arg(),
        arg().none(), arg(), arg(), arg(), arg(), arg(), arg(), arg(), arg());
  m.def("sets_backward", &sets_backward, arg(), arg(), arg().none(), arg().none(), arg().none(),
        arg().none(), arg().none(), arg(), arg(), arg(), arg(), arg(), arg(), arg(), arg(), arg());
  m.def("direct_forward", &direct_forward, arg(), arg().none(), arg().none(), arg().none(), arg(),
        arg(), arg(), arg(), arg(), arg());
  m.def("direct_backward", &direct_backward);
  m.def("set_new_moments", [](nb::object f) { new_moments = new nb::object(std::move(f)); });
}
