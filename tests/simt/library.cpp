// How Python steers the emulated device.
#include "simt.h"

extern "C" {

void simt_set_device(int capability, int compiled_for, int64_t shared_bytes, int multiprocessors) {
  simt::device() = {capability, compiled_for, shared_bytes, multiprocessors};
}

void simt_plant(int fault) { simt::planted_fault = fault; }

// A byte for each planted fault: 1 where the code has come by it since the last call of this.
void simt_take_reached(unsigned char* reached, int count) {
  std::memcpy(reached, simt::reached_faults, size_t(count));
  std::memset(simt::reached_faults, 0, size_t(count));
}

// The kernels launched since the last call of this, one a line: name, blocks in x, blocks in y.
const char* simt_take_launches() {
  static std::string lines;
  lines.clear();
  for (const std::string& line : simt::launches()) lines += line + "\n";
  simt::launches().clear();
  return lines.c_str();
}

}  // extern "C"
