// AccumOps>MergeMoments, AccumOps>AddToWindows and AccumOps>EndWindows on the CPU and, where the
// library has CUDA kernels, on GPUs: they check the inputs and call a launcher.
#include <vector>

#include "absl/strings/str_cat.h"
#include "input_checks.h"
#include "kernel_support.h"
#include "moments.h"
#include "moments_attributes.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "variable_list.h"

namespace accumops {
namespace {

// The launchers of a device.
struct Cpu {
  static absl::Status Merge(OpKernelContext*, const MomentsMerges& args) {
    MergeMomentsCpu(args);
    return absl::OkStatus();
  }
  static constexpr CopyBytes kCopy = CopyOnHost;
};

#if defined(ACCUMOPS_CUDA)
struct Gpu {
  static absl::Status Merge(OpKernelContext* ctx, const MomentsMerges& args) {
    return FromCuda(MergeMomentsCuda(args, CudaStream(ctx)));
  }
  static constexpr CopyBytes kCopy = CopyOnDevice;
};
#endif

// Variables i and i + 1.
MomentsWindow WindowAt(const VariableList& variables, std::size_t i, std::int64_t channels) {
  auto* const values = static_cast<double*>(variables.tensor(i + 1).data());
  return {static_cast<std::int64_t*>(variables.tensor(i).data()), values, values + channels};
}

MovingStatistics MovingAt(const VariableList& variables, std::size_t i, double momentum) {
  return {variables.tensor(i).data(), variables.tensor(i + 1).data(),
          ToDType(variables.tensor(i).dtype()), momentum};
}

// The moments from input i of a list on.
BatchMoments BatchAt(const Tensor& count, const OpInputList& moments, int i) {
  return {count.scalar<std::int64_t>().data(), moments[i].data(), moments[i + 1].data(),
          moments[i + 2].data(), ToDType(moments[i].dtype())};
}

template <typename Launchers>
class MergeMomentsOp : public ParallelKernel {
 public:
  explicit MergeMomentsOp(OpKernelConstruction* construction) : ParallelKernel(construction) {
    OP_REQUIRES_OK(construction, attributes_.Read(*construction));
  }

  void Compute(OpKernelContext* ctx) final {
    MomentsMerge args = {};
    VariableList variables;
    OP_REQUIRES_OK(ctx, variables.Add(ctx, "window"));
    OP_REQUIRES_OK(ctx, variables.Add(ctx, "moving"));
    OP_REQUIRES_OK(ctx, variables.Lock());
    OpInputList moments;
    OP_REQUIRES_OK(ctx, ctx->input_list("moments", &moments));
    std::vector<TensorShape> shapes;
    for (const Tensor& each : moments) shapes.push_back(each.shape());
    OP_REQUIRES_OK(ctx, CheckMoments(variables, attributes_, shapes, &args.channels));
    const Tensor* momentum = nullptr;
    OP_REQUIRES_OK(ctx, RequireScalar(ctx, "momentum", &momentum));
    if (attributes_.batches != 0) {
      const Tensor* count = nullptr;  // the one item of its list
      OP_REQUIRES_OK(ctx, RequireScalar(ctx, "count", &count));
      args.batch = BatchAt(*count, moments, 0);
      args.only_finite = attributes_.only_finite;
    }
    OP_REQUIRES_OK(ctx, variables.MakeWritable(ctx, Launchers::kCopy, variables.size()));
    if (attributes_.window != 0) args.window = WindowAt(variables, 0, args.channels);
    if (attributes_.moving != 0) {
      args.moving = MovingAt(variables, static_cast<std::size_t>(attributes_.window),
                             momentum->scalar<double>()());
    }
    OP_REQUIRES_OK(ctx, Launchers::Merge(ctx, {&args, 1, nullptr}));
  }

 private:
  MomentsAttributes attributes_;
};

template <typename Launchers>
class AddToWindowsOp : public ParallelKernel {
 public:
  explicit AddToWindowsOp(OpKernelConstruction* construction) : ParallelKernel(construction) {
    OP_REQUIRES_OK(construction, attributes_.Read(*construction));
  }

