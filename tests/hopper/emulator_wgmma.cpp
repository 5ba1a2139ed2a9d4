// The emulator's wgmma, from the PTX ISA's description of descriptors and fragments, on purpose
// without csrc/cuda/layouts.h: the two are compared.
#include <string.h>

#include <algorithm>

#include "../../csrc/cuda/hopper.h"
#include "emulator_state.h"

namespace fusedformer {
namespace emulator {
namespace {

constexpr uint32_t kPoison = 0x7FC0DEAD;

Warpgroup& warpgroup() { return current->block->warpgroups[current->thread / 128]; }

float decode(uint16_t bits, bool bfloat16) {
  return bfloat16 ? widen(__nv_bfloat16{bits}) : widen(__half{bits});
}

// A matrix descriptor: bits 0 to 13 start address, 16 to 29 leading byte offset, 32 to 45 stride
// byte offset, each in units of 16 bytes; 49 to 51 base offset; 62 and 63 swizzle, 1 = 128 bytes.
struct Descriptor {
  uint32_t start, leading, stride;

  Descriptor(uint64_t bits)
      : start((bits & 0x3FFF) * 16),
        leading((bits >> 16 & 0x3FFF) * 16),
        stride((bits >> 32 & 0x3FFF) * 16) {
    if (bits >> 62 != 1 || (bits >> 46 & 0xFFFF) != 0)
      fail_anywhere(
          text("wgmma: descriptor %016lx: only 128-byte swizzle with base offset 0 is emulated",
               static_cast<unsigned long>(bits)));
  }

  // Byte address of element (row or column `outer` of the product, k), before the swizzle.
  uint32_t linear(int outer, int k, bool transposed) const {
    // K-major: 8 rows of 128 bytes after another, the next 8 rows `stride` further on.
    if (!transposed) return start + outer / 8 * stride + outer % 8 * 128 + k * 2;
    // MN-major: 64 elements along the other dimension in 128 bytes, 8 of k below one another; the
    // next 64 elements are `leading` further on, the next 8 of k `stride`.
    return start + outer / 64 * leading + k / 8 * stride + k % 8 * 128 + outer % 64 * 2;
  }
};

// Reads `outer` x 16 elements to out[outer][16].
void read_operand(Block& block, const Descriptor& descriptor, int outer, bool transposed,
                  bool bfloat16, float* out) {
  for (int i = 0; i < outer; ++i) {
    for (int k = 0; k < 16; ++k) {
      const uint32_t linear = descriptor.linear(i, k, transposed);
      const uint32_t address = linear ^ (linear >> 7 & 7) << 4;
      if (address < kSharedBase)
        fail_anywhere(text("wgmma: a descriptor points to address %u", address));
      const uint32_t offset = address - kSharedBase;
      const unsigned char* bytes = shared_bytes(block, offset, 2, "wgmma");
      check_fenced(block, offset, 2, "wgmma reads");
      uint16_t element;
      memcpy(&element, bytes, 2);
      out[i * 16 + k] = decode(element, bfloat16);
    }
  }
}

// In a fragment, thread t of the warpgroup has in register r (two columns wide blocks of 8):
int fragment_row(int t, int r) { return t / 32 * 16 + t % 32 / 4 + r / 2 % 2 * 8; }
int fragment_column(int t, int r) { return r / 4 * 8 + t % 4 * 2 + r % 2; }

void execute(Block& block, WarpgroupProduct& work) {
  static float a[64 * 16], b[256 * 16], c[64 * 256];
  const Product& product = work.product;
  if (product.a_registers) {
    for (int t = 0; t < 128; ++t) {
      if (memcmp(work.a_registers[t], work.a[t], sizeof work.a[t]))
        fail_anywhere(text("wgmma: a changed before the wait, in lane %d of warp %d of its group",
                           t % 32, t / 32));
      for (int r = 0; r < 8; ++r)
        a[fragment_row(t, r) * 16 + fragment_column(t, r)] =
            decode(static_cast<uint16_t>(work.a[t][r / 2] >> 16 * (r % 2)), product.bfloat16);
    }
  } else {
    read_operand(block, product.descriptor_a, 64, product.transpose_a, product.bfloat16, a);
  }
  read_operand(block, product.descriptor_b, product.n, product.transpose_b, product.bfloat16, b);
  for (int i = 0; i < 64; ++i)
    for (int j = 0; j < product.n; ++j) {
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[i * 16 + k] * b[j * 16 + k];
      c[i * 256 + j] = sum;
    }
  for (int t = 0; t < 128; ++t)
    for (int r = 0; r < product.n / 2; ++r) {
      float& value = work.acc[t]->values[r];
      const float sum = c[fragment_row(t, r) * 256 + fragment_column(t, r)];
      value = product.accumulate ? value + sum : sum;
    }
}

// Does a warpgroup's products up to number `last`, for which all threads have asked, some time.
struct RunProducts : Task {
  Warpgroup* group;
  size_t last;

