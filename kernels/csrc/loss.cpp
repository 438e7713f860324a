// The whole loss of log-probabilities in one call: rewards -> advantages and keep -> token losses and their gradient ->
// reduction and metrics (kernels/reference/{scores,loss,reduction}.py).
//
// Threads share work by tiles of tokens or by sequences; each tile has sums of its own, added in order at the end, so
// that the result does not depend on the number of threads. T tokens, S sequences, P groups, M rewards (1, or 2: text,
// image).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "abi.h"
#include "group_stats.h"
#include "loss_terms.h"

namespace syncr1 {
namespace {

constexpr double kMinLogWeight = -18.420680743952367;  // log 1e-8
constexpr double kMaxLogWeight = 20.0;
constexpr int64_t kTokensPerThread = 16384;  // fewer are not worth waking a thread

struct LossOutputs {
  float *loss, *grad, *advantages;
  uint8_t* keep;
  float* metrics;
  int64_t* finite;  // 1 where every value that carries loss is finite, else 0
};

// Advantages [M, S] and keep [S] of the rewards, or the given ones. Returns frac_reward_zero_std.
float score(const LossSettings& settings, const LossInputs& in, float* advantages, uint8_t* keep) {
  const int64_t S = in.num_sequences, M = in.num_rewards;
  // Not `rewards`: of no sequences even given ones have no address.
  if (in.frac_reward_zero_std != nullptr) {
    std::copy(in.advantages, in.advantages + M * S, advantages);
    std::copy(in.keep, in.keep + S, keep);
    return *in.frac_reward_zero_std;
  }
  std::vector<uint8_t> varies(static_cast<size_t>(in.num_groups), 0);
  for (int64_t m = 0; m < M; ++m) {
    group_advantages(in.rewards + m * S, in.group_offsets, in.num_groups, static_cast<Scale>(settings.scale),
                     settings.eps, advantages + m * S, varies.data());
  }
  std::vector<double> energy(static_cast<size_t>(S), 0.0), total(in.rewards, in.rewards + S);
  for (int64_t i = 0; i < M * S; ++i) energy[i % S] += static_cast<double>(advantages[i]) * advantages[i];
  for (int64_t s = 0; M == 2 && s < S; ++s) {
    const double image = in.rewards[S + s];
    if (!std::isnan(image)) total[s] = std::isnan(total[s]) ? image : total[s] + image;
  }
  const Selection selection{static_cast<Rule>(settings.rule), settings.mass, settings.keep, settings.min_keep,
                            settings.seed};
  dgs_select(energy.data(), total.data(), in.group_offsets, in.num_groups, selection, keep);
  const int64_t varied = std::count(varies.begin(), varies.end(), uint8_t{1});
  return static_cast<float>(in.num_groups - varied) / static_cast<float>(std::max<int64_t>(in.num_groups, 1));
}

RowSettings row_settings(const LossSettings& s, int modality) {
  RowSettings row;
  row.loss = s.kind;
  row.clip_low = static_cast<float>(s.clip_low[modality]);
  row.clip_high = static_cast<float>(s.clip_high[modality]);
  row.delta = static_cast<float>(s.delta[modality]);
  row.beta = static_cast<float>(s.beta[modality]);
  row.bias_corrected_kl = static_cast<int32_t>(s.bias_corrected_kl);
  row.sapo_pos = static_cast<float>(s.sapo_tau[0]);
  row.sapo_neg = static_cast<float>(s.sapo_tau[1]);
  return row;
}

// Of the sampler's correction: a sum over loss tokens, or the one of the sequence if it has a loss token.
double sum_log_is(const LossPlan& plan, int64_t s) {
  const LossInputs& in = plan.in;
  const auto log_is = [&](int64_t i) {
    return std::clamp(std::log(static_cast<double>(in.is_ratio[i])), kMinLogWeight, kMaxLogWeight);
  };
  if (in.is_per_sequence != 0) return plan.count[0][s] + plan.count[1][s] > 0 ? log_is(s) : 0.0;
  double total = 0.0;
  for (int64_t t = in.cu_seqlens[s]; t < in.cu_seqlens[s + 1]; ++t) {
    if (in.loss_mask == nullptr || in.loss_mask[t] != 0) total += log_is(t);
  }
  return total;
}

// phi of vespo, for advantages >= 0 and < 0.
void set_phi(LossPlan& plan, int64_t s, double log_ratio) {
  const double log_is = plan.in.is_ratio == nullptr ? 0.0 : sum_log_is(plan, s);
  const double log_w = std::clamp(log_ratio + log_is, kMinLogWeight, kMaxLogWeight);
  for (int negative = 0; negative < 2; ++negative) {
    const double k = plan.settings.vespo_k[negative];
    const double lambda = std::max(plan.settings.vespo_lambda[negative], 1e-4);
    plan.phi[negative][s] = static_cast<float>(std::exp(lambda + k * log_w - lambda * std::exp(log_w)));
  }
}

// The ratio of the sequence. A mean of bounded logarithms is bounded, their sum is not.
void set_ratio(LossPlan& plan, int64_t s, double log_ratio) {
  const int64_t num_tokens = std::max<int64_t>(plan.count[0][s] + plan.count[1][s], 1);
  if (plan.settings.ratio == kSequence) {
    plan.ratio[s] = plan.slope[s] = static_cast<float>(std::exp(log_ratio / static_cast<double>(num_tokens)));
    return;
  }
  constexpr double kBound = kMaxLogRatio;
  plan.ratio[s] = static_cast<float>(std::exp(std::clamp(log_ratio, -kBound, kBound)));
  plan.slope[s] = std::fabs(log_ratio) > kBound ? 0.0f : plan.ratio[s];
}

// Counts, and what the ratio of the sequence or vespo need; nothing of a pruned sequence.
void describe_sequences(LossPlan& plan, int64_t num_threads) {
  const int64_t S = plan.in.num_sequences;
  const bool vespo = plan.settings.kind == kVespo, sequence_ratio = plan.settings.ratio != kToken;
  const bool sums = (vespo || sequence_ratio) && plan.in.old_logp != nullptr;
  const int64_t team = sums || vespo ? num_threads : 1;  // counting alone takes less than starting a team
  for (auto& count : plan.count) count.assign(static_cast<size_t>(S), 0);
  for (auto* values : {&plan.ratio, &plan.slope}) values->assign(static_cast<size_t>(sequence_ratio ? S : 0), 1.0f);
  for (auto& phi : plan.phi) phi.assign(static_cast<size_t>(vespo ? S : 0), 0.0f);
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(team)) if (team > 1)
  for (int64_t s = 0; s < S; ++s) {
    if (plan.keep[s] == 0) continue;
    const int64_t begin = plan.in.cu_seqlens[s], end = plan.in.cu_seqlens[s + 1];
    int64_t count[2];
    count_tokens(plan.in, begin, end, count);
    for (int m = 0; m < 2; ++m) plan.count[m][s] = count[m];
    const double log_ratio = sums ? sum_log_ratio(plan.in, begin, end) : 0.0;
    if (sequence_ratio) set_ratio(plan, s, log_ratio);
    if (vespo) set_phi(plan, s, log_ratio);
  }
}

// What dapo, cispo and vespo divide modality m by; `counted` are the loss tokens it is reduced with.
double item_divisor(const LossPlan& plan, int m, int64_t counted) {
  const LossInputs& in = plan.in;
  double items = static_cast<double>(counted);
  if (plan.settings.has_num_items != 0) items = plan.settings.num_items[m];
  const bool own = plan.settings.split_modalities != 0 && in.num_items_count == 2;
  if (in.num_items != nullptr) items = static_cast<double>(in.num_items[own ? m : 0]);
  return std::max(items, 1.0);
}

// The loss is sum_t weight_t * loss_t: what each reduction gives a token of modality m in sequence s.
void set_weights(LossPlan& plan, const int64_t num_loss_tokens[2]) {
  const LossSettings& settings = plan.settings;
  const int64_t S = plan.in.num_sequences;
  const bool split = settings.split_modalities != 0;
  const double num_sequences =
      std::max(settings.num_sequences < 0 ? static_cast<double>(S) : settings.num_sequences, 1.0);
  for (int m = 0; m < 2; ++m) {
    const int64_t counted = split ? num_loss_tokens[m] : num_loss_tokens[0] + num_loss_tokens[1];
    double divisor = static_cast<double>(std::max<int64_t>(counted, 1));
    if (settings.reduction == kItems) divisor = item_divisor(plan, m, counted);
    if (settings.reduction == kSequences) divisor = num_sequences * settings.max_length;
    plan.weight[m].assign(static_cast<size_t>(S), static_cast<float>(settings.weight[m] / divisor));
    if (settings.reduction != kSequenceMean) continue;
    for (int64_t s = 0; s < S; ++s) {
      const int64_t count = split ? plan.count[m][s] : plan.count[0][s] + plan.count[1][s];
      divisor = static_cast<double>(std::max<int64_t>(count, 1)) * num_sequences;
      plan.weight[m][s] = static_cast<float>(settings.weight[m] / divisor);
    }
  }
}

// Loss and the metrics of the modalities, the tiles added in their order.
void reduce(const std::vector<TileSums>& tiles, const int64_t num_loss_tokens[2], float* loss, float* metrics) {
  double total = 0.0;
  for (const TileSums& tile : tiles) total += tile.loss;
  *loss = static_cast<float>(total);
  for (int m = 0; m < 2; ++m) {
    ModalitySums sums;
    for (const TileSums& tile : tiles) {
      const ModalitySums& part = tile.modality[m];
      sums.clip_low += part.clip_low;
      sums.clip_high += part.clip_high;
      sums.ratio += part.ratio;
      sums.kl += part.kl;
      sums.entropy += part.entropy;
      sums.ratio_max = std::max(sums.ratio_max, part.ratio_max);
      sums.ratio_min = std::min(sums.ratio_min, part.ratio_min);
    }
    const double divisor = static_cast<double>(std::max<int64_t>(num_loss_tokens[m], 1));
    for (const double value : {sums.clip_low, sums.clip_high, sums.ratio, sums.kl, sums.entropy}) {
      *metrics++ = static_cast<float>(value / divisor);
    }
    *metrics++ = num_loss_tokens[m] > 0 ? sums.ratio_max : 1.0f;
    *metrics++ = num_loss_tokens[m] > 0 ? sums.ratio_min : 1.0f;
    *metrics++ = static_cast<float>(num_loss_tokens[m]);
  }
}

// All tiles, then what comes through the ratios of the sequences.
void run_tiles(const LossPlan& plan, int64_t num_threads, float* grad, std::vector<TileSums>& tiles) {
  const int64_t num_tiles = static_cast<int64_t>(tiles.size()), S = plan.in.num_sequences;
  const int team = static_cast<int>(num_threads);
  if (plan.settings.ratio == kToken) {
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
    for (int64_t i = 0; i < num_tiles; ++i) run_tile(plan, i, grad, nullptr, &tiles[i]);
    return;
  }
  const std::unique_ptr<float[]> by_ratio(new float[static_cast<size_t>(plan.num_tokens)]);
#pragma omp parallel num_threads(team) if (team > 1)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < num_tiles; ++i) run_tile(plan, i, grad, by_ratio.get(), &tiles[i]);
#pragma omp for schedule(static)
    for (int64_t s = 0; s < S; ++s) add_sequence_gradient(plan, s, by_ratio.get(), grad);
  }
}

