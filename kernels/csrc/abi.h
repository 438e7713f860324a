// Plain C ABI of the native backend. Pointers are raw and owned by the caller; sizes and strides count elements.
#pragma once
#include <cstdint>

#define SYNCR1_EXPORT extern "C" __attribute__((visibility("default")))

// Raised whenever a signature or a struct changes; kernels/native/library.py refuses a library with another number.
constexpr int32_t SYNCR1_ABI_VERSION = 8;
