#include <cmath>

#include "noise.h"

namespace accumops {

void AddNoiseGroupCpu(const double* norms, std::size_t count, double share, bool starts,
                      double* window) {
  NoiseGroup group = {0, 0, share, starts};
  for (std::size_t i = 0; i < count; ++i) {
    group.gradients += norms[i];
    group.sums += norms[count + i];
  }
  noise::AddGroup(group, window);
}

void EndNoiseWindowCpu(const double* window, const NoiseEnding& ending,
                       const NoiseStatistics& statistics) {
  *statistics.norm = std::sqrt(noise::EndWindow(window, ending, statistics));
}

}  // namespace accumops
