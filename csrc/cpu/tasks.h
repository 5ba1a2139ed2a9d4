// Tasks that threads take up in order as they get free: one that another process holds up then
// holds up little. For entry points only.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <optional>

#include "tensors.h"

namespace fusedformer {

// Each thread's scratch, which it keeps: less than 2 MB.
inline char* thread_scratch(size_t bytes) {
  static thread_local std::optional<Scratch<char>> memory;
  static thread_local size_t size = 0;
  if (!memory || size < bytes) {
    memory.emplace(bytes);
    size = bytes;
  }
  return memory->data();
}

// run(task, scratch) for every task from 0 on, by as many threads as there are, but no more than
// are `worth` waking.
template <class Run>
void run_tasks(int64_t tasks, int64_t worth, size_t scratch_bytes, const Run& run) {
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t workers = std::min({threads, tasks, worth});
  std::atomic<int64_t> next{0};
  const auto take = [&](int64_t, int64_t) {
    char* scratch = scratch_bytes ? thread_scratch(scratch_bytes) : nullptr;
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
      run(task, scratch);
  };
  if (workers <= 1)
    take(0, 1);
  else
    torch::stable::parallel_for(0, workers, 1, take);
}

}  // namespace fusedformer
