// The patch grid of method, section 2: average pooling without padding.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace pglcl {

// Images of 2 dimensions are volumes of depth 1. Index 0, 1, 2 is depth, height, width.
struct PatchGrid {
  int64_t batch, classes;
  int64_t image[3], patch[3], stride[3], grid[3];

  PGLCL_HOST_DEVICE int64_t pixels() const { return image[0] * image[1] * image[2]; }
  PGLCL_HOST_DEVICE int64_t patches() const { return grid[0] * grid[1] * grid[2]; }
  PGLCL_HOST_DEVICE int64_t patch_pixels() const { return patch[0] * patch[1] * patch[2]; }
};

}  // namespace pglcl
