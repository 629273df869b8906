#include "array.h"

#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

#include "sizes.h"

namespace lstm_ext {
namespace {

constexpr const char* kExchangeName = "dlpack_exchange_api";  // of the capsule, by DLPack's specification

std::string text_of(dlpack::DataType dtype) {
  std::string name = "bfloat";
  if (dtype.code == dlpack::kFloat) name = "float";
  if (dtype.code == dlpack::kInt) name = "int";
  if (dtype.code == dlpack::kUInt) name = "uint";
  if (dtype.code == dlpack::kComplex) name = "complex";
  if (dtype.code == dlpack::kBool) return "bool";
  return name + std::to_string(dtype.bits);
}

struct DtypeFacts {
  const char* name;
  dlpack::DataType type;
};

constexpr DtypeFacts kDtypes[] = {
    // in the order of Dtype
    {"float32", {dlpack::kFloat, 32, 1}},
    {"float64", {dlpack::kFloat, 64, 1}},
    {"bfloat16", {dlpack::kBfloat, 16, 1}},
    {"float16", {dlpack::kFloat, 16, 1}},
};
constexpr const DtypeFacts& facts(Dtype dtype) { return kDtypes[static_cast<int>(dtype)]; }

bool same(dlpack::DataType a, dlpack::DataType b) { return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes; }

constexpr int64_t kSmallBytes = 1 << 15;

// A tensor of at most kSmallBytes on the CPU, in memory of ours: a framework's own allocation takes as long as a small
// layer. Null if it is larger, for the framework to account for.
dlpack::ManagedTensor* small_tensor(Dtype dtype, const Shape& shape) {
  struct alignas(64) Small {  // the elements follow
    dlpack::ManagedTensor managed;
    int64_t shape[Shape::kMaxDims], strides[Shape::kMaxDims];
  };
  Small head{};
  int64_t count = 1;
  for (int dim = shape.size() - 1; dim >= 0; --dim) {
    head.shape[dim] = shape.begin()[dim];
    head.strides[dim] = count;
    count = saturated_product(count, shape.begin()[dim]);
  }
  const dlpack::DataType type = facts(dtype).type;
  const int64_t bytes = saturated_product(count, type.bits / 8);
  if (bytes > kSmallBytes) return nullptr;
  const size_t units = (static_cast<size_t>(bytes) + sizeof(Small) - 1) / sizeof(Small);
  // malloc keeps freed blocks of this size at hand for the next call; aligned_alloc looks for a place each time.
  size_t space = (1 + units) * sizeof(Small) + alignof(Small);
  void* const block = std::malloc(space);
  if (!block) throw std::bad_alloc();
  void* memory = block;
  auto* small = new (std::align(alignof(Small), space - alignof(Small), memory, space)) Small(head);
  small->managed = {{dlpack::kMajorVersion, 0},
                    block,
                    [](dlpack::ManagedTensor* self) { std::free(self->manager_context); },
                    0,
                    {small + 1, {dlpack::kCpu, 0}, shape.size(), type, small->shape, small->strides, 0}};
  return &small->managed;
}

void report_allocation(void*, const char* kind, const char* message) {
  const bool memory = std::string(kind) == "MemoryError";
  PyErr_SetString(memory ? PyExc_MemoryError : PyExc_RuntimeError, message);
}

}  // namespace

const dlpack::ExchangeApi* exchange_api_of(py::handle type) {
  const py::object capsule = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_CheckExact(capsule.ptr())) {
    throw py::type_error("types: expected types with the DLPack C exchange API, got " + std::string(py::str(type)));
  }
  const void* pointer = PyCapsule_GetPointer(capsule.ptr(), kExchangeName);
  if (!pointer) throw py::error_already_set();
  auto header = static_cast<const dlpack::ExchangeHeader*>(pointer);
  while (header && header->version.major != dlpack::kMajorVersion) header = header->previous;
  if (!header) throw py::type_error("types: expected version 1 of the DLPack C exchange API, got another alone");
  return reinterpret_cast<const dlpack::ExchangeApi*>(header);
}

