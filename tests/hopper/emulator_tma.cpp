// The emulator's copies: TMA's boxes of tensors, and bulk copies of plain bytes.
#include <string.h>

#include <algorithm>

#include "../../csrc/cuda/hopper.h"
#include "emulator_state.h"

namespace fusedformer {
namespace emulator {
namespace {

constexpr uint32_t kMagic = 0x54656E73;

// What the emulator keeps in a TensorMap. Dimension 0 is the innermost.
struct Map {
  unsigned char* data;
  int64_t strides[4];  // bytes
  int32_t sizes[4];
  uint16_t box[4];
  uint16_t element_bytes, swizzle;
  uint32_t magic;
};
static_assert(sizeof(Map) <= sizeof(hopper::TensorMap), "a map has 128 bytes");

Map read_map(const hopper::TensorMap& map, const char* what) {
  Map out;
  memcpy(&out, &map, sizeof out);
  if (out.magic != kMagic) fail(text("%s: not a tensor map", what));
  if (reinterpret_cast<uintptr_t>(&map) % 64)
    fail(text("%s: the map is not 64-byte aligned", what));
  return out;
}

size_t box_bytes(const Map& map) {
  return static_cast<size_t>(map.element_bytes) * map.box[0] * map.box[1] * map.box[2] * map.box[3];
}

// Calls visit(shared offset in the box, global bytes or null outside the tensor) for each element.
template <typename Visit>
void for_each(const Map& map, const int (&at)[4], uint32_t offset, Visit visit) {
  uint32_t linear = 0;
  int i[4];
  for (i[3] = 0; i[3] < map.box[3]; ++i[3])
    for (i[2] = 0; i[2] < map.box[2]; ++i[2])
      for (i[1] = 0; i[1] < map.box[1]; ++i[1])
        for (i[0] = 0; i[0] < map.box[0]; ++i[0]) {
          unsigned char* global = map.data;
          for (int d = 0; d < 4 && global; ++d) {
            const int64_t index = static_cast<int64_t>(at[d]) + i[d];
            global = index < 0 || index >= map.sizes[d] ? nullptr : global + index * map.strides[d];
          }
          // 128-byte swizzle: bits 4 to 6 of the address are xored with bits 7 to 9.
          const uint32_t place = offset + linear;
          visit(map.swizzle ? place ^ (place >> 7 & 7) << 4 : place, global);
          linear += map.element_bytes;
        }
}

uint32_t box_offset(const Map& map, const void* shared, const char* what) {
  const uint32_t offset = shared_offset(shared, what);
  const uint32_t alignment = map.swizzle ? 1024 : 128;
  if (offset % alignment)
    fail(text("%s: byte %u of shared memory is not %u-byte aligned", what, offset, alignment));
  shared_bytes(*current->block, offset, box_bytes(map), what);
  return offset;
}

void land(Block& block, uint32_t barrier_offset, size_t bytes) {
  Mbarrier& barrier = find_mbarrier(block, barrier_offset, "TMA");
  barrier.bytes -= static_cast<int64_t>(bytes);
  settle(barrier);
}

uint32_t barrier_for_copy(uint64_t* at, const char* what) {
  const uint32_t offset = shared_offset(at, what);
  if (!find_mbarrier(*current->block, offset, what).fenced)
    fail(text("%s: no mbarrier_init_fence() since its mbarrier was initialised", what));
  return offset;
}

void check_bulk(const void* global, uint32_t offset, uint32_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(global) % 16 || offset % 16 || bytes % 16)
    fail(text("%s: addresses and size must be multiples of 16; global %p, shared byte %u, %u bytes",
              what, global, offset, bytes));
  shared_bytes(*current->block, offset, bytes, what);
}

struct TensorLoad : Task {
  Map map;
  uint32_t offset, barrier;
  int at[4];

  bool step() override {
    check_fenced(*block, offset, box_bytes(map), "tma_load overwrites");
    const uint64_t zero = 0;
    for_each(map, at, offset, [&](uint32_t place, const unsigned char* global) {
      write_shared(*block, place, global ? static_cast<const void*>(global) : &zero,
                   map.element_bytes);
    });
    land(*block, barrier, box_bytes(map));
    return true;
  }
};

struct BulkLoad : Task {
  const void* global;
  uint32_t offset, bytes, barrier;

  bool step() override {
    check_fenced(*block, offset, bytes, "bulk_load overwrites");
    write_shared(*block, offset, global, bytes);
    land(*block, barrier, bytes);
    return true;
  }
};

// Reads shared memory in its first step and writes global memory in its second.
struct Store : Task {
  std::shared_ptr<StoreGroup> group;
  uint32_t offset;
  size_t bytes;
  std::vector<unsigned char> data;
  bool has_read = false;

  virtual void write() = 0;

