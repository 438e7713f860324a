// Rows shared out among threads.
#pragma once
#include <algorithm>
#include <cstdint>

namespace syncr1 {

// Fewer elements than this are not worth waking a thread for.
constexpr int64_t kElementsPerThread = 16384;

// body(first, last) on contiguous ranges of [0, num_rows), one for each thread. Which thread has a row must not reach
// its result.
template <typename Body>
void parallel_rows(int64_t num_rows, int64_t row_size, int64_t num_threads, const Body& body) {
  const int64_t worthwhile = std::max<int64_t>(num_rows * row_size / kElementsPerThread, 1);
  const int64_t threads = std::max<int64_t>(std::min({num_threads, num_rows, worthwhile}), 1);
  if (threads == 1) {
    body(int64_t{0}, num_rows);
    return;
  }
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(threads))
  for (int64_t t = 0; t < threads; ++t) body(num_rows * t / threads, num_rows * (t + 1) / threads);
}

}  // namespace syncr1
