// Which kernel of the fused contrastive loss runs, and how it is launched: the same choice under CUDA and the emulator.
#pragma once

#include "patch_contrast_tiles.cuh"

namespace pglcl::cuda {

// What the choice depends on besides the problem.
struct DeviceLimits {
  int capability;        // e.g. 80
  int64_t shared_bytes;  // most that a block can ask for
  bool allow_tf32;       // PyTorch's own switch for float32 products
};

// Stages of the key pipeline that fit: 2, 1, or 0 when only the plain kernel can run.
template <typename T>
int tile_stages(const ContrastArguments<T>& x, const DeviceLimits& device) {
  if constexpr (sizeof(T) == 8) return 0;
  const bool aligned = x.depth * sizeof(T) % 16 == 0 && reinterpret_cast<uintptr_t>(x.anchors) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(x.keys) % 16 == 0;
  if (!aligned || x.depth == 0 || x.depth > kMaxDepth) return 0;
  for (int stages = 2; stages > 0; --stages)
    if (tile_shared_bytes<T>(x.depth, stages) <= device.shared_bytes) return stages;
  return 0;
}

template <typename T>
bool use_tensor_cores(const DeviceLimits& device) {
  return device.capability >= 80 && (sizeof(T) == 2 || device.allow_tf32);
}

inline int64_t blocks_of(int64_t rows, int64_t per_block) { return (rows + per_block - 1) / per_block; }

template <typename T, Math kMath>
void launch_forward_tiles(const ContrastArguments<T>& x, float* lse, float* logit, int32_t* count, int stages,
                          PglclStream stream) {
  const int64_t bytes = tile_shared_bytes<T>(x.depth, stages);
  PGLCL_ALLOW_SHARED((contrast_forward_tiles<T, kMath>), bytes);
  PGLCL_LAUNCH((contrast_forward_tiles<T, kMath>), blocks_of(x.n, kRows), 1, kContrastThreads, bytes, stream, x, lse,
               logit, count, stages);
}

template <typename T, typename scalar_t = typename Accumulate<T>::type>
void run_contrast_forward(const ContrastArguments<T>& x, const DeviceLimits& device, scalar_t* lse, scalar_t* logit,
                          int32_t* count, bool per_anchor, bool mean, scalar_t* loss, int64_t* num_valid,
                          PglclStream stream) {
  if (x.n > 0) {
    const int stages = tile_stages(x, device);
    if constexpr (sizeof(T) < 8) {
      if (stages > 0 && use_tensor_cores<T>(device))
        launch_forward_tiles<T, Math::kTensor>(x, lse, logit, count, stages, stream);
      else if (stages > 0)
        launch_forward_tiles<T, Math::kFfma>(x, lse, logit, count, stages, stream);
    }
    if (stages == 0)
      PGLCL_LAUNCH(contrast_forward_plain<T>, blocks_of(x.n, kContrastThreads / 32), 1, kContrastThreads, 0, stream, x,
                   lse, logit, count);
  }
  PGLCL_LAUNCH(contrast_reduce<scalar_t>, 1, 1, kReduceThreads, 0, stream, lse, logit, count, x.n, per_anchor, mean,
               loss, num_valid);
}

template <typename T, Math kMath, int kDepth>
void launch_backward_tiles(const ContrastArguments<T>& x, const ContrastGradients<float>& g, T* grad, bool own_anchor,
                           bool own_key, int stages, PglclStream stream) {
  const int64_t bytes = tile_shared_bytes<T>(x.depth, stages);
  PGLCL_ALLOW_SHARED((contrast_backward_tiles<T, kMath, kDepth>), bytes);
  PGLCL_LAUNCH((contrast_backward_tiles<T, kMath, kDepth>), blocks_of(own_anchor ? x.n : x.m, kRows), 1,
               kContrastThreads, bytes, stream, x, g, grad, own_anchor, own_key, stages);
}

// The gradient of the anchors (own_anchor), of the keys (own_key), or of both at once when they are the same.
template <typename T, typename scalar_t = typename Accumulate<T>::type>
void run_contrast_backward(const ContrastArguments<T>& x, const ContrastGradients<scalar_t>& g,
                           const DeviceLimits& device, T* grad, bool own_anchor, bool own_key, PglclStream stream) {
  const int64_t rows = own_anchor ? x.n : x.m;
  if (rows == 0 || x.depth == 0) return;
  const int stages = tile_stages(x, device);
  if constexpr (sizeof(T) < 8) {
    if (stages > 0) {
      const bool tensor = use_tensor_cores<T>(device), deep = x.depth > 128;
      if (tensor && deep)
        return launch_backward_tiles<T, Math::kTensor, 256>(x, g, grad, own_anchor, own_key, stages, stream);
      if (tensor) return launch_backward_tiles<T, Math::kTensor, 128>(x, g, grad, own_anchor, own_key, stages, stream);
      if (deep) return launch_backward_tiles<T, Math::kFfma, 256>(x, g, grad, own_anchor, own_key, stages, stream);
      return launch_backward_tiles<T, Math::kFfma, 128>(x, g, grad, own_anchor, own_key, stages, stream);
    }
  }
  const int64_t bytes = kContrastThreads / 32 * kPlainDepth * sizeof(scalar_t);
  PGLCL_LAUNCH(contrast_backward_plain<T>, blocks_of(rows, kContrastThreads / 32), 1, kContrastThreads, bytes, stream,
               x, g, grad, own_anchor, own_key);
}

}  // namespace pglcl::cuda