// A method of a type as the C function that it is; null if there is none.
PyCFunction method_without_arguments(py::handle type, const char* name) {
  const py::object method = py::getattr(type, name, py::none());
  if (method.is_none()) return nullptr;
  const bool builtin = Py_IS_TYPE(method.ptr(), &PyMethodDescr_Type);
  const PyMethodDef* const known = builtin ? reinterpret_cast<PyMethodDescrObject*>(method.ptr())->d_method : nullptr;
  if (!known || known->ml_flags != METH_NOARGS) {
    throw py::type_error("types: expected " + std::string(name) + " as a built-in method without arguments");
  }
  return known->ml_meth;
}

void take_tensor_types(py::tuple types, py::object num_threads) {
  if (types.size() > TensorTypes::kMost) throw py::value_error("types: expected at most 4, got more");
  TensorTypes taken;
  for (const py::handle type : types) {
    const dlpack::ExchangeApi* api = exchange_api_of(type);
    if (taken.api && taken.api != api) throw py::value_error("types: expected types of one framework, got several");
    taken.api = api;
    taken.types[taken.count++] = reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr());
  }
  if (!num_threads.is_none()) taken.num_threads = num_threads.release().ptr();
  if (types.size() > 0) taken.is_neg = method_without_arguments(types[0], "is_neg");
  tensor_types = taken;
}

int64_t bytes_of(Dtype dtype) { return facts(dtype).type.bits / 8; }

Dtype dtype_named(const std::string& name) {
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat16}) {
    if (name == facts(dtype).name) return dtype;
  }
  throw py::value_error("dtype: expected float32, float64, bfloat16 or float16, got '" + name + "'");
}

