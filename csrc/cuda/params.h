// The parameters of the CUDA kernels, filled by the host files. Free of torch headers.
//
// N, C, S and "acc" as in ../params.h. Pointers are device pointers.
#pragma once

#include <cstdint>

#include "../params.h"
#include "mask.h"
#include "residency.h"

namespace bnorm_ext {
namespace cuda {

// The two sums that a reducing kernel computes per channel.
struct Pair {
  double a, b;
};

// Global memory through which the blocks of one launch combine their sums, and the counters that
// synchronise them. Nothing where chunks is 1, nor in clusters.
struct Staging {
  Pair* partials = nullptr;        // [tiles, parts_of(chunks), channels per tile]; Grid: [2, teams,
                                   // chunks + 1, channels per tile], the last being totals
  unsigned* semaphores = nullptr;  // semaphores_of(plan); 0 before and after a launch
  unsigned* phases = nullptr;      // Grid: [teams], by which each team's barrier works (team.cuh)
};

// What follows the normalisation: y = act(z), z = fma(x - mean, weight * rstd, bias) + residual.
struct EpilogueParams {
  Activation act = Activation::Identity;
  double slope = 0;                // of leaky_relu
  const void* residual = nullptr;  // [N, C, S] like x, or null
};

// What every kernel takes that reads x.
struct InputParams {
  Shape shape;
  double per_value = 0;        // 1 / (N * S): no division where all threads wait for its result
  DType dtype = DType::Float;  // of all tensors that are [N, C, S]
  const void* x = nullptr;     // [N, C, S]
};

// What every kernel takes that writes y.
struct OutputParams : InputParams {
  void* y = nullptr;           // [N, C, S]
  ChannelVector weight, bias;  // [C]
  EpilogueParams epilogue;
  Mask<uint8_t> mask;  // written; or none
};

// What every kernel of backward takes: dy, and what g, the gradient of z, is computed with.
struct GradientParams : InputParams {
  const void* dy = nullptr;  // [N, C, S]
  Statistics statistics;
  ChannelVector weight, bias;  // [C]
  EpilogueParams epilogue;
  Mask<const uint8_t> mask;  // what forward wrote, read in place of z; or none
};

// What every kernel takes that writes dx.
struct InputGradientParams : GradientParams {
  void* dx = nullptr;         // [N, C, S] or null
  void* dresidual = nullptr;  // [N, C, S] g, or null
};

struct StatisticsParams : InputParams {
  TilePlan plan;
  Staging staging;
  double eps = 0;
  void* mean = nullptr;         // [2, C] acc: the mean and its rest (mean_like); or null
  void* rstd = nullptr;         // [C] acc, or null
  double* wide_mean = nullptr;  // [C], or null
  double* wide_var = nullptr;   // [C] biased, or null
  RunningUpdate running;        // reads the counter, which the normalise kernel increments
};

struct NormaliseParams : OutputParams {
  TilePlan plan;
  Statistics statistics;
  int64_t* num_batches_tracked = nullptr;  // incremented by one, or null
};

struct BackwardReduceParams : GradientParams {
  TilePlan plan;
  Staging staging;
  // Where not null, [C] each: the sums of g and g * xhat, and these divided by N * S.
  ChannelVector sum_dy, sum_dy_xhat;
  void* mean_dy = nullptr;       // acc
  void* mean_dy_xhat = nullptr;  // acc
};

struct BackwardApplyParams : InputGradientParams {
  TilePlan plan;
  // With xhat = (x - mean) * rstd: dx = ((g - mean_dy) - xhat * mean_dy_xhat) * weight * rstd;
  // where mean_dy is null (the statistics are constants) dx = g * weight * rstd.
  const void* mean_dy = nullptr;       // [C] acc, or null
  const void* mean_dy_xhat = nullptr;  // [C] acc, or null
};

// Whether there is neither an activation nor a residual nor a mask, nor a gradient of a residual.
template <typename Params>
bool is_plain(const Params& p) {
  return p.epilogue.act == Activation::Identity && p.epilogue.residual == nullptr &&
         p.mask.bytes == nullptr;
}

// All of training forward in one launch.
struct ResidentForwardParams : OutputParams {
  ResidentPlan plan;
  Staging staging;
  double eps = 0;
  void* mean = nullptr;  // [2, C] acc
  void* rstd = nullptr;  // [C] acc
  RunningUpdate running;
  // A word that is 0 before and after every launch, by which the last tile is found: it increments
  // the counter that the others read. Null where nothing has to wait for other tiles.
  unsigned* tiles_done = nullptr;
};

// All of backward in one launch.
struct ResidentBackwardParams : InputGradientParams {
  ResidentPlan plan;
  Staging staging;
  bool constant_statistics = false;  // dx = g * weight * rstd
  // Where not null, [C] each: the sums of g and g * xhat.
  ChannelVector sum_dy, sum_dy_xhat;
};

// Merges the statistics of W processes.
struct MergeParams {
  int64_t W = 0, C = 0;
  const double* mean = nullptr;   // [W, C]
  const double* var = nullptr;    // [W, C] biased
  const double* count = nullptr;  // [W] values per channel
  DType dtype = DType::Float;     // acc, of the results
  double eps = 0;
  void* merged_mean = nullptr;  // [2, C]
  void* merged_rstd = nullptr;  // [C]
  RunningUpdate running;
};

}  // namespace cuda
}  // namespace bnorm_ext
