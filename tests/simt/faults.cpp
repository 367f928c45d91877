// Kernels with one planted fault each, that the emulator must catch, and their sound counterparts, that it must let
// pass.
#include <string>

#include "cuda/kernels/device.h"

namespace {

using namespace pglcl;

float input[64], output[64];
std::string message;

// --- kernels: `bad` plants the fault

void global_bounds(bool bad) { Global<float>(output).store(thread_index() + (bad ? 40 : 0), 1.0f); }

void shared_bounds(bool bad) {
  SharedMemory memory;
  memory.take<float>(32).store(thread_index() + (bad ? 1 : 0), 1.0f);
}

void unwritten_shared(bool bad) {
  SharedMemory memory;
  const Shared<float> s = memory.take<float>(32);
  if (!bad || thread_index() != 5) s.store(thread_index(), 1.0f);
  sync_threads();
  s.load(thread_index());
}

void unwritten_output(bool bad) {
  const Global<float> out(output);
  if (!bad) out.store(thread_index(), 1.0f);
  out.load(thread_index());
}

void different_barriers(bool bad) {
  if (bad && thread_index() < 16)
    sync_threads();
  else
    sync_threads();
}

void gone_at_barrier(bool bad) {
  if (bad && thread_index() == 3) return;
  sync_threads();
}

void gone_at_shuffle(bool bad) {
  if (bad && thread_index() == 3) return;
  shuffle_xor(1, 1);
}

void different_shuffles(bool bad) {
  if (bad && thread_index() % 2)
    shuffle_xor(1, 1);
  else
    shuffle_xor(1, 2);
}

void race_write_read(bool bad) {
  SharedMemory memory;
  const Shared<float> s = memory.take<float>(64);
  s.store(thread_index(), 1.0f);
  if (!bad) sync_threads();
  s.load(thread_index() ? thread_index() - 1 : 0);  // of a thread that ran before
}

void race_read_write(bool bad) {
  SharedMemory memory;
  const Shared<float> s = memory.take<float>(32);
  s.store(thread_index(), 1.0f);
  sync_threads();
  s.load(31 - thread_index());
  if (!bad) sync_threads();
  s.store(thread_index(), 2.0f);
}

void race_write_write(bool bad) {
  SharedMemory memory;
  memory.take<float>(32).store(bad ? 0 : thread_index(), 1.0f);
}

void race_within_warp(bool bad) {
  SharedMemory memory;
  const Shared<float> s = memory.take<float>(32);
  s.store(thread_index(), 1.0f);
  if (!bad) sync_warp();
  s.load(thread_index() ? thread_index() - 1 : 0);
}

void race_with_atomic(bool bad) {
  SharedMemory memory;
  const Shared<int> s = memory.take<int>(1);
  if (thread_index() == 0) s.store(0, 0);
  sync_threads();
  s.atomic_add(0, 1);
  if (!bad) sync_threads();
  s.load(0);
}

void misaligned_global(bool bad) {
  if (thread_index() == 0) Global<const float>(input).load_vector<4>(bad ? 1 : 4);
}

void misaligned_shared(bool bad) {
  SharedMemory memory;
  const Shared<float> s = memory.take<float>(32);
  s.store(thread_index(), 1.0f);
  sync_threads();
  if (thread_index() == 0) s.load_vector<2>(bad ? 1 : 2);
}

void copy_without_wait(bool bad) {
  SharedMemory memory;
  const Shared<float> s = memory.take<float>(128);
  s.copy_async(4 * thread_index(), Global<const float>(input), 0, false);
  commit_copies();
  if (!bad) wait_copies<0>();
  sync_threads();
  s.load(4 * thread_index());
}

void copy_waits_for_older(bool bad) {
  SharedMemory memory;
  const Shared<float> s = memory.take<float>(256);
  s.copy_async(4 * thread_index(), Global<const float>(input), 0, false);
  commit_copies();
  s.copy_async(128 + 4 * thread_index(), Global<const float>(input), 4, false);
  commit_copies();
  wait_copies<1>();
  s.load((bad ? 128 : 0) + 4 * thread_index());
  wait_copies<0>();
}

void copy_seen_by_others(bool bad) {
  SharedMemory memory;
  const Shared<float> s = memory.take<float>(128);
  s.copy_async(4 * thread_index(), Global<const float>(input), 0, false);
  commit_copies();
  wait_copies<0>();
  if (!bad) sync_threads();
  s.load(thread_index() ? 4 * (thread_index() - 1) : 0);
}

void too_little_shared(bool bad) {
  SharedMemory memory;
  memory.take<float>(bad ? 100000 : 10);
}

// --- faults that only the end of a launch, the launch itself, or a second block shows

void race_behind_second_reader(bool bad) {
  SharedMemory memory;
  const Shared<float> s = memory.take<float>(32);
  s.store(thread_index(), 1.0f);
  sync_threads();
  s.load(0);  // thread 0 reads as well as all others, and then writes
  if (!bad) sync_threads();
  if (thread_index() == 0) s.store(0, 2.0f);
}

void global_race_in_block(bool bad) {
  const Global<float> out(output);
  out.store(thread_index(), 1.0f);
  if (!bad) sync_threads();
  out.load(thread_index() ? thread_index() - 1 : 0);
}

void global_race_of_blocks(bool bad) {
  Global<float>(output).store(thread_index() + (bad ? 0 : 32 * block_index()), 1.0f);
}

void output_left_out(bool bad) {
  if (bad && thread_index() == 9) return;
  Global<float>(output).store(thread_index() + 32 * block_index(), 1.0f);
}

void write_to_input(bool bad) { Global<float>(bad ? input : output).store(thread_index(), 1.0f); }

void copy_pending_at_exit(bool bad) {
  SharedMemory memory;
  memory.take<float>(128).copy_async(4 * thread_index(), Global<const float>(input), 0, false);
  commit_copies();
  if (!bad) wait_copies<0>();
}

void write_under_copy(bool bad) {
  SharedMemory memory;
  const Shared<float> s = memory.take<float>(128);
  s.copy_async(4 * thread_index(), Global<const float>(input), 0, false);
  commit_copies();
  if (!bad) wait_copies<0>();
  s.store(4 * thread_index(), 1.0f);
  wait_copies<0>();
}

void mma_of_old_device(bool bad) {
  simt::device().compiled_for = bad ? 75 : 80;
  float d[4] = {};
  mma_bf16(d, {0, 0, 0, 0}, {0, 0});
}

void tf32_of_old_device(bool bad) {
  simt::device().compiled_for = bad ? 75 : 80;
  to_tf32(1.0f);
}

void pack_of_old_device(bool bad) {
  simt::device().compiled_for = bad ? 75 : 80;
  pack_bf16(1.0f, 2.0f);
}

// Before sm_80 a copy is a load and a store: there at once, but for the thread that made it alone.
void copy_of_old_device(bool bad) {
  simt::device().compiled_for = 75;
  SharedMemory memory;
  const Shared<float> s = memory.take<float>(128);
  s.copy_async(4 * thread_index(), Global<const float>(input), 0, false);
  s.load(4 * thread_index());
  if (!bad) sync_threads();
  s.load(thread_index() ? 4 * (thread_index() - 1) : 0);
}

void nothing(bool) {}

void some_static(bool) {
  const Shared<int> s = simt::static_shared<int>(4);
  if (thread_index() < 4) s.store(thread_index(), 1);
}

struct Launch {
  int64_t blocks = 1, blocks_y = 1, shared_bytes = 1024, asked = 0;
  int stream = simt::kCurrentStream;
  bool guarded = true, whole = false;  // whole: the call ends, and every output must be written
};

struct Case {
  const char* name;
  void (*kernel)(bool);
  Launch bad = {}, good = {};
};
const Launch kWhole{.whole = true}, kTwoBlocks{.blocks = 2}, kTwoWhole{.blocks = 2, .whole = true};
const Case kCases[] = {
    {"global_bounds", global_bounds},
    {"shared_bounds", shared_bounds},
    {"unwritten_shared", unwritten_shared},
    {"unwritten_output", unwritten_output},
    {"different_barriers", different_barriers},
    {"gone_at_barrier", gone_at_barrier},
    {"gone_at_shuffle", gone_at_shuffle},
    {"different_shuffles", different_shuffles},
    {"race_write_read", race_write_read},
    {"race_read_write", race_read_write},
    {"race_write_write", race_write_write},
    {"race_within_warp", race_within_warp},
    {"race_with_atomic", race_with_atomic},
    {"misaligned_global", misaligned_global},
    {"misaligned_shared", misaligned_shared},
    {"copy_without_wait", copy_without_wait},
    {"copy_waits_for_older", copy_waits_for_older},
    {"copy_seen_by_others", copy_seen_by_others},
    {"too_little_shared", too_little_shared},
    {"race_behind_second_reader", race_behind_second_reader},
    {"global_race_in_block", global_race_in_block},
    {"global_race_of_blocks", global_race_of_blocks, kTwoBlocks, kTwoBlocks},
    {"output_left_out", output_left_out, kTwoWhole, kTwoWhole},
    {"write_to_input", write_to_input},
    {"copy_pending_at_exit", copy_pending_at_exit},
    {"write_under_copy", write_under_copy},
    {"mma_of_old_device", mma_of_old_device},
    {"tf32_of_old_device", tf32_of_old_device},
    {"pack_of_old_device", pack_of_old_device},
    {"copy_of_old_device", copy_of_old_device},
    {"shared_not_asked_for", nothing, {.shared_bytes = 50000}, {.shared_bytes = 50000, .asked = 60000}},
    {"static_beside_all", some_static, {.asked = 163 * 1024}, {.asked = 163 * 1024 - 16}},
    {"static_beside_48_kib", some_static, {.shared_bytes = 48 * 1024}, {.shared_bytes = 48 * 1024 - 16}},
    {"shared_above_the_limit", nothing, {.asked = 200000}, {.asked = 160000}},
    {"grid_too_high", nothing, {.blocks_y = 65536}, {.blocks_y = 2}},
    {"grid_of_nothing", nothing, {.blocks = 0}},
    {"other_stream", nothing, {.stream = 0}},
    {"no_guard", nothing, {.guarded = false}},
};

}  // namespace

