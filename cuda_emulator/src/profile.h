// Records how a launch uses memory, where the harness wants to know. Of the current thread.
#pragma once

#include <cstddef>
#include <string>

#include "machine.h"

namespace emulator {
namespace detail {

void begin_profile(const std::string& kernel);
void end_profile();
void forget_profiles();

// An access to shared memory of `owner`, from a place in the code.
void profile_shared(const Block* owner, std::ptrdiff_t offset, std::size_t bytes, const void* from);
void profile_store();
void profile_evict_first();  // of the store that follows

}  // namespace detail
}  // namespace emulator
