// score_rows, loss_rows and gradient_rows of syncr1.kernels.terms.Backend over all rows of a chunk.
//
// Every row is computed by one thread from its own values alone: neither the other rows nor the number of threads
// reach its result.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "abi.h"
#include "bfloat16.h"
#include "isa.h"
#include "parallel.h"
#include "token_loss.h"

// Same fields as `Rows` and `RowTermPointers` in kernels/native/rows.py.
struct syncr1_rows {
  void* products;  // [num_rows, vocabulary], bfloat16 or float
  const int64_t* targets;
  const float* bias;         // [vocabulary] or null
  const int64_t* forbidden;  // [num_forbidden], any order
  const uint32_t* support;   // [num_rows, ceil(vocabulary / 32)] or null
  int64_t bfloat16, row_stride, num_rows, vocabulary, num_forbidden, num_threads;
  double temperature;
};

struct syncr1_row_terms {
  const float *advantage, *weight;
  const float *old_logp, *ref_logp, *is_ratio;  // may be null
};

namespace {

using syncr1::RowInput;
using syncr1::RowSums;

class Rows {
 public:
  explicit Rows(const syncr1_rows& rows)
      : rows_(rows), forbidden_(rows.forbidden, rows.forbidden + rows.num_forbidden) {
    std::sort(forbidden_.begin(), forbidden_.end());
  }

  void* data(int64_t n) const {
    const int64_t width = rows_.bfloat16 != 0 ? 2 : 4;
    return static_cast<char*>(rows_.products) + n * rows_.row_stride * width;
  }

  RowInput operator[](int64_t n) const {
    const int64_t num_forbidden = static_cast<int64_t>(forbidden_.size());
    const float inverse_temperature = static_cast<float>(1.0 / rows_.temperature);
    return {data(n),           rows_.bfloat16 != 0, rows_.vocabulary,    rows_.bias,
            forbidden_.data(), num_forbidden,       inverse_temperature, support(n)};
  }

  // Row n gives this id no probability, whatever its product.
  bool excludes(int64_t n, int64_t id) const {
    return std::binary_search(forbidden_.begin(), forbidden_.end(), id) || !syncr1::keeps(support(n), id);
  }

 private:
  const uint32_t* support(int64_t n) const {
    if (rows_.support == nullptr) return nullptr;
    return rows_.support + n * ((rows_.vocabulary + syncr1::kWord - 1) / syncr1::kWord);
  }

  const syncr1_rows& rows_;
  std::vector<int64_t> forbidden_;
};

struct RowScore {
  float logp, entropy;
  double lse;
};

RowScore score(const RowSums& sums, double temperature) {
  const double log_weight = std::log(sums.weight);
  const double logp = (static_cast<double>(sums.target) - sums.maximum) / temperature - log_weight;
  return {static_cast<float>(logp), static_cast<float>(log_weight - sums.weighted / sums.weight),
          sums.maximum / temperature + log_weight};
}

float element(const void* row, bool bfloat16, int64_t index) {
  if (!bfloat16) return static_cast<const float*>(row)[index];
  return syncr1::from_bfloat16(static_cast<const uint16_t*>(row)[index]);
}

void set_element(void* row, bool bfloat16, int64_t index, double value) {
  const float rounded = static_cast<float>(value);
  if (!bfloat16) {
    static_cast<float*>(row)[index] = rounded;
  } else {
    static_cast<uint16_t*>(row)[index] = syncr1::to_bfloat16(rounded);
  }
}

void clear(void* row, bool bfloat16, int64_t size) {
  std::memset(row, 0, static_cast<size_t>(size) * (bfloat16 ? 2 : 4));
}

// d loss / d logp; a row of weight 0 has none, whatever else it holds.
float row_slope(const syncr1::RowSettings& settings, const syncr1_row_terms& terms, int64_t n, float logp) {
  if (terms.weight[n] == 0.0f) return 0.0f;
  const bool has_old = terms.old_logp != nullptr, has_ref = terms.ref_logp != nullptr;
  const float old_logp = has_old ? terms.old_logp[n] : 0.0f, ref_logp = has_ref ? terms.ref_logp[n] : 0.0f;
  const float is_ratio = terms.is_ratio == nullptr ? 1.0f : terms.is_ratio[n];
  return syncr1::token_gradient(settings, logp, has_old, old_logp, has_ref, ref_logp, terms.advantage[n], is_ratio,
                                terms.weight[n])
      .grad;
}

// The products of one row become slope * d logp / d products. `weights` are those of the row's sums.
void write_loss_gradient(const syncr1_rows& in, const Rows& rows, int64_t n, float slope, float logp,
                         const RowSums& sums, const float* weights, std::vector<float>* block_factor) {
  const bool bfloat16 = in.bfloat16 != 0;
  void* row = rows.data(n);
  if (slope == 0.0f) {
    clear(row, bfloat16, in.vocabulary);
    return;
  }
  const double scaled = slope / in.temperature;
  for (float& factor : *block_factor) {
    const double shift = factor == sums.maximum ? 0.0 : (static_cast<double>(factor) - sums.maximum) / in.temperature;
    factor = static_cast<float>(-scaled * std::exp(shift) / sums.weight);
  }
  syncr1::instruction_set()->rows->scale(weights, block_factor->data(), in.vocabulary, row, bfloat16);
  const int64_t target = in.targets[n];
  if (!rows.excludes(n, target)) set_element(row, bfloat16, target, -scaled * std::expm1(logp));
}

}  // namespace

