// The mark of functions that run on both devices.
#pragma once

#if defined(__CUDACC__)
#define PGLCL_HOST_DEVICE __host__ __device__
#else
#define PGLCL_HOST_DEVICE
#endif
