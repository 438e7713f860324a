#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace syncr1 {

#define SYNCR1_DECLARE(set)                  \
  namespace set {                            \
  extern const RowKernels row_kernels;       \
  extern const SampleKernels sample_kernels; \
  extern const DecodeKernels decode_kernels; \
  extern const TrunkKernels trunk_kernels;   \
  }

#define SYNCR1_SET(set) \
  {#set, &set::row_kernels, &set::sample_kernels, &set::decode_kernels, &set::trunk_kernels}

SYNCR1_DECLARE(generic)
#ifdef SYNCR1_X86
SYNCR1_DECLARE(avx2)
SYNCR1_DECLARE(avx512)
#endif

namespace {

struct Candidate {
  InstructionSet set;
  bool present;
};

const InstructionSet* choose() {
#ifdef SYNCR1_X86
  __builtin_cpu_init();
  const bool has_fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_512 = has_fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                       __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#endif
  static const Candidate candidates[] = {
#ifdef SYNCR1_X86
      {SYNCR1_SET(avx512), has_512},
      {SYNCR1_SET(avx2), has_fma},
#endif
      {SYNCR1_SET(generic), true},
  };
  const char* wanted = std::getenv("SYNCR1_ISA");
  for (const Candidate& candidate : candidates) {
    const bool asked = wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, candidate.set.name) == 0;
    if (candidate.present && asked) return &candidate.set;
  }
  return nullptr;
}

}  // namespace

const InstructionSet* instruction_set() {
  static const InstructionSet* const chosen = choose();
  return chosen;
}

}  // namespace syncr1
