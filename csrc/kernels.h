// What the kernels take and what they are called: plain structs and function pointers, no torch,
// no Python. Kernels return nothing, allocate nothing and never throw.
#pragma once
#include <cstdint>

namespace nw {

enum DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// The codes of normwise/activations.py.
enum Activation : int {
  kNone = 0, kReLU = 1, kReLU6 = 2, kLeakyReLU = 3, kHardswish = 4,
  kSiLU = 5, kGELU = 6, kSigmoid = 7, kTanh = 8,
};

// A per-channel vector of any dtype; data == nullptr means absent.
struct Vector {
  const void* data = nullptr;
  int dtype = kFloat32;
};

// One call. Tensors of x's size share one dense block (outer, channels, inner): element (o, c, i)
// lies at (o * channels + c) * inner + i. Which fields an operator reads stands in schema.py.
struct Call {
  int64_t outer = 0, channels = 0, inner = 0;
  int dtype = kFloat32;
  int activation = kNone;
  double slope = 0, eps = 0;

  const void* x = nullptr;         // (outer, channels, inner)
  const void* residual = nullptr;  // (outer, channels, inner) or absent
  const void* output = nullptr;    // (outer, channels, inner): y, where it replaces z in backward
  const void* dy = nullptr;        // (outer, channels, inner)
  void* y = nullptr;               // (outer, channels, inner), written
  void* dx = nullptr;              // (outer, channels, inner), written
  void* dresidual = nullptr;       // (outer, channels, inner), written if not absent

  Vector weight, bias, mean, var;  // (channels,)
  double* moments = nullptr;       // (3, channels): count, mean, m2
  double* sums = nullptr;          // (2, channels): sum dz, sum dz * (x - mean)
  void* dweight = nullptr;         // (channels,), weight's dtype, written if not absent
  void* dbias = nullptr;           // (channels,), bias's dtype, written if not absent
  double count = 0;                // how many elements the sums run over (backward_input)
  bool constant = false;           // mean and var do not depend on x: sums are results only
  int64_t parts = 1;               // this many such calls make one tensor (ghost batches)
  const uint8_t* mask = nullptr;   // (outer, inner), 0 where an element takes no part; or absent

  void* scratch = nullptr;         // scratch_bytes(call) bytes, 64-byte aligned
};

// One call of a norm of sets (layer, RMS, group, instance): tensors of x's size are contiguous, and
// the parameter of run p of group g is g * runs + p.
struct SetCall {
  int64_t samples = 0, groups = 0, runs = 0, length = 0;
  int dtype = kFloat32;
  int activation = kNone;
  double slope = 0, eps = 0;
  bool centred = true;             // false: root mean square, the mean is taken for 0

  const void* x = nullptr;         // (samples, groups, runs, length)
  const void* residual = nullptr;  // x's size or absent
  const void* output = nullptr;    // x's size: y, where it replaces z in backward
  const void* dy = nullptr;        // x's size, in backward
  void* y = nullptr;               // x's size, written
  void* dx = nullptr;              // x's size, written
  void* dresidual = nullptr;       // x's size, written if not absent

  Vector weight, bias;             // (groups * runs,)
  // (3, samples * groups): count, mean, m2. Forward writes them if they are not absent; backward
  // reads them, or takes them once more from x.
  double* moments = nullptr;
  void* dweight = nullptr;         // (groups * runs,), weight's dtype, written if not absent
  void* dbias = nullptr;           // (groups * runs,), bias's dtype, written if not absent

  void* scratch = nullptr;         // sets_scratch_bytes(call) bytes, 64-byte aligned
};

// One per instruction set, all compiled from kernels.cpp, masked.cpp and sets.cpp.
struct Kernels {
  const char* name;
  int64_t (*scratch_bytes)(const Call&);
  void (*moments)(const Call&);         // x -> moments
  void (*normalize)(const Call&);       // x, mean, var -> y
  void (*train_forward)(const Call&);   // x -> moments, y
  void (*backward_reduce)(const Call&); // dy, x, mean, var -> sums
  void (*backward_input)(const Call&);  // dy, x, mean, var, sums or none -> dx, dresidual
  void (*train_backward)(const Call&);  // dy, x, moments -> sums, d everything
  void (*eval_backward)(const Call&);   // dy, x, mean, var, constant -> sums, d everything
  int64_t (*sets_scratch_bytes)(const SetCall&);
  void (*sets_forward)(const SetCall&);   // x -> y, moments
  void (*sets_backward)(const SetCall&);  // dy, x -> d everything
  const Kernels* masked;                // the same for batch norms with a mask
};

// With a mask channels lie in runs of at least this length (every vector fills), or side by side.
constexpr int64_t kMaskedRun = 16;

// The running statistics' policy: running = (1 - m) * running + m * batch, m = momentum, or
// 1 / num_batches_tracked for the cumulative average (momentum < 0 says so).
struct RunningUpdate {
  int64_t channels = 0;
  const double* moments = nullptr;  // (3, channels)
  void* mean = nullptr;             // (channels,), dtype below
  void* var = nullptr;
  int mean_dtype = kFloat32, var_dtype = kFloat32;
  int64_t* tracked = nullptr;       // may be absent
  int64_t* nonfinite = nullptr;     // may be absent
  double momentum = 0;
  bool skip_nonfinite = false;
};
void update_running(const RunningUpdate&);

// registry.cpp
int instruction_set_count();              // built in and run by this processor, plainest first
const Kernels* instruction_set(int index);

// Torch's pool: torch_parallel_for of its stable C interface, or null (then one thread).
using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, ParallelBody, void*);
using ThreadCount = int32_t (*)(uint32_t*);
extern ParallelFor parallel_for;
extern ThreadCount thread_count;

// What loops are blocked by, in bytes. Tests set them, to go every way with small tensors.
struct Caches {
  int64_t second, last;  // the second level of one core; what a core reaches of the last
};
extern Caches caches;

}  // namespace nw
