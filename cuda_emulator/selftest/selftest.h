// Shared by the kernels of the self-test: their parameters, and one way to run and check them.
#pragma once

#include <emulator.h>

#include <cstring>
#include <functional>
#include <string>
#include <vector>

struct Params {
  const float* in;
  float* out;
  bnorm_ext::cuda::Workspace<double> partial;
  unsigned* semaphore;
  float* plain;
  int per_block;
};

inline void store_float(float* to, float value) {
  bnorm_ext::cuda::Bytes<4> bytes;
  std::memcpy(&bytes, &value, sizeof(bytes));
  bnorm_ext::cuda::store_bytes<4>(to, bytes);
}

struct Options {
  int blocks = 8;
  int threads = 128;
  int per_block = 2048;
  int cluster = 0;  // 0: none
  bool cooperative = false;
  std::size_t shared_bytes = 8192;
};

// The expected output.
enum Expected {
  kPerBlock,         // the sum of each block's inputs
  kPerCluster,       // of each cluster's
  kTotal,            // of all, in the first element
  kTotalEverywhere,  // of all, in each element
  kCopy,             // each block's tiles of 4 floats per thread, each tile reversed twice
  kOnes,             // 1, per thread
  kQuads,            // inputs, reversed in groups of 4
  kWritten,          // anything, but all of it written
  kAnything,         // not looked at
};

// Runs with a seed on a device; returns "", or what is wrong with the output.
using Run = std::function<std::string()>;
struct Case {
  std::string name;
  Run run;
};

using Kernel = void (*)(Params);
Run run_sums(Kernel kernel, const Options& options, Expected expected);

void add_correct(std::vector<Case>& cases);
void add_exchanges(std::vector<Case>& cases);
void add_broken_order(std::vector<Case>& cases);
void add_broken_calls(std::vector<Case>& cases);
void add_limits(std::vector<Case>& cases);
void add_profiles(std::vector<Case>& cases);
