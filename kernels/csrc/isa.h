// The instruction sets that the row kernels (*_isa.cpp) are compiled for, and the one this machine uses.
#pragma once
#include "decode_attention.h"
#include "rows.h"
#include "sample.h"
#include "trunk.h"

namespace syncr1 {

struct InstructionSet {
  const char* name;
  const RowKernels* rows;
  const SampleKernels* sample;
  const DecodeKernels* decode;
  const TrunkKernels* trunk;
};

// The widest one that the machine has, or the one that SYNCR1_ISA names (generic, avx2, avx512); chosen once. Null
// where SYNCR1_ISA names one that is not there.
const InstructionSet* instruction_set();

}  // namespace syncr1
