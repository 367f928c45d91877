// The CUDA kernels and their launches, compiled for the emulator and exported with a C interface. A call returns null,
// or the emulator's message.
#include <string>
#include <vector>

#include "cuda/kernels/gaussian_contrast.cuh"
#include "cuda/kernels/patch_contrast_launch.cuh"
#include "cuda/kernels/patch_statistics.cuh"
#include "cuda/kernels/semantic_disparity.cuh"

namespace {

std::string message;

template <typename Run>
const char* guarded(Run run) {
  try {
    run();
    return nullptr;
  } catch (const simt::Error& error) {
    message = error.what();
    return message.c_str();
  }
}

// Calls run.operator()<T>() with the element type of a dtype number: DType's order.
template <typename Run>
const char* with_type(int dtype, Run run) {
  return guarded([&] {
    switch (dtype) {
      case 0: return run.template operator()<double>();
      case 1: return run.template operator()<float>();
      case 2: return run.template operator()<pglcl::BFloat16>();
      default: return run.template operator()<pglcl::Float16>();
    }
  });
}

}  // namespace

extern "C" {

void simt_clear() { simt::global_memory().clear(); }
void simt_announce(const void* data, size_t bytes, const char* name, bool written) {
  simt::global_memory().announce(data, bytes, name, written);
}

// Strides in elements: batch, class, then three of space.
struct Placed {
  void* data;
  int64_t stride[5];
};

struct Statistics {
  Placed input, grad_entropy, grad_confidence, grad_class_entropy, grad_input;
  void *entropy, *confidence, *class_entropy, *gamma, *kappa;
  pglcl::PatchGrid grid;
  double log_classes;
  bool probabilities, normalize;
};

const char* statistics(int dtype, const Statistics* s, bool backward) {
  return with_type(dtype, [&]<typename T>() {
    using scalar_t = typename pglcl::Accumulate<T>::type;
    const auto place = []<typename U>(const Placed& p, U*) {
      return pglcl::cuda::Strided<U>{
          static_cast<U*>(p.data), p.stride[0], p.stride[1], {p.stride[2], p.stride[3], p.stride[4]}};
    };
    const T* in = nullptr;
    T* out = nullptr;
    const pglcl::cuda::StatisticsInput<T> input{place(s->input, in), pglcl::cuda::narrowed(s->grid), s->probabilities,
                                                s->normalize, s->log_classes};
    if (!backward)
      pglcl::cuda::run_statistics_forward<T>(
          input, {static_cast<T*>(s->entropy), static_cast<T*>(s->confidence), static_cast<T*>(s->class_entropy)}, 0);
    else
      pglcl::cuda::run_statistics_backward<T>(
          input, place(s->grad_entropy, in), place(s->grad_confidence, in), place(s->grad_class_entropy, in),
          {static_cast<scalar_t*>(s->gamma), static_cast<scalar_t*>(s->kappa)}, place(s->grad_input, out), 0);
  });
}

const char* disparity_forward(bool wide, const void* a, const void* b, void* out, int64_t n, int64_t m, int64_t c) {
  return guarded([&] {
    const auto run = [&]<typename T>() {
      pglcl::cuda::run_disparity_forward<T>(static_cast<const T*>(a), static_cast<const T*>(b), static_cast<T*>(out), n,
                                            m, c, 0);
    };
    wide ? run.template operator()<double>() : run.template operator()<float>();
  });
}

const char* disparity_backward(bool wide, const void* grad, const void* own, const void* other, void* out, int64_t n,
                               int64_t m, int64_t c, int64_t own_stride, int64_t other_stride) {
  return guarded([&] {
    const auto run = [&]<typename T>() {
      pglcl::cuda::run_disparity_backward<T>(static_cast<const T*>(grad), static_cast<const T*>(own),
                                             static_cast<const T*>(other), static_cast<T*>(out), n, m, c, own_stride,
                                             other_stride, 0);
    };
    wide ? run.template operator()<double>() : run.template operator()<float>();
  });
}

struct Bounds {
  const void *descriptors, *key_descriptors;
  const int64_t *labels, *key_labels;
  int64_t anchors, keys, channels, count, ignore_index, self_offset;
  const void* value;  // null: by selection, else the sorted keys
  const int64_t *label, *place, *member_of, *total;
  void* bounds;
  bool positives, wide;
};

const char* bounds(const Bounds* b) {
  return guarded([&] {
    const auto run = [&]<typename T>() {
      const pglcl::cuda::BoundsInputs<T> inputs{static_cast<const T*>(b->descriptors),
                                                static_cast<const T*>(b->key_descriptors),
                                                b->labels,
                                                b->key_labels,
                                                b->anchors,
                                                b->keys,
                                                b->channels,
                                                b->count,
                                                b->ignore_index,
                                                b->self_offset,
                                                b->positives};
      if (b->value)
        pglcl::cuda::run_bounds_sorted<T>(inputs,
                                          {static_cast<const T*>(b->value), b->label, b->place, b->member_of, b->total},
                                          static_cast<T*>(b->bounds), 0);
      else
        pglcl::cuda::run_bounds_select<T>(inputs, static_cast<T*>(b->bounds), 0);
    };
    b->wide ? run.template operator()<double>() : run.template operator()<float>();
  });
}

struct Contrast {
  const void *anchors, *keys;
  int64_t n, m, depth;
  const int64_t *labels, *key_labels;
  const void *descriptors, *key_descriptors;
  int64_t channels;
  double positive_bound, negative_bound;
  const void *positive_bounds, *negative_bounds;
  const uint8_t *positive_mask, *negative_mask;
  int64_t positive_stride[2], negative_stride[2];
  double temperature, negative_weight;
  int64_t ignore_index, self_offset;
  // outputs of the forward, inputs of the backward pass
  void *max_logit, *log_sum, *logit;
  int32_t* count;
  void *losses, *loss;
  int64_t* num_valid;
  const void* grad;
  void* grad_rows;
  int64_t capability, shared_bytes, multiprocessors;
  bool per_anchor, mean, own_anchor, own_key, allow_tf32;
};

const char* contrast(int dtype, const Contrast* c, bool backward) {
  return with_type(dtype, [&]<typename T>() {
    using scalar_t = typename pglcl::Accumulate<T>::type;
    const auto in = [](const void* p) { return static_cast<const scalar_t*>(p); };
    const pglcl::cuda::ContrastArguments<T> x{static_cast<const T*>(c->anchors),
                                              static_cast<const T*>(c->keys),
                                              c->n,
                                              c->m,
                                              c->depth,
                                              c->labels,
                                              c->key_labels,
                                              in(c->descriptors),
                                              in(c->key_descriptors),
                                              c->channels,
                                              scalar_t(c->positive_bound),
                                              scalar_t(c->negative_bound),
                                              in(c->positive_bounds),
                                              in(c->negative_bounds),
                                              c->positive_mask,
                                              c->negative_mask,
                                              {c->positive_stride[0], c->positive_stride[1]},
                                              {c->negative_stride[0], c->negative_stride[1]},
                                              scalar_t(1 / c->temperature),
                                              scalar_t(std::log(c->negative_weight)),
                                              scalar_t(std::log1p(c->negative_weight)),
                                              c->ignore_index,
                                              c->self_offset};
    const pglcl::cuda::DeviceLimits device{int(c->capability), c->shared_bytes, c->allow_tf32, int(c->multiprocessors)};
    if (!backward) {
      const pglcl::cuda::ContrastSums<scalar_t> sums{
          static_cast<scalar_t*>(c->max_logit), static_cast<scalar_t*>(c->log_sum), static_cast<scalar_t*>(c->logit),
          c->count, static_cast<scalar_t*>(c->losses)};
      std::vector<float> workspace(pglcl::cuda::contrast_parts_size(pglcl::cuda::contrast_part_count(x, device), c->n));
      simt::global_memory().announce(workspace.data(), workspace.size() * sizeof(float), "workspace", false);
      pglcl::cuda::run_contrast_forward<T>(x, device, sums, workspace.data(), c->mean,
                                           c->per_anchor ? nullptr : static_cast<scalar_t*>(c->loss), c->num_valid, 0);
    } else {
      const pglcl::cuda::ContrastGradients<scalar_t> g{
          in(c->grad), c->per_anchor, c->mean ? c->num_valid : nullptr, in(c->max_logit), in(c->log_sum), c->count};
      pglcl::cuda::run_contrast_backward<T>(x, g, device, static_cast<T*>(c->grad_rows), c->own_anchor, c->own_key, 0);
    }
  });
}

struct Gaussian {
  const void* anchors;
  int64_t n, depth, classes;
  const int64_t *labels, *order;
  const void *means, *covariances;
  const int64_t* counts;
  double temperature, covariance_scale, negative_weight;
  int64_t ignore_index, shared_bytes;
  int32_t* count;
  void *losses, *gradients, *loss;
  int64_t* num_valid;
  bool pairwise, per_anchor, mean;
};

const char* gaussian(int dtype, const Gaussian* g) {
  return with_type(dtype, [&]<typename T>() {
    using scalar_t = typename pglcl::Accumulate<T>::type;
    const pglcl::cuda::GaussianArguments<T> x{static_cast<const T*>(g->anchors),
                                              g->n,
                                              g->depth,
                                              g->classes,
                                              g->labels,
                                              g->order,
                                              static_cast<const scalar_t*>(g->means),
                                              static_cast<const scalar_t*>(g->covariances),
                                              g->counts,
                                              g->pairwise,
                                              scalar_t(1 / g->temperature),
                                              scalar_t(g->covariance_scale / (g->temperature * g->temperature)),
                                              scalar_t(g->negative_weight),
                                              g->ignore_index};
    pglcl::cuda::run_gaussian_contrast<T>(x, g->shared_bytes, static_cast<scalar_t*>(g->losses), g->count,
                                          static_cast<scalar_t*>(g->gradients), g->mean,
                                          g->per_anchor ? nullptr : static_cast<scalar_t*>(g->loss), g->num_valid, 0);
  });
}

}  // extern "C"
