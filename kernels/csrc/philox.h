// Philox4x32-10 (Salmon et al., SC 2011): the generator of kernels/reference/philox.py.
#pragma once
#include <cstdint>

namespace syncr1 {

// One double in (0, 1) on a grid of 2^-48, from key `seed` and counter (`offset`, `stream`).
inline double uniform(int64_t seed, int64_t offset, uint32_t stream) {
  uint32_t counter[4] = {static_cast<uint32_t>(offset), static_cast<uint32_t>(static_cast<uint64_t>(offset) >> 32),
                         stream, 0};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * counter[0];
    const uint64_t b = uint64_t{0xCD9E8D57} * counter[2];
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(a)};
    for (int i = 0; i < 4; ++i) counter[i] = next[i];
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  const uint64_t bits = (uint64_t{counter[0]} << 16) | (counter[1] >> 16);
  return (static_cast<double>(bits) + 0.5) * 0x1p-48;
}

}  // namespace syncr1
