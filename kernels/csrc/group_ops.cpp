// Advantages and the DGS keep decision as ops of their own; the statistics are in group_stats.h.
#include <cstdint>

#include "abi.h"
#include "group_stats.h"

SYNCR1_EXPORT void syncr1_group_advantages(const double* reward, const int64_t* offsets, int64_t num_groups,
                                           int64_t scale, double eps, float* out) {
  syncr1::group_advantages(reward, offsets, num_groups, static_cast<syncr1::Scale>(scale), eps, out, nullptr);
}

SYNCR1_EXPORT void syncr1_dgs_select(const double* energy, const double* reward, const int64_t* offsets,
                                     int64_t num_groups, int64_t rule, double mass, int64_t keep, int64_t min_keep,
                                     int64_t seed, uint8_t* out) {
  const syncr1::Selection selection{static_cast<syncr1::Rule>(rule), mass, keep, min_keep, seed};
  syncr1::dgs_select(energy, reward, offsets, num_groups, selection, out);
}
