// Conversion of numbers between precisions.
#pragma once

#include <cstdint>

namespace lorelay {

template <typename T, typename Acc>
inline void convert(const T* from, int64_t size, Acc* to) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    to[i] = static_cast<Acc>(from[i]);
  }
}

}  // namespace lorelay