std::string text_of(const Shape& shape) {
  std::string text = "[";
  for (const int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

Array::Array(py::handle object, const char* name, dlpack::DeviceType device, const Array* like)
    : name_(name), object_(py::reinterpret_borrow<py::object>(object)), device_{device, 0} {
  if (object.is_none()) return;
  there_ = true;
  api_ = api_of(object);
  api_ ? view_tensor(object, like) : view_ndarray(object);
}

void Array::settle() {
  if (!there_ || (usable_as_it_lies() && !negated())) return;
  const Shape checked = shape();
  if (api_) {
    copy_ = object_.attr("contiguous")().attr("resolve_neg")();
    view_tensor(copy_, this);
    if (!usable_as_it_lies()) {  // contiguous all the time, but misaligned
      copy_ = copy_.attr("clone")();
      view_tensor(copy_, this);
    }
  } else {
    const py::object native = object_.attr("dtype").attr("newbyteorder")("=");
    copy_ = py::module_::import("numpy").attr("array")(object_, native, py::arg("order") = "C");
    view_ndarray(copy_);
  }
  if (!(shape() == checked)) throw std::runtime_error(std::string(name_) + ": another thread has changed its shape");
}

void Array::view_tensor(py::handle object, const Array* like) {
  dlpack::Tensor tensor;
  if (!api_->view_of_object) throw py::type_error(std::string(name_) + ": its framework lends no tensor views");
  if (api_->view_of_object(object.ptr(), &tensor) != 0) refuse_view(object, like);
  const bool on_cpu = tensor.device.type == dlpack::kCpu || tensor.device.type == dlpack::kCudaHost;
  const int32_t id = on_cpu ? 0 : tensor.device.id;
  if (device_.type == dlpack::kCpu ? !on_cpu : tensor.device.type != device_.type) refuse_view(object, like);
  if (like && id != like->device_.id) refuse_view(object, like);
  device_.id = id;
  if (tensor.ndim > kMaxDims) {
    throw std::runtime_error(std::string(name_) + ": expected at most 4 dimensions, got " +
                             std::to_string(tensor.ndim));
  }
  ndim_ = tensor.ndim;
  bool empty = false;
  for (int dim = 0; dim < ndim_; ++dim) {
    shape_[dim] = tensor.shape[dim];
    stride_[dim] = tensor.strides[dim];
    empty = empty || shape_[dim] == 0;
  }
  if (!tensor.data && !empty) {
    throw py::type_error(std::string(name_) + ": expected a tensor with memory, got one without (fake or meta)");
  }
  data_ = static_cast<char*>(tensor.data) + tensor.byte_offset;
  dtype_ = tensor.dtype;
}

// Its framework has refused a view of a tensor, or lent one on another device.
void Array::refuse_view(py::handle tensor, const Array* like) const {
  py::error_scope framework;  // what it said, if anything
  const auto text = [&](const char* attribute) { return std::string(py::str(tensor.attr(attribute))); };
  const std::string name(name_), device = text("device");
  const auto device_name = [](dlpack::Device d) {
    return d.type == dlpack::kCpu ? std::string("cpu") : "cuda:" + std::to_string(d.id);
  };
  const std::string expected = device_name(like ? like->device_ : device_);
  if (device != expected) {
    throw std::runtime_error(name + ": expected on device " + expected + (like ? " as x is, got " : ", got ") + device);
  }
  const std::string layout = text("layout");
  if (layout != "torch.strided") {
    throw std::runtime_error(name + ": expected a dense tensor (torch.strided), got " + layout);
  }
  throw std::runtime_error(name + ": expected a dtype that DLPack has, got " + text("dtype"));
}

void Array::view_ndarray(py::handle object) {
  if (!py::isinstance<py::array>(object)) {
    throw py::type_error(std::string(name_) + ": expected a plain tensor or numpy.ndarray, got " +
                         std::string(py::str(py::type::of(object).attr("__name__"))));
  }
  const auto array = py::reinterpret_borrow<py::array>(object);
  if (array.ndim() > kMaxDims) {
    throw py::value_error(std::string(name_) + ": expected at most 4 dimensions, got " + std::to_string(array.ndim()));
  }
  const int64_t item = array.itemsize();
  ndim_ = static_cast<int>(array.ndim());
  bool whole_strides = true;
  for (int dim = 0; dim < ndim_; ++dim) {
    shape_[dim] = array.shape(dim);
    stride_[dim] = item ? array.strides(dim) / item : 0;
    whole_strides = whole_strides && (item == 0 || array.strides(dim) % item == 0 || shape_[dim] < 2);
  }
  data_ = const_cast<void*>(array.data());
  const char kind = array.dtype().kind();
  const uint8_t code = kind == 'f'   ? dlpack::kFloat
                       : kind == 'i' ? dlpack::kInt
                       : kind == 'u' ? dlpack::kUInt
                       : kind == 'b' ? dlpack::kBool
                       : kind == 'c' ? dlpack::kComplex
                                     : 255;
  dtype_ = {code, static_cast<uint8_t>(item * 8), 1};
  const bool native = array.dtype().byteorder() == '=' || array.dtype().byteorder() == '|';
  if (!native || !whole_strides) stride_[ndim_ ? ndim_ - 1 : 0] = 0;  // not usable as it lies
}

// Whether a tensor's memory holds its numbers with the other sign: the imaginary part of a conjugate does, lazily, and
// DLPack does not tell. Asking takes as long as all else that is done with a tensor, so of other types than the first,
// which is to say of Parameters, only those are asked whose columns may lie as those of such a part do.
bool Array::negated() const {
  if (!api_ || !tensor_types.is_neg) return false;
  if (Py_TYPE(object_.ptr()) != tensor_types.types[0] && (ndim_ == 0 || shape_[ndim_ - 1] != 1)) return false;
  const auto answer = py::reinterpret_steal<py::object>(tensor_types.is_neg(object_.ptr(), nullptr));
  if (!answer) throw py::error_already_set();
  return answer.ptr() == Py_True;
}

bool Array::usable_as_it_lies() const {
  const bool aligned = reinterpret_cast<uintptr_t>(data_) % (dtype_.bits < 8 ? 1 : dtype_.bits / 8) == 0;
  if (ndim_ == 0) return aligned;
  return aligned && (stride_[ndim_ - 1] == 1 || (shape_[ndim_ - 1] < 2 && stride_[ndim_ - 1] != 0));
}

std::string Array::dtype_text() const {
  constexpr uint8_t kKnown[] = {dlpack::kInt,    dlpack::kUInt,    dlpack::kFloat,
                                dlpack::kBfloat, dlpack::kComplex, dlpack::kBool};
  const bool known = std::find(std::begin(kKnown), std::end(kKnown), dtype_.code) != std::end(kKnown);
  return known ? text_of(dtype_) : std::string(py::str(object_.attr("dtype")));
}

const void* Array::address(int64_t offset) const {
  return there_ ? static_cast<const char*>(data_) + offset * (dtype_.bits / 8) : nullptr;
}

void Array::expect_dims(int ndim) const {
  if (ndim_ != ndim) {
    throw std::runtime_error(std::string(name_) + ": expected " + std::to_string(ndim) + " dimensions, got " +
                             std::to_string(ndim_) + ": shape " + text_of(shape()));
  }
}

void Array::refuse_dims() const {
  throw py::value_error(std::string(name_) + ": expected 1 or 2 dimensions, got " + std::to_string(ndim_) + ": shape " +
                        text_of(shape()));
}

void Array::expect_shape(const Shape& expected, const char* dims) const {
  if (shape() == expected) return;
  const int64_t* const sizes = expected.begin();
  const bool transposed = expected.size() == 2 && shape() == Shape{sizes[1], sizes[0]};
  refuse_shape(expected, dims, transposed ? ": transposed?" : "");
}

void Array::refuse_shape(const Shape& expected, const char* dims, const std::string& hint, int skipped) const {
  const std::string names = *dims ? "[" + std::string(dims) + "] = " : "";
  const auto text = [&](const Shape& sizes) {
    return lstm_ext::text_of(Shape(sizes.begin() + skipped, sizes.size() - skipped));
  };
  throw std::runtime_error(std::string(name_) + ": expected shape " + names + text(expected) + ", got " +
                           text(shape()) + hint);
}

bool Array::has_dtype(Dtype dtype) const { return same(dtype_, facts(dtype).type); }

void Array::expect_dtype(Dtype dtype, const char* whose) const {
  if (has_dtype(dtype)) return;
  throw std::runtime_error(std::string(name_) + ": expected dtype " + facts(dtype).name + whose + ", got " +
                           dtype_text());
}

bool Array::has_dtype_of(const Array& other) const { return same(dtype_, other.dtype_); }

Dtype Array::float_dtype() const {
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat16}) {
    if (same(dtype_, facts(dtype).type)) return dtype;
  }
  throw std::runtime_error(std::string(name_) + ": expected dtype bfloat16, float16, float32, float64, got " +
                           dtype_text());
}

