// Arrays of a framework as plain views: torch tensors by the DLPack exchange API, NumPy arrays by pybind11.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <initializer_list>
#include <string>

#include "dlpack_abi.h"
#include "params.h"

namespace lstm_ext {

namespace py = pybind11;

// What a framework's type of tensors offers. Throws TypeError for a type without the API.
const dlpack::ExchangeApi* exchange_api_of(py::handle type);

// From now on arrays of exactly these types, which share one exchange API, are taken. Subclasses are not: they mean
// more than their memory. `num_threads()` tells how many threads a call with them uses, unless it is None. Throws as
// exchange_api_of does.
void take_tensor_types(py::tuple types, py::object num_threads);

// Those types. They are kept alive for good, so that an address stands for its type.
struct TensorTypes {
  static constexpr int kMost = 4;
  PyTypeObject* types[kMost];
  int count = 0;
  const dlpack::ExchangeApi* api = nullptr;
  PyObject* num_threads = nullptr;
  PyCFunction is_neg = nullptr;  // Tensor.is_neg, null where tensors have no such thing
};
inline TensorTypes tensor_types;

// The API of an object of one of them; null if it is none.
inline const dlpack::ExchangeApi* api_of(py::handle object) {
  for (int n = 0; n < tensor_types.count; ++n) {
    if (tensor_types.types[n] == Py_TYPE(object.ptr())) return tensor_types.api;
  }
  return nullptr;
}

// What an object is to this module. Only exact types count: a subclass may mean more than its memory.
enum class Kind { kNone, kNdarray, kTensor, kOther };

inline Kind kind_of(py::handle object) {
  if (object.is_none()) return Kind::kNone;
  if (api_of(object)) return Kind::kTensor;
  const bool ndarray = static_cast<void*>(Py_TYPE(object.ptr())) == py::detail::npy_api::get().PyArray_Type_;
  return ndarray ? Kind::kNdarray : Kind::kOther;
}

int64_t bytes_of(Dtype dtype);
// Throws ValueError for a name of no dtype, such as "int32".
Dtype dtype_named(const std::string& name);

// The sizes of an array: a short vector that takes no memory of its own.
class Shape {
 public:
  static constexpr int kMaxDims = 4;

  Shape(std::initializer_list<int64_t> sizes) : Shape(sizes.begin(), static_cast<int>(sizes.size())) {}
  Shape(const int64_t* sizes, int count) : count_(count) { std::copy(sizes, sizes + count, sizes_); }

  int64_t* begin() { return sizes_; }
  const int64_t* begin() const { return sizes_; }
  const int64_t* end() const { return sizes_ + count_; }
  int size() const { return count_; }
  bool operator==(const Shape& other) const { return std::equal(begin(), end(), other.begin(), other.end()); }

 private:
  int64_t sizes_[kMaxDims];
  int count_;
};

std::string text_of(const Shape& shape);

class Array {
 public:
  static constexpr int kMaxDims = Shape::kMaxDims;

  Array() = default;
  // Borrows the memory of `object`, an ndarray or a tensor on a device of this type. None gives an array that is not
  // there. Throws TypeError for another object, RuntimeError for a tensor elsewhere or without strides.
  Array(py::handle object, const char* name, dlpack::DeviceType device) : Array(object, name, device, nullptr) {}
  // The same on the device of `like`.
  Array(py::handle object, const char* name, const Array& like) : Array(object, name, like.device_.type, &like) {}

  // Makes the numbers readable, which checks do without, so that a refused call costs no copy. One is made, and kept
  // here, only where the columns of the last dimension are not adjacent, an element is not aligned, or the memory holds
  // the other sign.
  void settle();

  explicit operator bool() const { return there_; }
  const void* data() const { return data_; }
  int ndim() const { return ndim_; }
  int64_t size(int dim) const { return shape_[dim]; }
  int64_t stride(int dim) const { return stride_[dim]; }
  Shape shape() const { return {shape_, ndim_}; }
  Matrix matrix() const { return {data_, ndim_ > 1 ? stride_[ndim_ - 2] : 0}; }

  // Element n of the first dimension, as a matrix of the last two; the address of element n of the last dimension. Null
  // where the array is not there.
  const void* at(int64_t n) const { return address(n * stride_[0]); }
  Matrix matrix_at(int64_t n) const { return {at(n), matrix().row_stride}; }
  const void* column(int64_t n) const { return address(n); }

  // Each throws, naming the array, what was expected and what came. `dims` are names of the sizes, as in "4*H, I";
  // `whose` ends the sentence, as in " as x has"; a hint says what may have happened.
  void expect_dims(int ndim) const;
  [[noreturn]] void refuse_dims() const;  // of the state of a single step: ValueError, as torch's cell
  void expect_shape(const Shape& shape, const char* dims = "") const;
  // The first `skipped` sizes are not told.
  [[noreturn]] void refuse_shape(const Shape& expected, const char* dims, const std::string& hint,
                                 int skipped = 0) const;
  void expect_dtype(Dtype dtype, const char* whose = "") const;
  bool has_dtype(Dtype dtype) const;
  bool has_dtype_of(const Array& other) const;
  std::string dtype_text() const;
  Dtype float_dtype() const;
  void expect_integers() const;
  void expect_int64() const;
  bool has_int8() const;
  void expect_bool() const;

  bool contiguous() const;
  void expect_writable() const;  // as an output: writable, columns adjacent and aligned, no element twice
  bool overlaps(const Array& other) const;
  int64_t integer(int64_t n) const;  // element n of a vector of integers of any width
  py::handle object() const { return object_; }

  const dlpack::ExchangeApi* api() const { return api_; }
  dlpack::Device device() const { return device_; }
  void* current_stream() const;  // of its device
  int num_threads() const;       // that its framework uses now; 0 if it does not say

 private:
  Array(py::handle object, const char* name, dlpack::DeviceType device, const Array* like);
  void view_tensor(py::handle object, const Array* like);
  void view_ndarray(py::handle object);
  bool usable_as_it_lies() const;
  bool negated() const;
  const void* address(int64_t offset) const;
  [[noreturn]] void refuse_view(py::handle tensor, const Array* like) const;

  const char* name_ = "";
  py::object object_;  // kept alive: another thread may change the list that it came in
  bool there_ = false;
  void* data_ = nullptr;
  int ndim_ = 0;
  int64_t shape_[kMaxDims] = {}, stride_[kMaxDims] = {};
  dlpack::DataType dtype_ = {};
  const dlpack::ExchangeApi* api_ = nullptr;  // null: NumPy
  dlpack::Device device_ = {dlpack::kCpu, 0};
  py::object copy_;
};

// A new array of the framework, and on the device, that an input came from.
struct Output {
  py::object object = py::none();
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;

  // The address of element n, counted from the start; null if it was not allocated.
  void* at(int64_t n) const { return data ? static_cast<char*>(data) + n * bytes_of(dtype) : nullptr; }
};

class Allocator {
 public:
  explicit Allocator(const Array& like) : api_(like.api()), device_(like.device()) {}
  Output empty(Dtype dtype, const Shape& shape) const;

 private:
  const dlpack::ExchangeApi* api_;
  dlpack::Device device_;
};

}  // namespace lstm_ext
