// The CUDA functions of the table in backend.h: plans, memory for the launch, launches.
//
// Everything runs on the current stream of the current device, which is that of the tensors;
// nothing waits for it.
#include "../backend.h"

#include "resident.h"

namespace bnorm_ext {
namespace cuda {
namespace {

int64_t mask_bytes(const Input& in) {
  return cuda::mask_bytes(in.shape, element_bytes(in));
}

void set_shape(InputParams* p, const Shape& shape) {
  p->shape = shape;
  p->per_value = 1 / static_cast<double>(shape.N * shape.S);
}

// What all kernels that write y take.
template <typename Params>
Params params(const ForwardCall& c) {
  Params p;
  set_shape(&p, c.in.shape);
  p.dtype = c.in.dtype;
  p.x = c.in.tensor.const_data_ptr();
  p.y = c.y.data_ptr();
  p.weight = c.weight;
  p.bias = c.bias;
  p.epilogue = epilogue_params(c.epilogue);
  if (c.mask.numel() != 0) p.mask = mask_of(c.in.shape, c.mask.data_ptr<uint8_t>());
  return p;
}

void align_if_grouped(ForwardCall& c) {
  c.in.tensor = aligned_if_grouped(c.in.tensor, c.in);
  c.epilogue.residual = aligned_if_grouped(c.epilogue.residual, c.in);
}

bool is_aligned(const ForwardCall& c) {
  return aligned(c.in.tensor.const_data_ptr(), c.y.const_data_ptr(), data_of(c.epilogue.residual));
}

// num_batches_tracked is incremented here, after the statistics kernel has read it.
void run_normalise(const ForwardCall& c, const Statistics& statistics,
                   int64_t* num_batches_tracked = nullptr) {
  auto p = params<NormaliseParams>(c);
  p.plan = plan_for(c.in, is_aligned(c));
  p.statistics = statistics;
  p.num_batches_tracked = num_batches_tracked;
  check_launch(launch_normalise(p, stream()), "normalise");
}

void normalise(ForwardCall& c, const Statistics& statistics) {
  align_if_grouped(c);
  run_normalise(c, statistics);
}

StatisticsParams statistics_params(const Input& in) {
  StatisticsParams p;
  set_shape(&p, in.shape);
  p.plan = plan_for(in, aligned(in.tensor.const_data_ptr()));
  p.dtype = in.dtype;
  p.x = in.tensor.const_data_ptr();
  return p;
}

void statistics(Input& in, const Tensor& mean, const Tensor& var) {
  in.tensor = aligned_if_grouped(in.tensor, in);
  StatisticsParams p = statistics_params(in);
  const StagingMemory staging(p.plan, in);
  p.staging = *staging;
  p.wide_mean = mean.data_ptr<double>();
  p.wide_var = var.data_ptr<double>();
  check_launch(launch_statistics(p, stream()), "statistics");
}

// Everything in one launch. False: use two passes (the plan says so, or the device refused the
// launch).
bool train_resident(const ForwardCall& c, const RunningUpdate& running, double eps,
                    const Tensor& mean, const Tensor& rstd) {
  auto p = params<ResidentForwardParams>(c);
  p.plan = plan_forward(c.in, is_aligned(c), is_plain(p));
  if (p.plan.path == Path::TwoPass) return false;
  const TeamMemory memory(p.plan, c.in, running.cumulative && p.plan.tile_plan.tiles > 1);
  p.staging = *memory;
  p.tiles_done = memory.tiles_done();
  p.eps = eps;
  p.mean = mean.data_ptr();
  p.rstd = rstd.data_ptr();
  p.running = running;
  return is_launched(launch_resident_forward(p, stream()), "forward in one launch");
}

void train(ForwardCall& c, double eps, const RunningUpdate& running, const Tensor& mean,
           const Tensor& rstd) {
  align_if_grouped(c);
  if (train_resident(c, running, eps, mean, rstd)) return;
  StatisticsParams p = statistics_params(c.in);
  const StagingMemory staging(p.plan, c.in);
  p.staging = *staging;
  p.eps = eps;
  p.mean = mean.data_ptr();
  p.rstd = rstd.data_ptr();
  p.running = running;
  check_launch(launch_statistics(p, stream()), "statistics");
  run_normalise(c, known_statistics(mean, rstd), running.num_batches_tracked);
}

void merge(const Tensor& mean, const Tensor& var, const Tensor& count, double eps,
           const RunningUpdate& running, const Tensor& merged_mean, const Tensor& merged_rstd) {
  MergeParams p;
  p.W = mean.size(0);
  p.C = mean.size(1);
  p.mean = mean.const_data_ptr<double>();
  p.var = var.const_data_ptr<double>();
  p.count = count.const_data_ptr<double>();
  p.dtype = dtype_of(merged_mean);
  p.eps = eps;
  p.merged_mean = merged_mean.data_ptr();
  p.merged_rstd = merged_rstd.data_ptr();
  p.running = running;
  check_launch(launch_merge(p, stream()), "merge");
}

// What all kernels of the backward pass take.
template <typename Params>
Params params(const BackwardCall& c) {
  Params p;
  set_shape(&p, c.in.shape);
  p.dtype = c.in.dtype;
  p.dy = c.dy.const_data_ptr();
  p.x = c.in.tensor.const_data_ptr();
  p.statistics = c.statistics;
  p.weight = c.weight;
  p.bias = c.bias;
  p.epilogue = epilogue_params(c.epilogue);
  if (c.epilogue.reads_mask()) {
    p.mask = mask_of(c.in.shape, c.epilogue.mask.const_data_ptr<uint8_t>());
  }
  return p;
}

void align_if_grouped(BackwardCall& c) {
  c.in.tensor = aligned_if_grouped(c.in.tensor, c.in);
  c.epilogue.residual = aligned_if_grouped(c.epilogue.residual, c.in);
  c.dy = aligned_if_grouped(c.dy, c.in);
}

// Whether what is read and what is written can be accessed by vectors.
bool is_aligned(const BackwardCall& c, const Tensor& dx, const Tensor& dresidual) {
  return aligned(c.dy.const_data_ptr(), c.in.tensor.const_data_ptr(),
                 epilogue_params(c.epilogue).residual, data_of(dx), data_of(dresidual));
}

// The sums of g and g * xhat, and their means, for whatever is not absent.
void run_reduce(const BackwardCall& c, const BackwardOutputs& out, void* mean_g,
                void* mean_g_xhat) {
  auto p = params<BackwardReduceParams>(c);
  p.plan = plan_for(c.in, is_aligned(c, {}, {}));
  const StagingMemory staging(p.plan, c.in);
  p.staging = *staging;
  p.sum_dy = channel_vector(out.sum_g);
  p.sum_dy_xhat = channel_vector(out.sum_g_xhat);
  p.mean_dy = mean_g;
  p.mean_dy_xhat = mean_g_xhat;
  check_launch(launch_backward_reduce(p, stream()), "backward_reduce");
}

// dx and dresidual, those that are wanted, with the means of g and g * xhat, or without where the
// statistics are constants.
void run_apply(const BackwardCall& c, const BackwardOutputs& out, const void* mean_g,
               const void* mean_g_xhat) {
  if (!out.dx.defined() && !out.dresidual.defined()) return;
  auto p = params<BackwardApplyParams>(c);
  p.plan = plan_for(c.in, is_aligned(c, out.dx, out.dresidual));
  if (out.dx.defined()) p.dx = out.dx.data_ptr();
  if (out.dresidual.defined()) p.dresidual = out.dresidual.data_ptr();
  p.mean_dy = mean_g;
  p.mean_dy_xhat = mean_g_xhat;
  check_launch(launch_backward_apply(p, stream()), "backward_apply");
}

// Everything in one launch. False: use two passes, as for train_resident.
bool backward_resident(const BackwardCall& c, bool constant_statistics,
                       const BackwardOutputs& out) {
  auto p = params<ResidentBackwardParams>(c);
  p.plan = plan_backward(c.in, is_aligned(c, out.dx, out.dresidual), is_plain(p));
  if (p.plan.path == Path::TwoPass) return false;
  const TeamMemory memory(p.plan, c.in, /*counts_tiles=*/false);
  p.staging = *memory;
  p.dx = out.dx.data_ptr();
  if (out.dresidual.defined()) p.dresidual = out.dresidual.data_ptr();
  p.constant_statistics = constant_statistics;
  p.sum_dy = channel_vector(out.sum_g);
  p.sum_dy_xhat = channel_vector(out.sum_g_xhat);
  return is_launched(launch_resident_backward(p, stream()), "backward in one launch");
}

void backward(BackwardCall& c, bool constant_statistics, const BackwardOutputs& out) {
  align_if_grouped(c);
  const bool needs_means = !constant_statistics && out.dx.defined();
  const bool needs_sums = needs_means || out.sum_g.defined() || out.sum_g_xhat.defined();
  // One launch saves a second read of x and dy. Without sums or without dx there is only one.
  if (out.dx.defined() && needs_sums && backward_resident(c, constant_statistics, out)) return;
  Tensor means;
  void *mean_g = nullptr, *mean_g_xhat = nullptr;
  if (needs_means) {
    const at::ScalarType acc = accumulation_type(c.in.tensor.scalar_type());
    means = at::empty({2, c.in.shape.C}, c.in.tensor.options().dtype(acc));
    mean_g = means[0].data_ptr();
    mean_g_xhat = means[1].data_ptr();
  }
  if (needs_sums) run_reduce(c, out, mean_g, mean_g_xhat);
  run_apply(c, out, mean_g, mean_g_xhat);
}

void backward_apply(BackwardCall& c, const Tensor& mean_g, const Tensor& mean_g_xhat,
                    const BackwardOutputs& out) {
  align_if_grouped(c);
  run_apply(c, out, mean_g.const_data_ptr(), mean_g_xhat.const_data_ptr());
}

}  // namespace

const Backend& backend() {
  static constexpr Backend table{mask_bytes, train,    normalise,     statistics,
                                 merge,      backward, backward_apply};
  return table;
}

}  // namespace cuda
}  // namespace bnorm_ext
