// The emulated device, the error that all checks throw, and the switches of the faults that tests/mutants plants.
#pragma once

#include <cstdint>
#include <source_location>
#include <stdexcept>

namespace simt {

using Location = std::source_location;
using Error = std::runtime_error;

struct Dim3 {
  int64_t x = 1, y = 1, z = 1;
};

constexpr int kWarp = 32;

// The device that is emulated; tests set it.
struct Device {
  int capability = 80;                // e.g. 80
  int compiled_for = 80;              // what the running code was compiled for; not above the capability
  int64_t shared_bytes = 163 * 1024;  // the most that a block can ask for
  int multiprocessors = 4;
};
inline Device& device() {
  static Device device;
  return device;
}

// Which of the faults that tests/mutants planted is on, 0: none; and which of them the running code has come by.
inline int planted_fault = 0;
constexpr int kMostFaults = 4096;
inline unsigned char reached_faults[kMostFaults] = {};
inline bool is_on(int fault) {
  reached_faults[fault] = 1;
  return planted_fault == fault;
}
#define PGLCL_MUTANT(number, original, mutated) (::simt::is_on(number) ? (mutated) : (original))

}  // namespace simt
