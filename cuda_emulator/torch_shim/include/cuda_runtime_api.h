// In place of CUDA's header of this name.
#pragma once

#include <emulator.h>
