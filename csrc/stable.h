// Tensors through PyTorch's stable interface (torch/csrc/stable): the ops see torch through this header alone, so that
// one binary serves every torch from the oldest supported one on.
//
// How to use it: an op takes `const Tensor&`, `const std::optional<Tensor>&`, int64_t, double, bool and `IntArray`, is
// registered with TORCH_BOX(&function) in STABLE_TORCH_LIBRARY_IMPL, reads memory through data<T>() and writes new
// tensors through mutable_data<T>(). What it takes is checked by require(), which raises RuntimeError; the messages for
// users are those of pglcl_ext/_checks.py.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <utility>
#include <vector>

namespace pglcl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using IntArray = torch::headeronly::IntHeaderOnlyArrayRef;

// Sizes of a tensor, of as many dimensions as an op's may have.
class Shape {
 public:
  Shape() = default;
  Shape(std::initializer_list<int64_t> sizes) : Shape(sizes.begin(), sizes.end()) {}
  Shape(const int64_t* first, const int64_t* last) : count_(size_t(last - first)) {
    STD_TORCH_CHECK(count_ <= kMost, "a tensor has ", count_, " dimensions, more than any that is taken");
    std::copy(first, last, sizes_);
  }
  void push_back(int64_t size) { sizes_[count_++] = size; }
  const int64_t* data() const { return sizes_; }
  const int64_t* begin() const { return sizes_; }
  const int64_t* end() const { return sizes_ + count_; }
  size_t size() const { return count_; }
  int64_t& operator[](size_t d) { return sizes_[d]; }
  int64_t operator[](size_t d) const { return sizes_[d]; }
  friend bool operator==(const Shape& a, const Shape& b) { return std::equal(a.begin(), a.end(), b.begin(), b.end()); }

 private:
  static constexpr size_t kMost = 8;
  size_t count_ = 0;
  int64_t sizes_[kMost];
};

inline Shape shape_of(const Tensor& t) {
  const IntArray sizes = t.sizes();
  return Shape(sizes.begin(), sizes.end());
}

inline bool is_floating(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  return type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

// The type that sums are kept in.
inline ScalarType accumulate_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls body.operator()<scalar_t>() with the type that sums are kept in.
template <typename Body>
auto with_accumulate_type(const Tensor& t, const Body& body) {
  return t.scalar_type() == ScalarType::Double ? body.template operator()<double>() : body.template operator()<float>();
}

// --- checks ----------------------------------------------------------------------------------------------------------

inline void require(bool fits, const char* name) { STD_TORCH_CHECK(fits, name, " does not fit the other arguments"); }

// A limit of the device that Python does not know. Users get the message alone, as a ValueError (_autograd.py).
#define PGLCL_CHECK_LIMIT(fits, ...) STD_TORCH_CHECK(fits, "limit of the GPU: ", __VA_ARGS__)

// Same kind of device and index as `like`.
inline void require_device(const Tensor& t, const char* name, const Tensor& like) {
  require(t.device() == like.device(), name);
}

inline void require_floating(const Tensor& t, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(is_floating(t), name, " must be float64, float32, bfloat16 or float16");
  require_device(t, name, like);
}

inline void require_tensor(const Tensor& t, const char* name, const Tensor& like, ScalarType type, const Shape& shape) {
  const IntArray sizes = t.sizes();
  require(t.scalar_type() == type && std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()), name);
  require_device(t, name, like);
}

// --- memory ----------------------------------------------------------------------------------------------------------

// On the device of `like`, and of its type where none is named. Not by torch::stable::new_empty, which looks the
// operator up by its name: that takes as long as a small op.
inline Tensor empty(const Tensor& like, const Shape& shape, std::optional<ScalarType> type = std::nullopt) {
  Shape strides = shape;
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0; stride *= std::max<int64_t>(shape[d], 1)) strides[d] = stride;
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const int32_t dtype =
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type.value_or(like.scalar_type())));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides.data(), dtype,
                                                         device_type, device_index, &handle));
  return Tensor(handle);
}

inline Tensor zeros(const Tensor& like, const Shape& shape, ScalarType type) {
  if (!like.is_cpu()) return torch::stable::new_zeros(like, IntArray(shape.data(), shape.size()), type);
  const Tensor out = empty(like, shape, type);
  if (out.numel()) std::memset(out.mutable_data_ptr(), 0, size_t(out.numel()) * out.element_size());
  return out;
}

// Contiguous, and of the given type where one is named.
inline Tensor as_contiguous(const Tensor& t, std::optional<ScalarType> type = std::nullopt) {
  const Tensor typed = type && t.scalar_type() != *type ? torch::stable::to(t, *type) : t;
  return typed.is_contiguous() ? typed : torch::stable::contiguous(typed);
}

// As as_contiguous, of a tensor that may be missing.
inline std::optional<Tensor> converted(const std::optional<Tensor>& t, ScalarType type) {
  return t ? std::optional<Tensor>(as_contiguous(*t, type)) : std::nullopt;
}

inline Tensor cast(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

// An operator of torch that stable/ops.h has no function for; its overload's name may be empty.
template <typename... Arguments>
std::vector<Tensor> call_torch(const char* name, const char* overload, size_t results, const Arguments&... arguments) {
  std::vector<StableIValue> stack{torch::stable::detail::from(arguments)...};
  stack.resize(std::max(stack.size(), results));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  std::vector<Tensor> out;
  for (size_t i = 0; i < results; ++i) out.push_back(torch::stable::detail::to<Tensor>(stack[i]));
  return out;
}

// (values, places) along the last dimension in ascending order; equal ones stay in theirs.
inline std::pair<Tensor, Tensor> stable_sort(const Tensor& t) {
  const std::vector<Tensor> sorted =
      call_torch("aten::sort", "stable", 2, t, std::optional<bool>(true), int64_t(-1), false);
  return {sorted[0], sorted[1]};
}

// t[places], for places (N,) int64 along the first dimension.
inline Tensor rows_at(const Tensor& t, const Tensor& places) {
  return call_torch("aten::index_select", "", 1, t, int64_t(0), places)[0];
}

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// A tensor without dimensions, on the CPU.
template <typename T>
Tensor cpu_scalar(const Tensor& like, ScalarType type, T value) {
  Tensor out = empty(like, {}, type);
  *mutable_data<T>(out) = value;
  return out;
}

}  // namespace pglcl
