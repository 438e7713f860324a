// What loss.cpp and loss_tile.cpp share: the arguments of syncr1_token_loss and what is known of each sequence.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

#include "token_loss.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define SYNCR1_LOSS_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SYNCR1_LOSS_CLONES
#endif

namespace syncr1 {

enum Reduction : int64_t { kSequenceMean, kTokenMean, kItems, kSequences };

// syncr1.kernels.options.RATIOS: of each token, or of its sequence the geometric mean or the product.
enum RatioKind : int64_t { kToken, kSequence, kProduct };

// LossOptions as numbers, pairs in the order text, image; `_Settings` of kernels/native/loss.py field by field.
struct LossSettings {
  int64_t kind, reduction, ratio, bias_corrected_kl, scale, rule, keep, min_keep, seed;
  int64_t split_modalities, has_num_items;  // split: each modality is reduced on its own
  double eps, mass, num_sequences, max_length;  // num_sequences is negative for S
  double clip_low[2], clip_high[2], delta[2], beta[2], weight[2], num_items[2];
  double sapo_tau[2], vespo_k[2], vespo_lambda[2];  // positive, negative advantages
};

// LossTerms; `_Inputs` of kernels/native/loss.py field by field. Absent tensors are null.
struct LossInputs {
  const int64_t *cu_seqlens, *group_offsets;
  const float *logp, *old_logp, *ref_logp, *entropy;
  const uint8_t *loss_mask, *modality;
  const float* is_ratio;
  const double* rewards;
  const float* advantages;
  const uint8_t* keep;
  const float *frac_reward_zero_std, *entropy_thresholds, *num_items;
  int64_t num_sequences, num_groups, num_rewards, is_per_sequence;
  int64_t num_items_count;  // of the tensor that replaces the settings' num_items: 1 for both modalities, or 2
};

// Everything that the token loops need. Pairs are text, image unless noted.
struct LossPlan {
  const LossSettings& settings;
  const LossInputs& in;
  int64_t num_tokens;
  RowSettings row[2];
  const float* advantages[2];    // [S]
  const uint8_t* keep;           // [S]
  std::vector<int64_t> count[2];  // [S] loss tokens
  std::vector<float> ratio;       // [S] where a sequence has one
  std::vector<float> slope;       // [S] beside it: d ratio / d its logarithm, 0 beyond the bound
  std::vector<float> phi[2];      // [S] where vespo, for advantages >= 0 and < 0
  std::vector<float> weight[2];   // [S] of the modality times that of the reduction
};

// Sums over the loss tokens of one modality.
struct ModalitySums {
  double clip_low = 0.0, clip_high = 0.0, ratio = 0.0, kl = 0.0, entropy = 0.0;
  float ratio_max = -INFINITY, ratio_min = INFINITY;
};

struct TileSums {
  double loss = 0.0;
  uint32_t nonfinite = 0;  // not 0 where some value that carries loss is NaN or infinite
  ModalitySums modality[2];
};

constexpr int64_t kTileSize = 512;  // tokens; the arrays of a tile stay in the first-level cache

// Counts of loss tokens per modality in [begin, end), the mask of a kept sequence.
void count_tokens(const LossInputs& in, int64_t begin, int64_t end, int64_t count[2]);

// Sum of clamp(logp - old) over the loss tokens in [begin, end).
double sum_log_ratio(const LossInputs& in, int64_t begin, int64_t end);

// Losses and gradients of the tokens [tile * kTileSize, …). Where the ratio is the sequence's, `grad` lacks the part
// through it and `by_ratio` [T] receives weight * d loss / d ratio.
void run_tile(const LossPlan& plan, int64_t tile, float* grad, float* by_ratio, TileSums* sums);

// Adds what comes through the ratio of sequence `s` to `grad`.
void add_sequence_gradient(const LossPlan& plan, int64_t s, const float* by_ratio, float* grad);

}  // namespace syncr1