  bool step() override {
    if (!has_read) {
      check_fenced(*block, offset, bytes, "a bulk store reads");
      data.assign(block->shared + offset, block->shared + offset + bytes);
      has_read = true;
      --group->unread;
      wake(block->stores_event);
      return false;
    }
    write();
    --group->unwritten;
    wake(block->stores_event);
    return true;
  }
};

struct TensorStore : Store {
  Map map;
  int at[4];

  void write() override {
    for_each(map, at, offset, [&](uint32_t place, unsigned char* global) {
      if (global) memcpy(global, data.data() + (place - offset), map.element_bytes);
    });
  }
};

struct BulkReduceAdd : Store {
  float* global;

  void write() override {
    for (size_t i = 0; i < bytes / 4; ++i) {
      float addend;
      memcpy(&addend, data.data() + 4 * i, 4);
      global[i] += addend;
    }
  }
};

void start_store(std::unique_ptr<Store> store, uint32_t offset, size_t bytes) {
  if (!current->open_stores) current->open_stores = std::make_shared<StoreGroup>();
  store->group = current->open_stores;
  store->offset = offset;
  store->bytes = bytes;
  ++store->group->unread;
  ++store->group->unwritten;
  start_task(std::move(store));
  maybe_switch();
}

}  // namespace

hopper::TensorMap make_tensor_map(const void* data, int element_bytes, const int64_t (&sizes)[4],
                                  const int64_t (&strides)[4], const int (&box)[4], int swizzle) {
  Map map{};
  map.data = static_cast<unsigned char*>(const_cast<void*>(data));
  map.element_bytes = static_cast<uint16_t>(element_bytes);
  map.swizzle = static_cast<uint16_t>(swizzle);
  map.magic = kMagic;
  bool good = reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides[3] == 1 &&
              (swizzle == 0 || (swizzle == 128 && box[3] * element_bytes <= 128)) &&
              box[3] * element_bytes % 16 == 0;
  for (int d = 0; d < 4; ++d) {
    map.sizes[d] = static_cast<int32_t>(sizes[3 - d]);
    map.strides[d] = strides[3 - d] * element_bytes;
    map.box[d] = static_cast<uint16_t>(box[3 - d]);
    good = good && sizes[d] > 0 && box[d] > 0 && box[d] <= 256;
    good = good && (d == 0 || (map.strides[d] % 16 == 0 && map.strides[d] >= 0));
  }
  if (!good) fail_anywhere("make_tensor_map: TMA cannot describe this tensor or box");
  hopper::TensorMap out{};
  memcpy(&out, &map, sizeof map);
  return out;
}

void tma_load(void* shared, const hopper::TensorMap& map, uint64_t* barrier, const int (&at)[4]) {
  auto copy = std::make_unique<TensorLoad>();
  copy->map = read_map(map, "tma_load");
  copy->offset = box_offset(copy->map, shared, "tma_load");
  copy->barrier = barrier_for_copy(barrier, "tma_load");
  std::copy(at, at + 4, copy->at);
  start_task(std::move(copy));
  maybe_switch();
}

void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  auto copy = std::make_unique<BulkLoad>();
  copy->global = global;
  copy->offset = shared_offset(shared, "bulk_load");
  copy->bytes = bytes;
  copy->barrier = barrier_for_copy(barrier, "bulk_load");
  check_bulk(global, copy->offset, bytes, "bulk_load");
  start_task(std::move(copy));
  maybe_switch();
}

void tma_store(const hopper::TensorMap& map, const void* shared, const int (&at)[4]) {
  auto copy = std::make_unique<TensorStore>();
  copy->map = read_map(map, "tma_store");
  std::copy(at, at + 4, copy->at);
  const uint32_t offset = box_offset(copy->map, shared, "tma_store");
  const size_t bytes = box_bytes(copy->map);
  start_store(std::move(copy), offset, bytes);
}

void bulk_reduce_add(float* global, const float* shared, uint32_t bytes) {
  auto copy = std::make_unique<BulkReduceAdd>();
  copy->global = global;
  const uint32_t offset = shared_offset(shared, "bulk_reduce_add");
  check_bulk(global, offset, bytes, "bulk_reduce_add");
  start_store(std::move(copy), offset, bytes);
}

void tma_commit() {
  current->stores.push_back(current->open_stores ? current->open_stores
                                                 : std::make_shared<StoreGroup>());
  current->open_stores = nullptr;
}

void tma_wait(int pending, bool read_only) {
  auto waits = [&] {
    for (size_t i = 0; i + pending < current->stores.size(); ++i)
      if (read_only ? current->stores[i]->unread : current->stores[i]->unwritten) return true;
    return false;
  };
  while (waits())
    sleep_on(current->block->stores_event, [read_only]() -> std::string {
      return read_only ? "tma_wait_read" : "tma_wait";
    });
  while (!current->stores.empty() && current->stores.front()->unwritten == 0)
    current->stores.pop_front();
}

}  // namespace emulator
}  // namespace fusedformer
