#include "moments_channel.h"

namespace accumops {
namespace {

void Merge(const MomentsMerge& args) {
  WithTypesOf(args, [&](auto* batch, auto* moving) {
    using Batch = std::remove_pointer_t<decltype(batch)>;
    using Moving = std::remove_pointer_t<decltype(moving)>;
    bool counts = true;
    if (args.only_finite) {
      for (std::int64_t c = 0; c < args.channels && counts; ++c) counts = IsFinite<Batch>(args, c);
    }
    const MergePlan plan(args, counts);
    for (std::int64_t c = 0; c < args.channels; ++c) MergeChannel<Batch, Moving>(args, plan, c);
    plan.Count(args);
  });
}

}  // namespace

void MergeMomentsCpu(const MomentsMerges& args) {
  if (args.applies != nullptr && !*args.applies) return;
  for (std::size_t i = 0; i < args.count; ++i) Merge(args.merges[i]);
}

}  // namespace accumops
