// A SIMT emulator: runs a CUDA-style grid on the CPU, one block at a time, and is stricter than a GPU.
//
// Every thread of a block is a fiber. A fiber runs until it comes to a barrier or a warp operation; the scheduler
// resumes it when all threads that take part have come. On the way every access to memory is checked. A launch throws
// simt::Error, naming kernel, block, thread and source line, on
//   - an access outside of a global buffer or of shared memory, to a buffer that was not announced, or a write to an
//     input,
//   - a read of shared memory, or of an output buffer, that nobody wrote; at the end of a call, output that nobody
//     wrote,
//   - threads of a block at different barriers, or gone while others wait (likewise for the lanes of a warp),
//   - two threads touching one shared address without a barrier between, one of them writing; the same in global
//     memory, where no barrier lies between two blocks,
//   - a misaligned vector access,
//   - a read of what cp.async has not delivered: its data appears only when the thread that issued it waits; and a
//     thread that ends while copies are pending,
//   - what the device lacks: shared memory above its limit, or above 48 KiB without being asked for, grids too large,
//     tensor cores and cp.async below compute capability 8.0; and a launch on another stream than the current one.
//
// Kernels are written against the names below, which device_emulated.h of csrc/cuda/kernels takes from here and
// device_cuda.h from CUDA. One launch at a time; not thread-safe, and needs none.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "simt_launch.h"
#include "simt_memory.h"
#include "simt_warp.h"