void token_loss(const LossSettings& settings, const LossInputs& in, const LossOutputs& out, int64_t num_threads) {
  const int64_t S = in.num_sequences, T = in.cu_seqlens[S];
  LossPlan plan{settings, in, T, {}, {}, out.keep, {}, {}, {}, {}, {}};
  out.metrics[0] = score(settings, in, out.advantages, out.keep);
  const int64_t kept = std::count_if(out.keep, out.keep + S, [](uint8_t k) { return k != 0; });
  out.metrics[1] = static_cast<float>(kept) / static_cast<float>(std::max<int64_t>(S, 1));
  for (int m = 0; m < 2; ++m) {
    plan.row[m] = row_settings(settings, m);
    plan.advantages[m] = out.advantages + (in.num_rewards == 2 ? m * S : 0);
  }
  const int64_t team = std::clamp<int64_t>(T / kTokensPerThread, 1, std::max<int64_t>(num_threads, 1));
  describe_sequences(plan, team);
  int64_t num_loss_tokens[2] = {0, 0};
  for (int m = 0; m < 2; ++m) {
    for (const int64_t count : plan.count[m]) num_loss_tokens[m] += count;
  }
  set_weights(plan, num_loss_tokens);
  std::vector<TileSums> tiles(static_cast<size_t>((T + kTileSize - 1) / kTileSize));
  run_tiles(plan, team, out.grad, tiles);
  reduce(tiles, num_loss_tokens, out.loss, out.metrics + 2);
  *out.finite = std::all_of(tiles.begin(), tiles.end(), [](const TileSums& tile) { return tile.nonfinite == 0; });
}

}  // namespace
}  // namespace syncr1

SYNCR1_EXPORT void syncr1_token_loss(const syncr1::LossSettings* settings, const syncr1::LossInputs* inputs,
                                     float* loss, float* grad, float* advantages, uint8_t* keep, float* metrics,
                                     int64_t* finite, int64_t num_threads) {
  syncr1::token_loss(*settings, *inputs, {loss, grad, advantages, keep, metrics, finite}, num_threads);
}