SYNCR1_EXPORT void syncr1_score_rows(const syncr1_rows* in, float* logp, float* entropy, double* lse) {
  const Rows rows(*in);
  const auto sums = syncr1::instruction_set()->rows->sums;
  syncr1::parallel_rows(in->num_rows, in->vocabulary, in->num_threads, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      RowSums row;
      sums(rows[n], in->targets[n], nullptr, nullptr, &row);
      const RowScore s = score(row, in->temperature);
      logp[n] = s.logp;
      entropy[n] = s.entropy;
      lse[n] = s.lse;
    }
  });
}

SYNCR1_EXPORT void syncr1_loss_rows(const syncr1_rows* in, const syncr1_row_terms* terms,
                                    const syncr1::RowSettings* settings, float* logp, float* entropy) {
  const Rows rows(*in);
  const auto sums = syncr1::instruction_set()->rows->sums;
  syncr1::parallel_rows(in->num_rows, in->vocabulary, in->num_threads, [&](int64_t first, int64_t last) {
    // A float row keeps its weights where its products were; those of a bfloat16 row are rounded only once, at the end.
    std::vector<float> scratch(in->bfloat16 != 0 ? static_cast<size_t>(in->vocabulary) : 0);
    std::vector<float> block(static_cast<size_t>(syncr1::num_blocks(in->vocabulary)));
    for (int64_t n = first; n < last; ++n) {
      float* weights = in->bfloat16 != 0 ? scratch.data() : static_cast<float*>(rows.data(n));
      RowSums row;
      sums(rows[n], in->targets[n], weights, block.data(), &row);
      const RowScore s = score(row, in->temperature);
      logp[n] = s.logp;
      entropy[n] = s.entropy;
      write_loss_gradient(*in, rows, n, row_slope(*settings, *terms, n, s.logp), s.logp, row, weights, &block);
    }
  });
}

// `out` is [num_rows, vocabulary] with its own stride and type; it may be the products. Either gradient may be null.
SYNCR1_EXPORT void syncr1_gradient_rows(const syncr1_rows* in, const double* lse, const float* entropy,
                                        const float* grad_logp, const float* grad_entropy, void* out,
                                        int64_t out_bfloat16, int64_t out_stride) {
  const Rows rows(*in);
  const auto gradient = syncr1::instruction_set()->rows->gradient;
  const bool rounds = out_bfloat16 != 0;
  syncr1::parallel_rows(in->num_rows, in->vocabulary, in->num_threads, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      void* to = static_cast<char*>(out) + n * out_stride * (rounds ? 2 : 4);
      const double by_logp = grad_logp == nullptr ? 0.0 : grad_logp[n] / in->temperature;
      const double by_entropy = grad_entropy == nullptr ? 0.0 : grad_entropy[n] / in->temperature;
      if (by_logp == 0.0 && by_entropy == 0.0) {
        clear(to, rounds, in->vocabulary);
        continue;
      }
      const RowInput row = rows[n];
      const int64_t target = in->targets[n];
      const float bias = row.bias == nullptr ? 0.0f : row.bias[target];
      const double product = element(row.products, row.bfloat16, target) + bias;
      const float rest = static_cast<float>(1.0 / in->temperature - row.inverse_temperature);
      const float whole = static_cast<float>(lse[n]), part = static_cast<float>(lse[n] - whole);
      const float slope = static_cast<float>(-by_logp), entropy_slope = static_cast<float>(-by_entropy);
      gradient(row, {rest, whole, part, entropy[n], slope, entropy_slope}, to, rounds);
      if (rows.excludes(n, target)) continue;
      const double log_p = product / in->temperature - lse[n];
      const double p = std::exp(log_p);
      const double surprise = p > 0.0 ? p * (log_p + entropy[n]) : p * 0.0;
      set_element(to, rounds, target, by_logp * (1.0 - p) - by_entropy * surprise);
    }
  });
}
