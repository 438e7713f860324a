#include "abi.h"

#include "isa.h"

SYNCR1_EXPORT int32_t syncr1_abi_version() { return SYNCR1_ABI_VERSION; }

// Name of the instruction set in use; null where the environment asks for one that this build or machine lacks.
SYNCR1_EXPORT const char* syncr1_instruction_set() {
  const syncr1::InstructionSet* set = syncr1::instruction_set();
  return set == nullptr ? nullptr : set->name;
}
