// In what order csrc/cpu/sums.h prefetches the rows of a tile.
//
// Reads lines "rows width stride" from stdin. For each prints one line: the elements that were asked
// for ahead, in order, each followed by how many vectors had been loaded before.
#include <cpu/sums.h>

#include <cinttypes>
#include <cstdio>
#include <utility>
#include <vector>

using namespace bnorm_ext;
using namespace bnorm_ext::cpu;

int main() {
  int64_t rows = 0, width = 0, stride = 0;
  while (std::scanf("%" SCNd64 " %" SCNd64 " %" SCNd64, &rows, &width, &stride) == 3) {
    using V = Vec<float>;
    std::vector<std::pair<int64_t, int64_t>> asked;
    int64_t loaded = 0;
    const Tile tile{0, width, Offset{0, 0}, stride, 0, rows, width, 0};
    Columns<float> coefficients[1] = {};
    Columns<double> a, ab;
    sum_columns<V>(
        tile, sizeof(float), coefficients, a.a, ab.a,
        [&](Offset, auto, const V(&k)[1]) {
          ++loaded;
          return Pair<V>{k[0], k[0]};
        },
        [&](int64_t element) { asked.emplace_back(element, loaded); });
    for (const auto& [element, before] : asked) {
      std::printf("%" PRId64 " %" PRId64 " ", element, before);
    }
    std::puts("");
  }
}
