// One decode step over shared prefixes: kernels/reference/decode_attention.py.
//
// Neighbouring rows with the same prefix read it once, all their queries at a time; then each row goes on with its own
// columns. A row's operations and their order depend on its own spans alone, not on its neighbours or the threads.
#include "decode_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "abi.h"
#include "bfloat16.h"
#include "isa.h"
#include "parallel.h"

// Same fields as `Decoding` in kernels/native/decode_attention.py. Strides are {row, head} or {head, column}.
struct syncr1_decoding {
  const void *query, *key, *value;           // [num_rows, heads, width]
  const void *prefix_keys, *prefix_values;   // [num_kv_heads, columns, width]
  void *own_keys, *own_values;
  const int64_t* spans;                      // [num_rows, 4]
  void* output;                              // [num_rows, num_heads, width]
  int64_t bfloat16, num_rows, num_heads, num_kv_heads, width, num_threads;
  int64_t query_strides[2], key_strides[2], value_strides[2];
  int64_t prefix_key_strides[2], prefix_value_strides[2], own_key_strides[2], own_value_strides[2];
  double scale;
};

namespace {

using syncr1::Attention;
using syncr1::padded_width;
using syncr1::Span;

constexpr int64_t kMaxQueries = 32;     // queries that read a prefix together
constexpr int64_t kTasksPerThread = 3;  // spans differ in length

const syncr1::DecodeKernels& kernels() { return *syncr1::instruction_set()->decode; }

struct Run {
  int64_t first, last;  // rows
};

// Memory of one thread, for one task at a time.
struct Workspace {
  Workspace(int64_t num_queries, int64_t width) : maxima(num_queries), sums(num_queries * syncr1::kSumLanes) {
    const int64_t scratch_size = (syncr1::scratch_floats(width) + 15) / 16 * 16;
    const int64_t outputs_size = num_queries * padded_width(width);
    memory.reset(new float[scratch_size + outputs_size + num_queries * width + 16]);
    scratch = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);
    outputs = scratch + scratch_size;
    queries = outputs + outputs_size;
  }
  std::unique_ptr<float[]> memory;
  float *scratch, *outputs, *queries;
  std::vector<float> maxima;
  std::vector<double> sums;
};

class Decoder {
 public:
  explicit Decoder(const syncr1_decoding& in)
      : in_(in), kernels_(kernels()), group_(in.num_heads / in.num_kv_heads), item_(in.bfloat16 != 0 ? 2 : 4) {}
  void run() const;

 private:
  std::vector<Run> runs(int64_t max_rows) const;
  void task(const Run& run, int64_t head, Workspace* workspace) const;
  void load_queries(const Run& run, int64_t head, Workspace* workspace) const;
  void store_outputs(const Run& run, int64_t head, const Workspace& workspace) const;
  Span span(const void* keys, const void* values, const int64_t* key_strides, const int64_t* value_strides,
            int64_t head, int64_t start, int64_t length) const;
  void write(void* cache, const int64_t* strides, int64_t head, int64_t column, const void* from,
             const int64_t* from_strides, int64_t row) const;

  const char* at(const void* base, int64_t element) const { return static_cast<const char*>(base) + element * item_; }

  const syncr1_decoding& in_;
  const syncr1::DecodeKernels& kernels_;
  const int64_t group_, item_;
};

// Rows in turn, cut where the prefix changes and after `max_rows`.
std::vector<Run> Decoder::runs(int64_t max_rows) const {
  std::vector<Run> found;
  for (int64_t row = 0; row < in_.num_rows; ++row) {
    const int64_t* span = in_.spans + row * 4;
    const bool same = row > 0 && span[0] == span[-4] && span[1] == span[-3] && span[1] > 0;
    if (same && row - found.back().first < max_rows) {
      found.back().last = row + 1;
    } else {
      found.push_back({row, row + 1});
    }
  }
  return found;
}

Span Decoder::span(const void* keys, const void* values, const int64_t* key_strides, const int64_t* value_strides,
                   int64_t head, int64_t start, int64_t length) const {
  return {at(keys, head * key_strides[0] + start * key_strides[1]),
          at(values, head * value_strides[0] + start * value_strides[1]),
          key_strides[1],
          value_strides[1],
          length,
          in_.bfloat16 != 0};
}

void Decoder::write(void* cache, const int64_t* strides, int64_t head, int64_t column, const void* from,
                    const int64_t* from_strides, int64_t row) const {
  std::memcpy(static_cast<char*>(cache) + (head * strides[0] + column * strides[1]) * item_,
              at(from, row * from_strides[0] + head * from_strides[1]), static_cast<size_t>(in_.width * item_));
}

