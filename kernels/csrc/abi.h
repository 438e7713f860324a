// Plain C ABI of the native backend. Pointers are raw, contiguous, owned by the caller; sizes are int64.
#pragma once
#include <cstdint>

#define SYNCR1_EXPORT extern "C" __attribute__((visibility("default")))

// Raised whenever a signature below changes; kernels/native.py refuses a library with another number.
constexpr int32_t SYNCR1_ABI_VERSION = 1;
