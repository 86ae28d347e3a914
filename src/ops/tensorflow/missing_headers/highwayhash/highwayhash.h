#pragma once

namespace highwayhash {
template <unsigned target>
class HighwayHashCatT {};
}  // namespace highwayhash