void Array::expect_integers() const {
  if (dtype_.code == dlpack::kInt || dtype_.code == dlpack::kUInt) return;
  const std::string name(name_);
  throw py::type_error(name + ": expected an integer dtype, got " + dtype_text() + ": use " + name +
                       (api_ ? ".long()" : ".astype(int)"));
}

void Array::expect_int64() const {
  if (same(dtype_, {dlpack::kInt, 64, 1})) return;
  throw py::type_error(std::string(name_) + ": expected dtype int64, got " + dtype_text());
}

bool Array::has_int8() const { return same(dtype_, {dlpack::kInt, 8, 1}); }

void Array::expect_bool() const {
  if (dtype_.code == dlpack::kBool) return;
  const std::string name(name_);
  throw py::type_error(name + ": expected dtype bool, got " + dtype_text() + ": use " + name +
                       (api_ ? ".bool()" : ".astype(bool)"));
}

int64_t Array::integer(int64_t n) const {
  const auto read = [&](auto zero) {
    return static_cast<int64_t>(static_cast<const decltype(zero)*>(data_)[n * stride_[0]]);
  };
  const bool is_signed = dtype_.code == dlpack::kInt;
  switch (dtype_.bits) {
    case 8: return is_signed ? read(int8_t{}) : read(uint8_t{});
    case 16: return is_signed ? read(int16_t{}) : read(uint16_t{});
    case 32: return is_signed ? read(int32_t{}) : read(uint32_t{});
    default: return is_signed ? read(int64_t{}) : read(uint64_t{});
  }
}

