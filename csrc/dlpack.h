// The parts of DLPack's C exchange interface (1.3) that are used here: a tensor object's address,
// shape, strides and dtype in 50 ns, where attribute calls from Python take 150 ns each.
// https://dmlc.github.io/dlpack/latest/c_api.html
#pragma once
#include <cstdint>

namespace nw::dlpack {

struct Version {
  uint32_t major, minor;
};
struct Device {
  int32_t type, id;  // type 1 is the CPU
};
struct DataType {
  uint8_t code, bits;  // code 0 int, 2 float, 4 bfloat
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct ExchangeApi {
  Version version;
  void* older;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, Tensor* out);  // borrowed, no synchronization
  void* current_stream;
};

}  // namespace nw::dlpack
