#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace util {
using uint128_t = std::pair<std::uint64_t, std::uint64_t>;
inline std::uint64_t Uint128Low64(const uint128_t& value) { return value.first; }
inline std::uint64_t Uint128High64(const uint128_t& value) { return value.second; }
std::uint64_t Fingerprint64(const char* data, std::size_t size);
std::uint32_t Fingerprint32(const char* data, std::size_t size);
uint128_t Fingerprint128(const char* data, std::size_t size);
}  // namespace util