bool Array::contiguous() const {
  if (std::count(shape_, shape_ + ndim_, 0) > 0) return true;  // an empty array may have any strides
  int64_t expected = 1;
  for (int dim = ndim_ - 1; dim >= 0; --dim) {
    if (shape_[dim] > 1 && stride_[dim] != expected) return false;
    expected = saturated_product(expected, shape_[dim]);
  }
  return true;
}

void Array::expect_writable() const {
  const std::string name(name_);
  if (!api_ && !py::reinterpret_borrow<py::array>(object_).writeable()) {
    throw py::value_error(name + ": expected a writable array, got one that is read-only");
  }
  bool usable = usable_as_it_lies() && !negated();
  for (int dim = 0; dim < ndim_; ++dim) {
    if (shape_[dim] < 2) continue;
    usable = usable && stride_[dim] > 0;
    for (int other = 0; other < ndim_; ++other) {  // of two dimensions one lies within a step of the other
      if (other == dim || shape_[other] < 2) continue;
      usable = usable && (stride_[dim] >= saturated_product(stride_[other], shape_[other]) ||
                          stride_[other] >= saturated_product(stride_[dim], shape_[dim]));
    }
  }
  if (!usable) {
    throw py::value_error(name + ": expected rows of adjacent, aligned elements that lie apart from each other");
  }
}

bool Array::overlaps(const Array& other) const {
  const auto extent = [](const Array& array) {
    auto begin = reinterpret_cast<uintptr_t>(array.data_), end = begin + array.dtype_.bits / 8;
    for (int dim = 0; dim < array.ndim_; ++dim) {
      if (array.shape_[dim] == 0) return std::pair(begin, begin);
      const int64_t bytes = (array.shape_[dim] - 1) * array.stride_[dim] * (array.dtype_.bits / 8);
      (bytes < 0 ? begin : end) += static_cast<uintptr_t>(bytes);
    }
    return std::pair(begin, end);
  };
  const auto [begin, end] = extent(*this);
  const auto [other_begin, other_end] = extent(other);
  return begin < other_end && other_begin < end;
}

void* Array::current_stream() const {
  void* stream = nullptr;
  if (api_ && api_->current_stream(device_.type, device_.id, &stream) != 0) throw py::error_already_set();
  return stream;
}

int Array::num_threads() const {
  if (!api_ || !tensor_types.num_threads) return 0;
  return py::reinterpret_borrow<py::object>(tensor_types.num_threads)().cast<int>();
}

Output Allocator::empty(Dtype dtype, const Shape& shape) const {
  Output output;
  output.dtype = dtype;
  if (!api_) {
    py::array array(py::dtype(dtype == Dtype::kBFloat16 ? "float32" : facts(dtype).name),
                    std::vector<py::ssize_t>(shape.begin(), shape.end()));
    output.data = array.mutable_data();
    output.object = std::move(array);
    return output;
  }
  dlpack::ManagedTensor* managed = device_.type == dlpack::kCpu ? small_tensor(dtype, shape) : nullptr;
  Shape sizes = shape;
  dlpack::Tensor prototype{nullptr, device_, sizes.size(), facts(dtype).type, sizes.begin(), nullptr, 0};
  if (!managed && api_->allocate(&prototype, &managed, nullptr, report_allocation) != 0) {
    if (!PyErr_Occurred()) throw std::bad_alloc();
    throw py::error_already_set();
  }
  output.data = static_cast<char*>(managed->tensor.data) + managed->tensor.byte_offset;
  void* object = nullptr;
  if (api_->object_from_managed(managed, &object) != 0) throw py::error_already_set();
  output.object = py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
  return output;
}

}  // namespace lstm_ext
