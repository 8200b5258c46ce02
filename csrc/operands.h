// From tensor views to a Call: which block x is in memory, and whether the others fit it.
#pragma once
#include <cstdint>

#include "dlpack.h"
#include "kernels.h"

namespace nw {

constexpr int kMaxRank = 16;

inline int dtype_code(dlpack::DataType t) {
  if (t.lanes != 1) return -1;
  if (t.code == 2) return t.bits == 32 ? kFloat32 : t.bits == 64 ? kFloat64 : t.bits == 16 ? kFloat16 : -1;
  return t.code == 4 && t.bits == 16 ? int(kBFloat16) : -1;
}
inline void* address(const dlpack::Tensor& t) { return static_cast<char*>(t.data) + t.byte_offset; }
inline bool on_cpu(const dlpack::Tensor& t) { return t.device.type == 1; }

// Sets the block of x, or says no: not on the CPU, a dtype the kernels do not know, empty, or
// strided with gaps. Axes are sorted by stride; a dense tensor's then multiply up.
inline bool set_block(Call& call, const dlpack::Tensor& x, int64_t channel_dim) {
  call.dtype = dtype_code(x.dtype);
  if (!on_cpu(x) || call.dtype < 0 || x.ndim > kMaxRank || channel_dim >= x.ndim) return false;
  int order[kMaxRank], used = 0;
  for (int d = 0; d < x.ndim; ++d) {
    if (x.shape[d] == 0) return false;
    if (x.shape[d] == 1) continue;  // its stride says nothing
    int at = used++;
    for (; at > 0 && x.strides[order[at - 1]] < x.strides[d]; --at) order[at] = order[at - 1];
    order[at] = d;
  }
  int64_t size = 1, inner = 1;
  for (int k = used; k-- > 0;) {
    const int d = order[k];
    if (x.strides[d] != size) return false;
    if (d == channel_dim) inner = size;
    size *= x.shape[d];
  }
  call.channels = x.shape[channel_dim];
  // One channel: the whole block is its slice, wherever the axis stands.
  call.inner = call.channels == 1 ? size : inner;
  call.outer = size / call.channels / call.inner;
  return true;
}

// Whether t lies in memory as x does, element for element.
inline bool same_block(const dlpack::Tensor& t, const dlpack::Tensor& x) {
  if (!on_cpu(t) || t.ndim != x.ndim || t.dtype.code != x.dtype.code || t.dtype.bits != x.dtype.bits)
    return false;
  for (int d = 0; d < x.ndim; ++d)
    if (t.shape[d] != x.shape[d] || (x.shape[d] != 1 && t.strides[d] != x.strides[d])) return false;
  return true;
}

// Whether t is boolean and lies as x (dense) does, but with one value along the channel axis.
inline bool mask_of_block(const dlpack::Tensor& t, const dlpack::Tensor& x, int64_t channel_dim) {
  if (!on_cpu(t) || t.ndim != x.ndim || t.dtype.code != 6 || t.dtype.bits != 8) return false;
  for (int d = 0; d < x.ndim; ++d) {
    if (t.shape[d] != (d == channel_dim ? 1 : x.shape[d])) return false;
    if (t.shape[d] == 1) continue;
    int64_t expected = 1;  // the axes inside this one, but the channels'
    for (int k = 0; k < x.ndim; ++k)
      if (k != channel_dim && x.shape[k] != 1 && x.strides[k] < x.strides[d]) expected *= x.shape[k];
    if (t.strides[d] != expected) return false;
  }
  return true;
}

// A dense array of `count` values on the CPU: rank 1 (a per-channel vector) or packed rows.
inline bool packed(const dlpack::Tensor& t, int64_t count) {
  if (!on_cpu(t)) return false;
  int64_t size = 1;
  for (int d = t.ndim; d-- > 0;) {
    if (t.shape[d] != 1 && t.strides[d] != size) return false;
    size *= t.shape[d];
  }
  return size == count;
}

}  // namespace nw
