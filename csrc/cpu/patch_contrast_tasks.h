// The order of the tiles. No block appears twice in a round, so the tiles of a round can run side by side. A block gets
// its tiles in the order of the rounds, so every sum is the same for any number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace pglcl {

// One tile: a block of anchors and a block of keys.
struct Step {
  int64_t row_block, column_block;
  int64_t row_turn, column_turn;  // rounds that the block must have finished before this tile
  int64_t round;
};

class Rounds {
 public:
  Rounds(int64_t rows, int64_t columns, bool symmetric)
      : rows_(rows), columns_(columns), symmetric_(symmetric), short_(std::min(rows, columns)) {}

  int64_t count() const { return rows_ * columns_; }

  // Returns false if the step has no tile, since a symmetric problem has each pair of blocks once.
  bool step(int64_t ticket, Step& out) const {
    const int64_t round = ticket / short_, i = ticket % short_;
    if (symmetric_) {
      const int64_t j = (round - i + rows_) % rows_;
      out = {i, j, round, round, round};
      return i <= j;
    }
    const int64_t longer = std::max(rows_, columns_), j = (i + round) % longer;
    // A block of the longer side pauses after its tile with the first block of the shorter one.
    const int64_t turn = std::max<int64_t>(i + 1 < short_ ? round : round + short_ - longer, 0);
    if (rows_ <= columns_)
      out = {i, j, round, turn, round};
    else
      out = {j, i, turn, round, round};
    return true;
  }

 private:
  int64_t rows_, columns_;
  bool symmetric_;
  int64_t short_;
};

// Hands the steps out to threads. Steps are taken in order and wait only for earlier ones, so some step can always run.
class StepQueue {
 public:
  StepQueue(int64_t rows, int64_t columns, bool symmetric)
      : rounds_(rows, columns, symmetric),
        row_turn_(rows),
        own_column_turn_(symmetric ? 0 : columns),
        column_turn_(symmetric ? row_turn_ : own_column_turn_) {}

  // The next step, once its blocks are free; false after the last.
  bool take(Step& step) {
    for (;;) {
      const int64_t ticket = next_.fetch_add(1, std::memory_order_relaxed);
      if (ticket >= rounds_.count()) return false;
      if (!rounds_.step(ticket, step)) continue;
      wait_for(row_turn_[step.row_block], step.row_turn);
      wait_for(column_turn_[step.column_block], step.column_turn);
      return true;
    }
  }

  void finish(const Step& step) {
    row_turn_[step.row_block].store(step.round + 1, std::memory_order_release);
    column_turn_[step.column_block].store(step.round + 1, std::memory_order_release);
  }

 private:
  static void wait_for(const std::atomic<int64_t>& turn, int64_t wanted) {
    for (int spins = 0; turn.load(std::memory_order_acquire) != wanted; ++spins)
      if (spins > 256) std::this_thread::yield();
  }

  Rounds rounds_;
  std::atomic<int64_t> next_{0};
  // The number of rounds that each block has finished.
  std::vector<std::atomic<int64_t>> row_turn_, own_column_turn_;
  std::vector<std::atomic<int64_t>>& column_turn_;
};

}  // namespace pglcl
