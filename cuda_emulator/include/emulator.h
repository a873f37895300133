// Supplies for ordinary host compilers what csrc/cuda/platform.cuh and CUDA's own headers supply
// for nvcc, so that kernels and the code that launches them run on the CPU, one fibre per CUDA
// thread.
//
// What is checked on the way (races, barriers, masks, bounds, ...) comes back as reports:
// emulator/harness.h. Everything runs in one operating-system thread.
#pragma once

#include "emulator/types.h"

#include "emulator/device.h"
#include "emulator/harness.h"
#include "emulator/host.h"
#include "emulator/math.h"
#include "emulator/pointers.h"

#include "emulator/atomics.h"
#include "emulator/platform.h"
