// Just enough of CUDA to construct a TileIterator without running anything.
#pragma once

#include <cstdint>
#include <cstring>

#define __device__
#define __forceinline__ inline

struct Index {
  unsigned x = 0;
};
inline Index threadIdx, blockIdx, gridDim;

inline int __any_sync(unsigned, int predicate) {
  return predicate;
}
inline int __all_sync(unsigned, int predicate) {
  return predicate;
}

struct uint4 {
  unsigned x, y, z, w;
};

namespace bnorm_ext {
namespace cuda {

template <typename T>
using Workspace = T*;

template <int kBytes>
struct Bytes {
  unsigned word[(kBytes + 3) / 4];
};
template <int kBytes>
Bytes<kBytes> load_bytes(const void*);
template <int kBytes>
Bytes<kBytes> load_bytes_evict_first(const void*);
template <int kBytes>
void store_bytes(void*, Bytes<kBytes>);
template <int kBytes>
void store_bytes_evict_first(void*, Bytes<kBytes>);
template <typename T>
unsigned round_to_pair(float low, float high, T);

}  // namespace cuda
}  // namespace bnorm_ext
