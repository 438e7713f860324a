#include "abi.h"

SYNCR1_EXPORT int32_t syncr1_abi_version() { return SYNCR1_ABI_VERSION; }