  bool step() override {
    for (; group->first <= last; ++group->first) {
      execute(*block, group->products.front());
      group->products.pop_front();
    }
    wake(group->event);
    return true;
  }
};

bool same(const Product& x, const Product& y) {
  return x.n == y.n && x.bfloat16 == y.bfloat16 && x.transpose_a == y.transpose_a &&
         x.transpose_b == y.transpose_b && x.accumulate == y.accumulate &&
         x.descriptor_a == y.descriptor_a && x.descriptor_b == y.descriptor_b &&
         !x.a_registers == !y.a_registers;
}

void check_registers_fenced(const void* registers, size_t bytes, const char* what) {
  const unsigned char* at = static_cast<const unsigned char*>(registers);
  for (const Fenced& fenced : current->fenced) {
    if (at < fenced.registers || at + bytes > fenced.registers + fenced.bytes.size()) continue;
    if (memcmp(at, fenced.bytes.data() + (at - fenced.registers), bytes) == 0) return;
    fail(text("wgmma: %s was written after the wgmma_fence that named it", what));
  }
  fail(text("wgmma: %s was not named in a wgmma_fence", what));
}

Accumulator& accumulator(const Product& product) {
  const size_t count = product.n / 2;
  for (Accumulator& acc : current->accumulators) {
    if (acc.registers == product.acc && acc.values.size() == count) return acc;
    if (product.acc < acc.registers + acc.values.size() && acc.registers < product.acc + count)
      fail("wgmma: the accumulator overlaps another that is under way");
  }
  check_registers_fenced(product.acc, count * sizeof(float), "the accumulator");
  current->accumulators.push_back(
      {product.acc, std::vector<float>(product.acc, product.acc + count), 0});
  for (size_t i = 0; i < count; ++i) memcpy(&product.acc[i], &kPoison, sizeof kPoison);
  return current->accumulators.back();
}

}  // namespace

void wgmma_touch_fence(const void* registers, size_t size) {
  const unsigned char* at = static_cast<const unsigned char*>(registers);
  current->fenced.remove_if([&](const Fenced& fenced) {
    return fenced.registers < at + size && at < fenced.registers + fenced.bytes.size();
  });
  current->fenced.push_back({at, std::vector<unsigned char>(at, at + size)});
}

void wgmma_fence() { maybe_switch(); }

void wgmma(const Product& product) {
  Warpgroup& group = warpgroup();
  const size_t number = current->issued++;
  while (group.first + group.products.size() <= number) group.products.emplace_back();
  WarpgroupProduct& work = group.products[number - group.first];
  if (work.threads == 0)
    work.product = product;
  else if (!same(work.product, product))
    fail("wgmma: the threads of the warpgroup ask for different products");
  const int t = current->thread % 128;
  Accumulator& acc = accumulator(product);
  acc.last = number;
  work.acc[t] = &acc;
  work.a_registers[t] = product.a_registers;
  if (product.a_registers) {
    check_registers_fenced(product.a_registers, 16, "a");
    memcpy(work.a[t], product.a_registers, 16);
  }
  if (++work.threads < 128) return;
  auto run = std::make_unique<RunProducts>();
  run->group = &group;
  run->last = number;
  start_task(std::move(run));
}

void wgmma_commit() {
  current->wgmma_groups.push_back(current->issued);
  maybe_switch();
}

void wgmma_wait(int pending) {
  Warpgroup& group = warpgroup();
  const int groups = static_cast<int>(current->wgmma_groups.size());
  const size_t end = groups > pending ? current->wgmma_groups[groups - pending - 1] : 0;
  while (group.first < end)
    sleep_on(group.event, [&group] {
      return text("wgmma, for which %d threads have asked", group.products.front().threads);
    });
  current->waited = std::max(current->waited, end);
}

void wgmma_release(const void* registers, size_t size) {
  const unsigned char* at = static_cast<const unsigned char*>(registers);
  for (auto acc = current->accumulators.begin(); acc != current->accumulators.end();) {
    const unsigned char* begin = reinterpret_cast<const unsigned char*>(acc->registers);
    const size_t bytes = acc->values.size() * sizeof(float);
    if (begin < at || begin + bytes > at + size || acc->last >= current->waited) {
      ++acc;
      continue;
    }
    memcpy(acc->registers, acc->values.data(), bytes);
    current->fenced.remove_if([&](const Fenced& fenced) {
      return fenced.registers < begin + bytes && begin < fenced.registers + fenced.bytes.size();
    });
    acc = current->accumulators.erase(acc);
  }
}

void check_thread_end(Fiber& fiber) {
  if (!fiber.accumulators.empty()) fail("ends without wgmma_wait for an accumulator");
  if (fiber.open_stores) fail("ends without tma_commit");
  for (const auto& group : fiber.stores)
    if (group->unread) fail("ends while a bulk store of its own may still read shared memory");
}

}  // namespace emulator
}  // namespace fusedformer
