// Which kernel of the fused contrastive loss runs, and how it is launched: the same choice under CUDA and the emulator.
#pragma once

#include "patch_contrast_mma.cuh"

namespace pglcl::cuda {

// What the choice depends on besides the problem.
struct DeviceLimits {
  int compiled_for;      // compute capability that the running code was compiled for, e.g. 80; never above the device's
  int64_t shared_bytes;  // most that a block can ask for
  bool allow_tf32;       // whether float32 products may round their factors to TF32
  int multiprocessors = 1;
};

inline int64_t blocks_of(int64_t rows, int64_t per_block) { return (rows + per_block - 1) / per_block; }

// kPlain: a warp for each row. kFfma: tiles with FFMA. kTf32: long rows on tensor cores. kMma: all other rows on tensor
// cores, held in registers.
enum class Path { kPlain, kFfma, kTf32, kMma };

// Rows of 16 bits that are longer than kMaxDepth are widened to float32. Float32 and TF32 hold all of their numbers.
inline bool widens(int64_t depth, int64_t element_size) { return depth > kMaxDepth && element_size == 2; }

// The kernel, the stages of its pipeline that fit (2 or 1), and whether rows pass in chunks.
struct Choice {
  Path path;
  int stages;
  bool in_chunks = false;
};

// Shared memory of the forward pass, which may hold the rows of anchors, or of the backward pass, whichever is larger.
template <typename T>
int64_t most_mma_bytes(int64_t depth, int stages) {
  if (depth > 128) return mma_shared_bytes<T, 256, false>(stages);
  const int64_t forward = mma_shared_bytes<T, 128, kHeldForward<T, 128>>(stages);
  const int64_t backward = mma_shared_bytes<T, 128, false>(stages);
  return forward > backward ? forward : backward;
}

template <typename T>
Choice choose_path(const ContrastArguments<T>& x, const DeviceLimits& device) {
  const bool aligned = x.depth * sizeof(T) % 16 == 0 && reinterpret_cast<uintptr_t>(x.anchors) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(x.keys) % 16 == 0;
  if (sizeof(T) == 8 || !aligned || x.depth == 0) return {Path::kPlain, 0};
  const bool tensor = device.compiled_for >= 80 && (sizeof(T) == 2 || device.allow_tf32);
  for (int stages = 2; stages > 0 && x.depth <= kMaxDepth; --stages) {
    // By the memory of the pass that needs more: both passes choose the same.
    if constexpr (sizeof(T) < 8) {
      if (tensor && most_mma_bytes<T>(x.depth, stages) <= device.shared_bytes) return {Path::kMma, stages};
    }
    if (!tensor && tile_shared_bytes<T>(x.depth, stages) <= device.shared_bytes) return {Path::kFfma, stages};
  }
  if (sizeof(T) == 2 || tile_shared_bytes<T>(kDepthChunk, 1) > device.shared_bytes) return {Path::kPlain, 0};
  return {tensor ? Path::kTf32 : Path::kFfma, 1, true};
}

// Calls body.operator()<general>(): whether masks or several channels decide which pairs count.
template <typename T, typename Body>
void with_rule(const ContrastArguments<T>& x, Body body) {
  if (x.positive_mask || (x.descriptors && x.channels > 1))
    body.template operator()<true>();
  else
    body.template operator()<false>();
}

// Calls body.operator()<depth, deep>(): the most that fits, and whether rows pass in chunks. 16-bit rows never do, and
// with TF32 all do.
template <typename T, Math kMath, typename Body>
void with_depth(int64_t depth, bool in_chunks, Body body) {
  if constexpr (sizeof(T) == 4)
    if (kMath == Math::kTensor || in_chunks) return body.template operator()<kDepthChunk, true>();
  if constexpr (kMath == Math::kFfma)
    depth > 128 ? body.template operator()<256, false>() : body.template operator()<128, false>();
}

// Rows of a block of the tile kernels.
inline int tile_rows(const Choice& choice, int64_t depth) {
  return depth > 128 && !choice.in_chunks ? kRows<256> : kRows<128>;
}

template <typename T>
int64_t tile_bytes(const Choice& choice, int64_t depth) {
  return tile_shared_bytes<T>(choice.in_chunks ? kDepthChunk : depth, choice.stages);
}

// Chunks of a row of the gradient, each of which has blocks of its own.
inline int64_t gradient_chunks(const Choice& choice, int64_t depth) {
  return choice.in_chunks ? blocks_of(depth, kDepthChunk) : 1;
}

template <typename T, Math kMath>
void launch_forward_tiles(const ContrastArguments<T>& x, const DeviceLimits& device, const ContrastSums<float>& out,
                          const ContrastParts& parts, const Choice& choice, PglclStream stream) {
  const int64_t bytes = tile_bytes<T>(choice, x.depth);
  with_rule(x, [&]<bool kGeneral>() {
    with_depth<T, kMath>(x.depth, choice.in_chunks, [&]<int kDepth, bool kDeep>() {
      PGLCL_ALLOW_SHARED((contrast_forward_tiles<T, kMath, kDepth, kGeneral, kDeep>), bytes, device.shared_bytes);
      PGLCL_LAUNCH((contrast_forward_tiles<T, kMath, kDepth, kGeneral, kDeep>), blocks_of(x.n, kRows<kDepth>),
                   parts.count, kContrastThreads, bytes, stream, x, out, parts, choice.stages);
    });
  });
}

constexpr int kResidentBlocks = 3;  // the most on a multiprocessor

// Several blocks share the columns of the same rows if `blocks` alone would not keep the GPU busy. This returns how
// many: up to `resident` blocks for each multiprocessor, and four of the `tiles` for each block.
inline int part_count(int64_t blocks, int64_t tiles, int64_t resident, const DeviceLimits& device) {
  if (blocks == 0) return 1;
  const int64_t wanted = resident * device.multiprocessors / blocks, most = tiles / 4;
  const int64_t parts = wanted < most ? wanted : most;
  return parts < 1 ? 1 : parts > 16 ? 16 : int(parts);
}

// The same for the tile kernels, whose blocks may take more shared memory.
template <typename T>
int tile_part_count(const Choice& choice, const DeviceLimits& device, int64_t depth, int64_t blocks, int64_t columns) {
  const int64_t fit = device.shared_bytes / tile_bytes<T>(choice, depth);
  return part_count(blocks, columns / kColumns<T>, fit < kResidentBlocks ? fit : kResidentBlocks, device);
}

// The parts of the keys in the forward pass.
template <typename T>
int contrast_part_count(const ContrastArguments<T>& x, const DeviceLimits& device) {
  const Choice choice = choose_path(x, device);
  if (choice.path == Path::kPlain) return 1;
  if (choice.path == Path::kMma)
    return part_count(blocks_of(x.n, kMmaRows), x.m / kMmaColumns<128, kHeldForward<T, 128>>, kResidentBlocks, device);
  return tile_part_count<T>(choice, device, x.depth, blocks_of(x.n, tile_rows(choice, x.depth)), x.m);
}

// The parts of the other side in the backward pass, for the gradient of the anchors or of the keys.
template <typename T>
int gradient_part_count(const ContrastArguments<T>& x, const DeviceLimits& device, bool own_anchor) {
  const Choice choice = choose_path(x, device);
  const int64_t rows = own_anchor ? x.n : x.m, columns = own_anchor ? x.m : x.n;
  if (choice.path == Path::kPlain || (choice.path == Path::kMma && x.depth > 128)) return 1;
  if (choice.path == Path::kMma)
    return part_count(blocks_of(rows, kMmaRows), columns / kMmaColumns<128, false>, kResidentBlocks, device);
  const int64_t blocks = blocks_of(rows, tile_rows(choice, x.depth)) * gradient_chunks(choice, x.depth);
  return tile_part_count<T>(choice, device, x.depth, blocks, columns);
}

template <typename T, int kDepth>
void launch_forward_mma(const ContrastArguments<T>& x, const DeviceLimits& device, const ContrastSums<float>& out,
                        const ContrastParts& parts, int stages, PglclStream stream) {
  with_rule(x, [&]<bool kGeneral>() {
    const int64_t bytes = mma_shared_bytes<T, kDepth, kHeldForward<T, kDepth>>(stages);
    PGLCL_ALLOW_SHARED((contrast_forward_mma<T, kDepth, kGeneral>), bytes, device.shared_bytes);
    PGLCL_LAUNCH((contrast_forward_mma<T, kDepth, kGeneral>), blocks_of(x.n, kMmaRows), parts.count, kContrastThreads,
                 bytes, stream, x, out, parts, stages);
  });
}

// loss: one number; null where out.losses are the result. workspace: contrast_parts_size(contrast_part_count(x,
// device), n) numbers.
template <typename T, typename scalar_t = typename Accumulate<T>::type>
void run_contrast_forward(const ContrastArguments<T>& x, const DeviceLimits& device, const ContrastSums<scalar_t>& out,
                          float* workspace, bool mean, scalar_t* loss, int64_t* num_valid, PglclStream stream) {
  if (x.n > 0) {
    const Choice choice = choose_path(x, device);
    const ContrastParts parts = contrast_parts(workspace, contrast_part_count(x, device), x.n);
    if constexpr (sizeof(T) < 8) {
      if (choice.path == Path::kMma && x.depth <= 128)
        launch_forward_mma<T, 128>(x, device, out, parts, choice.stages, stream);
      else if (choice.path == Path::kMma)
        launch_forward_mma<T, 256>(x, device, out, parts, choice.stages, stream);
    }
    if constexpr (sizeof(T) == 4)
      if (choice.path == Path::kTf32) launch_forward_tiles<T, Math::kTensor>(x, device, out, parts, choice, stream);
    if constexpr (sizeof(T) < 8)
      if (choice.path == Path::kFfma) launch_forward_tiles<T, Math::kFfma>(x, device, out, parts, choice, stream);
    if (choice.path == Path::kPlain)
      PGLCL_LAUNCH(contrast_forward_plain<T>, blocks_of(x.n, kContrastThreads / 32), 1, kContrastThreads, 0, stream, x,
                   out);
    if constexpr (sizeof(T) < 8)
      PGLCL_LAUNCH(contrast_finish<T>, blocks_of(x.n, kContrastThreads), 1, kContrastThreads, 0, stream, x, parts, out);
  }
  PGLCL_LAUNCH(contrast_reduce<scalar_t>, 1, 1, kReduceThreads, 0, stream, out.losses, out.num_positives, x.n, mean,
               loss, num_valid);
}

template <typename T, Math kMath>
void launch_backward_tiles(const ContrastArguments<T>& x, const ContrastGradients<float>& g, const DeviceLimits& device,
                           const GradientParts<T>& out, bool own_anchor, bool own_key, const Choice& choice,
                           PglclStream stream) {
  const int64_t bytes = tile_bytes<T>(choice, x.depth), chunks = gradient_chunks(choice, x.depth);
  with_rule(x, [&]<bool kGeneral>() {
    with_depth<T, kMath>(x.depth, choice.in_chunks, [&]<int kDepth, bool kDeep>() {
      PGLCL_ALLOW_SHARED((contrast_backward_tiles<T, kMath, kDepth, kGeneral, kDeep>), bytes, device.shared_bytes);
      PGLCL_LAUNCH((contrast_backward_tiles<T, kMath, kDepth, kGeneral, kDeep>),
                   blocks_of(own_anchor ? x.n : x.m, kRows<kDepth>), chunks * out.count, kContrastThreads, bytes,
                   stream, x, g, out, own_anchor, own_key, choice.stages);
    });
  });
}

template <typename T, int kDepth, Owner kOwner>
void launch_backward_mma(const ContrastArguments<T>& x, const ContrastGradients<float>& g, const DeviceLimits& device,
                         const GradientParts<T>& out, int stages, PglclStream stream) {
  with_rule(x, [&]<bool kGeneral>() {
    const int64_t bytes = mma_shared_bytes<T, kDepth, false>(stages);
    PGLCL_ALLOW_SHARED((contrast_backward_mma<T, kDepth, kOwner, kGeneral>), bytes, device.shared_bytes);
    PGLCL_LAUNCH((contrast_backward_mma<T, kDepth, kOwner, kGeneral>),
                 blocks_of(kOwner == Owner::kKeys ? x.m : x.n, kMmaRows), out.count, kContrastThreads, bytes, stream, x,
                 g, out, stages);
  });
}

template <typename T, int kDepth>
void launch_backward_mma(const ContrastArguments<T>& x, const ContrastGradients<float>& g, const DeviceLimits& device,
                         const GradientParts<T>& out, bool own_anchor, bool own_key, int stages, PglclStream stream) {
  if (own_anchor && own_key)
    launch_backward_mma<T, kDepth, Owner::kBoth>(x, g, device, out, stages, stream);
  else if (own_anchor)
    launch_backward_mma<T, kDepth, Owner::kAnchors>(x, g, device, out, stages, stream);
  else
    launch_backward_mma<T, kDepth, Owner::kKeys>(x, g, device, out, stages, stream);
}

// The gradient of the anchors (own_anchor), of the keys (own_key), or of both at once when they are the same, as
// run_finish_gradients finishes it.
template <typename T, typename scalar_t = typename Accumulate<T>::type>
void run_contrast_backward(const ContrastArguments<T>& x, const ContrastGradients<scalar_t>& g,
                           const DeviceLimits& device, const GradientParts<T>& out, bool own_anchor, bool own_key,
                           PglclStream stream) {
  const int64_t rows = own_anchor ? x.n : x.m;
  if (rows == 0 || x.depth == 0) return;
  const Choice choice = choose_path(x, device);
  if constexpr (sizeof(T) < 8) {
    if (choice.path == Path::kMma && x.depth <= 128)
      return launch_backward_mma<T, 128>(x, g, device, out, own_anchor, own_key, choice.stages, stream);
    if (choice.path == Path::kMma)
      return launch_backward_mma<T, 256>(x, g, device, out, own_anchor, own_key, choice.stages, stream);
  }
  if constexpr (sizeof(T) == 4)
    if (choice.path == Path::kTf32)
      return launch_backward_tiles<T, Math::kTensor>(x, g, device, out, own_anchor, own_key, choice, stream);
  if constexpr (sizeof(T) < 8)
    if (choice.path == Path::kFfma)
      return launch_backward_tiles<T, Math::kFfma>(x, g, device, out, own_anchor, own_key, choice, stream);
  const int64_t bytes = kContrastThreads / 32 * kPlainDepth * sizeof(scalar_t) + WeightScale<scalar_t>::bytes();
  PGLCL_LAUNCH(contrast_backward_plain<T>, blocks_of(rows, kContrastThreads / 32), 1, kContrastThreads, bytes, stream,
               x, g, out.gradient, own_anchor, own_key);
}

// Finishes the gradients of the anchors and of the keys. Those of float64 are finished already. symmetric: the anchors
// are the keys.
template <typename T, typename scalar_t = typename Accumulate<T>::type>
void run_finish_gradients(const ContrastArguments<T>& x, const ContrastGradients<scalar_t>& g,
                          const GradientParts<T>& anchors, const GradientParts<T>& keys, bool symmetric,
                          PglclStream stream) {
  if constexpr (sizeof(T) < 8) {
    const int64_t rows = anchors.size > 0 && (keys.size == 0 || x.n > x.m) ? x.n : x.m;
    const int gradients = int(anchors.size > 0) + int(keys.size > 0);
    if (gradients == 0) return;
    const int rows_per_block = anchors.count > 1 || keys.count > 1 ? kRowsOfParts : kRowsToFinish;
    const int64_t bytes = kContrastThreads / 32 * kPlainDepth * sizeof(double) + WeightScale<float>::bytes();
    PGLCL_LAUNCH(contrast_finish_gradients<T>, blocks_of(rows, rows_per_block), gradients, kContrastThreads, bytes,
                 stream, x, g, anchors, keys, symmetric, rows_per_block);
  }
}

}  // namespace pglcl::cuda
