// The structs that cross from the host files to the CUDA kernels. No torch header here.
//
// N, C, S and "acc" as in ../params.h. Pointers are device pointers.
#pragma once

#include <cstdint>

#include "../params.h"
#include "mask.h"
#include "resident_plan.h"

namespace bnorm_ext {
namespace cuda {

// The two sums that a reducing kernel gathers per channel.
struct Pair {
  double a, b;
};

// What blocks of one launch exchange values through; none where chunks is 1, or in clusters.
struct Exchange {
  Pair* partials = nullptr;        // [tiles, chunks, channels per tile]; Grid: [2, teams, ...]
  unsigned* ticket = nullptr;      // [tiles]; Grid: [teams]; 0 before and after every launch
  unsigned* generation = nullptr;  // Grid: [teams], changed by every barrier of the team
};

// What follows the normalisation: y = act(z), z = fma(x - mean, weight * rstd, bias) + residual.
struct EpilogueParams {
  Activation act = Activation::Identity;
  double slope = 0;                // of leaky_relu
  const void* residual = nullptr;  // [N, C, S] like x, or null
};

struct StatisticsParams {
  Shape shape;
  WalkPlan plan;
  DType dtype = DType::Float;  // of x
  const void* x = nullptr;     // [N, C, S]
  Exchange exchange;
  double eps = 0;
  void* mean = nullptr;         // [C] acc, or null
  void* rstd = nullptr;         // [C] acc, or null
  double* wide_mean = nullptr;  // [C], or null
  double* wide_var = nullptr;   // [C] biased, or null
  RunningUpdate running;        // the counter is read here, and incremented by the normalise kernel
};

struct NormaliseParams {
  Shape shape;
  WalkPlan plan;
  DType dtype = DType::Float;  // of x and y
  const void* x = nullptr;     // [N, C, S]
  void* y = nullptr;           // [N, C, S]
  Statistics statistics;
  ChannelVector weight, bias;  // [C]
  EpilogueParams epilogue;
  Mask<uint8_t> mask;                      // written, or none
  int64_t* num_batches_tracked = nullptr;  // incremented by one, or null
};

struct BackwardReduceParams {
  Shape shape;
  WalkPlan plan;
  DType dtype = DType::Float;  // of dy and x
  const void* dy = nullptr;    // [N, C, S]
  const void* x = nullptr;     // [N, C, S]
  Statistics statistics;
  Exchange exchange;
  // What makes g, the gradient of z, from dy.
  ChannelVector weight, bias;  // [C]
  EpilogueParams epilogue;
  Mask<const uint8_t> mask;  // what forward wrote, in place of z; or none
  // Where not null, [C] each: the sums of g and g * xhat, and these divided by N * S.
  ChannelVector sum_dy, sum_dy_xhat;
  void* mean_dy = nullptr;       // acc
  void* mean_dy_xhat = nullptr;  // acc
};

struct BackwardApplyParams {
  Shape shape;
  WalkPlan plan;
  DType dtype = DType::Float;  // of dy, x, dx and dresidual
  const void* dy = nullptr;    // [N, C, S]
  const void* x = nullptr;     // [N, C, S]
  void* dx = nullptr;          // [N, C, S] or null
  void* dresidual = nullptr;   // [N, C, S] g, or null
  Statistics statistics;
  // What makes g, the gradient of z, from dy.
  ChannelVector weight, bias;  // [C]
  EpilogueParams epilogue;
  Mask<const uint8_t> mask;  // what forward wrote, in place of z; or none
  // With xhat = (x - mean) * rstd: dx = ((g - mean_dy) - xhat * mean_dy_xhat) * weight * rstd;
  // where mean_dy is null (the statistics are constants) dx = g * weight * rstd.
  const void* mean_dy = nullptr;       // [C] acc, or null
  const void* mean_dy_xhat = nullptr;  // [C] acc, or null
};

// All of training forward in one launch.
struct ResidentForwardParams {
  Shape shape;
  ResidentPlan plan;
  DType dtype = DType::Float;  // of x and y
  const void* x = nullptr;     // [N, C, S]
  void* y = nullptr;           // [N, C, S]
  Exchange exchange;
  double eps = 0;
  void* mean = nullptr;        // [C] acc
  void* rstd = nullptr;        // [C] acc
  ChannelVector weight, bias;  // [C]
  EpilogueParams epilogue;
  Mask<uint8_t> mask;  // written, or none
  RunningUpdate running;
  // One word, 0 before and after every launch, where several tiles read the counter that the last
  // one of them increments; else null.
  unsigned* tiles_done = nullptr;
};

// All of backward in one launch.
struct ResidentBackwardParams {
  Shape shape;
  ResidentPlan plan;
  DType dtype = DType::Float;  // of dy, x, dx and dresidual
  const void* dy = nullptr;    // [N, C, S]
  const void* x = nullptr;     // [N, C, S]
  void* dx = nullptr;          // [N, C, S]
  void* dresidual = nullptr;   // [N, C, S] g, or null
  Statistics statistics;
  bool constant_statistics = false;  // dx = g * weight * rstd
  Exchange exchange;
  ChannelVector weight, bias;  // [C]
  EpilogueParams epilogue;
  Mask<const uint8_t> mask;  // what forward wrote, in place of z; or none
  // Where not null, [C] each: the sums of g and g * xhat.
  ChannelVector sum_dy, sum_dy_xhat;
};

// Statistics of W processes into those of all of them.
struct MergeParams {
  int64_t W = 0, C = 0;
  const double* mean = nullptr;   // [W, C]
  const double* var = nullptr;    // [W, C] biased
  const double* count = nullptr;  // [W] values per channel
  DType dtype = DType::Float;     // acc, of the results
  double eps = 0;
  void* merged_mean = nullptr;  // [C]
  void* merged_rstd = nullptr;  // [C]
  RunningUpdate running;
};

}  // namespace cuda
}  // namespace bnorm_ext
