// Blocks of a row as floats: read with bias and forbidden ids, written in the row's own type. Compiled once per
// instruction set, see vec.h.
#pragma once
#include <cmath>
#include <cstring>

#include "rows.h"
#include "vec.h"

namespace syncr1 {
namespace SYNCR1_NAMESPACE {

// Where in the ascending list of forbidden ids the sweep over the row is.
struct Forbidden {
  const int64_t* next;
  const int64_t* end;
  explicit Forbidden(const RowInput& row) : next(row.forbidden), end(row.forbidden + row.num_forbidden) {}
};

SYNCR1_INLINE int64_t block_size(int64_t size, int64_t start) { return size - start < kBlock ? size - start : kBlock; }

SYNCR1_INLINE void read_block(const void* row, bool bfloat16, int64_t start, int64_t size, float* block) {
  if (!bfloat16) {
    std::memcpy(block, static_cast<const float*>(row) + start, static_cast<size_t>(size) * sizeof(float));
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(row) + start;
  int64_t i = 0;
  for (; i + kFloats <= size; i += kFloats) store(block + i, load_bfloat16(from + i));
  if (i < size) {
    uint16_t rest[kFloats] = {};
    std::memcpy(rest, from + i, static_cast<size_t>(size - i) * sizeof(uint16_t));
    store(block + i, load_bfloat16(rest));
  }
}

// product + bias, -inf at forbidden ids, outside the support and up to the next whole vector; returns the size with that
// padding.
SYNCR1_INLINE int64_t load_block(const RowInput& row, int64_t start, Forbidden* forbidden, float* block) {
  const int64_t size = block_size(row.size, start);
  read_block(row.products, row.bfloat16, start, size, block);
  if (row.bias != nullptr) {
    for (int64_t i = 0; i < size; ++i) block[i] += row.bias[start + i];
  }
  for (; forbidden->next != forbidden->end && *forbidden->next < start + kBlock; ++forbidden->next) {
    block[*forbidden->next - start] = -INFINITY;
  }
  int64_t end = size;
  for (; end % kFloats != 0; ++end) block[end] = -INFINITY;
  if (row.support != nullptr) {
    const uint32_t* words = row.support + start / kWord;
    for (int64_t i = 0; i < end; i += kFloats) {
      store(block + i, kept(load<Floats>(block + i), words[i / kWord] >> (i % kWord)));
    }
  }
  return end;
}

// What follows a block in memory, and how many bytes of it belong to one vector: for prefetching.
SYNCR1_INLINE const char* next_block(const RowInput& row, int64_t start) {
  return static_cast<const char*>(row.products) + (start + kBlock) * (row.bfloat16 ? 2 : 4);
}

SYNCR1_INLINE int64_t vector_bytes(const RowInput& row) { return kFloats * (row.bfloat16 ? 2 : 4); }

// NaN counts as nothing.
SYNCR1_INLINE float block_largest(const float* block, int64_t size) {
  Floats best = broadcast(-INFINITY);
  for (int64_t i = 0; i < size; i += kFloats) best = maximum(load<Floats>(block + i), best);
  return largest(best);
}

SYNCR1_INLINE void store_block(const float* block, void* row, bool bfloat16, int64_t start, int64_t size) {
  if (!bfloat16) {
    std::memcpy(static_cast<float*>(row) + start, block, static_cast<size_t>(size) * sizeof(float));
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(row) + start;
  int64_t i = 0;
  for (; i + kFloats <= size; i += kFloats) store_bfloat16(to + i, load<Floats>(block + i));
  if (i < size) {
    alignas(64) float last[kFloats] = {};
    uint16_t rest[kFloats];
    std::memcpy(last, block + i, static_cast<size_t>(size - i) * sizeof(float));
    store_bfloat16(rest, load<Floats>(last));
    std::memcpy(to + i, rest, static_cast<size_t>(size - i) * sizeof(uint16_t));
  }
}

}  // namespace SYNCR1_NAMESPACE
}  // namespace syncr1