extern "C" {

int fault_count() { return sizeof(kCases) / sizeof(kCases[0]); }
const char* fault_name(int i) { return kCases[i].name; }

// Null when nothing was found, else the emulator's message.
const char* run_fault(int i, bool bad) {
  const Case& x = kCases[i];
  const Launch& launch = bad ? x.bad : x.good;
  simt::device() = {};
  simt::begin_call();
  simt::current_call().open = launch.guarded;
  simt::global_memory().announce(input, sizeof(input), "input", true);
  simt::global_memory().announce(output, sizeof(output), "output", false);
  try {
    const void* address = reinterpret_cast<const void*>(x.kernel);
    simt::allow_shared(address, launch.asked, launch.asked);
    simt::launch(x.name, address, {launch.blocks, launch.blocks_y, 1}, {32, 1, 1}, size_t(launch.shared_bytes),
                 launch.stream, [=] { x.kernel(bad); });
    if (launch.whole) simt::check_call();
    return nullptr;
  } catch (const simt::Error& error) {
    message = error.what();
    return message.c_str();
  }
}

// The lanes whose bit is set in `bits`, as a vote of the warp finds them; and the sum of all lane numbers, by shuffles.
void run_votes(uint32_t bits, uint32_t* votes, int* sum) {
  simt::begin_call();
  simt::launch("votes", nullptr, {1, 1, 1}, {32, 1, 1}, 0, simt::kCurrentStream, [=] {
    const uint32_t all = ballot(bits >> thread_index() & 1);
    const int total = warp_sum(thread_index());
    if (thread_index() == 7) {
      *votes = all;
      *sum = total;
    }
  });
}

// D = A B of one warp: rows (16, depth), columns (8, depth), in fragments as the PTX ISA lays them out.
void run_mma(int kind, const float* rows, const float* columns, float* result) {
  simt::begin_call();
  simt::launch("mma", nullptr, {1, 1, 1}, {32, 1, 1}, 0, simt::kCurrentStream, [=] {
    const int lane = thread_index(), group = lane / 4, within = lane % 4;
    const int depth = kind == 2 ? 8 : 16, per_word = depth / 8;
    const auto pack = [&](const float* row, int first) {
      uint32_t word = 0;
      if (kind == 2) return to_tf32(row[first]);
      for (int half = 0; half < per_word; ++half) {
        const float value = row[first + half];
        word |= uint32_t(kind == 0 ? float_to_bfloat16(value) : float_to_float16(value)) << (16 * half);
      }
      return word;
    };
    const int k = within * per_word, next = 4 * per_word;
    const uint32_t a[4] = {pack(rows + group * depth, k), pack(rows + (group + 8) * depth, k),
                           pack(rows + group * depth, k + next), pack(rows + (group + 8) * depth, k + next)};
    const uint32_t b[2] = {pack(columns + group * depth, k), pack(columns + group * depth, k + next)};
    float d[4] = {};
    if (kind == 0) mma_bf16(d, a, b);
    if (kind == 1) mma_f16(d, a, b);
    if (kind == 2) mma_tf32(d, a, b);
    for (int i = 0; i < 4; ++i) result[(group + 8 * (i / 2)) * 8 + 2 * within + i % 2] = d[i];
  });
}

}  // extern "C"