void Decoder::load_queries(const Run& run, int64_t head, Workspace* workspace) const {
  const float scale = static_cast<float>(in_.scale);
  float* to = workspace->queries;
  for (int64_t row = run.first; row < run.last; ++row) {
    for (int64_t i = 0; i < group_; ++i, to += in_.width) {
      const char* from = at(in_.query, row * in_.query_strides[0] + (head * group_ + i) * in_.query_strides[1]);
      for (int64_t e = 0; e < in_.width; ++e) {
        const float element = in_.bfloat16 != 0 ? syncr1::from_bfloat16(reinterpret_cast<const uint16_t*>(from)[e])
                                                : reinterpret_cast<const float*>(from)[e];
        to[e] = element * scale;
      }
    }
  }
}

void Decoder::store_outputs(const Run& run, int64_t head, const Workspace& workspace) const {
  for (int64_t i = 0; i < (run.last - run.first) * group_; ++i) {
    const int64_t row = run.first + i / group_;
    const int64_t start = (row * in_.num_heads + head * group_ + i % group_) * in_.width;
    const float* from = workspace.outputs + i * padded_width(in_.width);
    double sum = 0.0;
    for (int64_t j = 0; j < syncr1::kSumLanes; ++j) sum += workspace.sums[i * syncr1::kSumLanes + j];
    const float inverse = static_cast<float>(1.0 / sum);
    for (int64_t e = 0; e < in_.width; ++e) {
      if (in_.bfloat16 != 0) {
        static_cast<uint16_t*>(in_.output)[start + e] = syncr1::to_bfloat16(from[e] * inverse);
      } else {
        static_cast<float*>(in_.output)[start + e] = from[e] * inverse;
      }
    }
  }
}

void Decoder::task(const Run& run, int64_t head, Workspace* workspace) const {
  const int64_t padded = padded_width(in_.width), num_queries = (run.last - run.first) * group_;
  load_queries(run, head, workspace);
  std::fill(workspace->outputs, workspace->outputs + num_queries * padded, 0.0f);
  std::fill(workspace->maxima.begin(), workspace->maxima.end(), -INFINITY);
  std::fill(workspace->sums.begin(), workspace->sums.end(), 0.0);
  const auto own = [&](int64_t row) {
    const int64_t* span = in_.spans + row * 4;
    return this->span(in_.own_keys, in_.own_values, in_.own_key_strides, in_.own_value_strides, head, span[2],
                      span[3] + 1);
  };
  Span current = own(run.first);
  const int64_t* shared = in_.spans + run.first * 4;
  if (shared[1] > 0) {
    const Span prefix = span(in_.prefix_keys, in_.prefix_values, in_.prefix_key_strides, in_.prefix_value_strides, head,
                             shared[0], shared[1]);
    kernels_.attend(prefix, &current,
                    {workspace->queries, workspace->outputs, workspace->maxima.data(), workspace->sums.data(),
                     num_queries, in_.width},
                    workspace->scratch);
  }
  for (int64_t row = run.first; row < run.last; ++row) {
    const int64_t* place = in_.spans + row * 4;
    write(in_.own_keys, in_.own_key_strides, head, place[2] + place[3], in_.key, in_.key_strides, row);
    write(in_.own_values, in_.own_value_strides, head, place[2] + place[3], in_.value, in_.value_strides, row);
    const bool last = row + 1 == run.last;
    const Span next = own(last ? row : row + 1);
    const int64_t i = (row - run.first) * group_;
    kernels_.attend(current, last ? nullptr : &next,
                    {workspace->queries + i * in_.width, workspace->outputs + i * padded, workspace->maxima.data() + i,
                     workspace->sums.data() + i * syncr1::kSumLanes, group_, in_.width},
                    workspace->scratch);
    current = next;
  }
  store_outputs(run, head, *workspace);
}

void Decoder::run() const {
  int64_t columns = 0;
  for (int64_t row = 0; row < in_.num_rows; ++row) columns += in_.spans[row * 4 + 1] + in_.spans[row * 4 + 3] + 1;
  const int64_t elements = columns * in_.num_heads * in_.width;
  const int64_t threads = std::max<int64_t>(std::min(in_.num_threads, elements / syncr1::kElementsPerThread), 1);
  int64_t max_rows = std::max<int64_t>(kMaxQueries / group_, 1);
  std::vector<Run> work = runs(max_rows);
  while (threads > 1 && max_rows > 1 &&
         static_cast<int64_t>(work.size()) * in_.num_kv_heads < kTasksPerThread * threads) {
    max_rows /= 2;
    work = runs(max_rows);
  }
  const int64_t num_tasks = static_cast<int64_t>(work.size()) * in_.num_kv_heads;
#pragma omp parallel num_threads(static_cast<int>(threads)) if (threads > 1)
  {
    Workspace workspace(max_rows * group_, in_.width);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < num_tasks; ++i) task(work[i / in_.num_kv_heads], i % in_.num_kv_heads, &workspace);
  }
}

}  // namespace

SYNCR1_EXPORT void syncr1_prefix_decode_attention(const syncr1_decoding* in) { Decoder(*in).run(); }