  void Compute(OpKernelContext* ctx) final {
    OpInputList counts, moments;
    OP_REQUIRES_OK(ctx, ctx->input_list("counts", &counts));
    OP_REQUIRES_OK(ctx, ctx->input_list("moments", &moments));
    const Tensor* applies = nullptr;
    OP_REQUIRES_OK(ctx, RequireScalar(ctx, "applies", &applies));
    VariableList variables;
    OP_REQUIRES_OK(ctx, variables.Add(ctx, "windows"));
    OP_REQUIRES_OK(ctx, variables.Lock());
    std::vector<std::int64_t> channels;
    OP_REQUIRES_OK(ctx, CheckWindows(variables, attributes_.windows, /*moving=*/false, &channels));
    for (int i = 0; i < attributes_.windows; ++i) {
      OP_REQUIRES_OK(ctx, CheckScalar(absl::StrCat("counts[", i, "]").c_str(), counts[i].shape()));
      for (int k = 3 * i; k < 3 * i + 3; ++k) {
        OP_REQUIRES_OK(ctx,
                       CheckChannels(absl::StrCat("moments[", k, "]").c_str(), moments[k].shape(),
                                     channels[static_cast<std::size_t>(i)]));
      }
    }
    OP_REQUIRES_OK(ctx, variables.MakeWritable(ctx, Launchers::kCopy, variables.size()));
    std::vector<MomentsMerge> merges(channels.size());
    for (std::size_t i = 0; i < merges.size(); ++i) {
      const int batch = static_cast<int>(i);
      merges[i].channels = channels[i];
      merges[i].batch = BatchAt(counts[batch], moments, 3 * batch);
      merges[i].window = WindowAt(variables, 2 * i, channels[i]);
    }
    OP_REQUIRES_OK(
        ctx, Launchers::Merge(ctx, {merges.data(), merges.size(), applies->scalar<bool>().data()}));
  }

 private:
  AddToWindowsAttributes attributes_;
};

template <typename Launchers>
class EndWindowsOp : public ParallelKernel {
 public:
  explicit EndWindowsOp(OpKernelConstruction* construction) : ParallelKernel(construction) {
    OP_REQUIRES_OK(construction, attributes_.Read(*construction));
  }

  void Compute(OpKernelContext* ctx) final {
    VariableList variables;
    OP_REQUIRES_OK(ctx, variables.Add(ctx, "windows"));
    OP_REQUIRES_OK(ctx, variables.Add(ctx, "moving"));
    OP_REQUIRES_OK(ctx, variables.Lock());
    std::vector<std::int64_t> channels;
    OP_REQUIRES_OK(ctx,
                   CheckWindows(variables, attributes_.windows, attributes_.moving, &channels));
    const Tensor *momenta, *applies;
    OP_REQUIRES_OK(ctx, ctx->input("momenta", &momenta));
    OP_REQUIRES_OK(ctx, CheckMomenta(attributes_, momenta->shape()));
    OP_REQUIRES_OK(ctx, RequireScalar(ctx, "applies", &applies));
    OP_REQUIRES_OK(ctx, variables.MakeWritable(ctx, Launchers::kCopy, variables.size()));
    std::vector<MomentsMerge> ends(channels.size());
    for (std::size_t i = 0; i < ends.size(); ++i) {
      ends[i].channels = channels[i];
      ends[i].window = WindowAt(variables, 2 * i, channels[i]);
      if (attributes_.moving) {
        ends[i].moving = MovingAt(variables, 2 * (channels.size() + i),
                                  momenta->vec<double>()(static_cast<Eigen::Index>(i)));
      }
    }
    OP_REQUIRES_OK(
        ctx, Launchers::Merge(ctx, {ends.data(), ends.size(), applies->scalar<bool>().data()}));
  }

 private:
  EndWindowsAttributes attributes_;
};

REGISTER_KERNEL_BUILDER(Name("AccumOps>MergeMoments").Device(tensorflow::DEVICE_CPU),
                        MergeMomentsOp<Cpu>);
REGISTER_KERNEL_BUILDER(Name("AccumOps>AddToWindows").Device(tensorflow::DEVICE_CPU),
                        AddToWindowsOp<Cpu>);
REGISTER_KERNEL_BUILDER(Name("AccumOps>EndWindows").Device(tensorflow::DEVICE_CPU),
                        EndWindowsOp<Cpu>);
#if defined(ACCUMOPS_CUDA)
REGISTER_KERNEL_BUILDER(
    Name("AccumOps>MergeMoments").Device(tensorflow::DEVICE_GPU).HostMemory("momentum"),
    MergeMomentsOp<Gpu>);
REGISTER_KERNEL_BUILDER(Name("AccumOps>AddToWindows").Device(tensorflow::DEVICE_GPU),
                        AddToWindowsOp<Gpu>);
REGISTER_KERNEL_BUILDER(
    Name("AccumOps>EndWindows").Device(tensorflow::DEVICE_GPU).HostMemory("momenta"),
    EndWindowsOp<Gpu>);
#endif

}  // namespace
}  // namespace accumops
