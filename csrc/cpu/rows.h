// What the row kernels are given: plain memory, no torch. Shared by kernels and entry points.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace fusedformer {

enum class Type : int { float32, float16, bfloat16 };

// A matrix of neighbouring columns, stride elements from one row to the next; no data: not there.
struct Matrix {
  void* data = nullptr;
  int64_t stride = 0;
  Type type = Type::float32;
};

struct Dropout {
  bool on = false;
  uint64_t seed = 0;
  uint32_t threshold = 0;
  float scale = 1.0f;  // 1 / (1 - p)
};

// Rows first to last - 1, and of these, columns from to until - 1, where from is a multiple of 16.
struct Tile {
  int64_t first, last, from, until;
};

// Masks are made for one row at a time, or for several that together have about so many calls; a
// buffer holds two such times, four words a call, and what a last vector writes beyond.
constexpr int64_t kMaskCalls = 32;
constexpr int64_t mask_room(int64_t calls) {
  return 2 * 4 * ((calls > kMaskCalls ? calls : kMaskCalls) + 8);
}

}  // namespace fusedformer
