// Replaces csrc/cuda/platform.cuh and CUDA's own headers for an ordinary host compiler, so that
// kernels and the code that launches them run on the CPU, one fibre per CUDA thread.
//
// The emulator checks races, barriers, masks, bounds and more while it runs, and returns what it
// finds as reports (emulator/harness.h). Everything runs in one operating-system thread.
#pragma once

#include "emulator/types.h"

#include "emulator/device.h"
#include "emulator/harness.h"
#include "emulator/host.h"
#include "emulator/math.h"
#include "emulator/pointers.h"

#include "emulator/atomics.h"
#include "emulator/platform.h"
