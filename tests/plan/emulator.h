// Just enough of CUDA to construct a Walk without running anything.
#pragma once

#include <cstdint>
#include <cstring>

#define __device__
#define __forceinline__ inline

struct Index {
  unsigned x = 0;
};
inline Index threadIdx, blockIdx;

namespace bnorm_ext {
namespace cuda {

template <typename T>
using Workspace = T*;

template <int kBytes>
struct Bytes {
  unsigned char byte[kBytes];
};
template <int kBytes>
Bytes<kBytes> load_bytes(const void*);
template <int kBytes>
void store_bytes(void*, Bytes<kBytes>);

}  // namespace cuda
}  // namespace bnorm_ext
