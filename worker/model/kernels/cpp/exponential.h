// A fast exponential function for the softmax.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace lorelay {

template <typename Acc>
inline Acc exponential(Acc x) {
  return std::exp(x);
}

// Computes e^x for x <= 0 without calls, so that the compiler can vectorise it: 2^n, by setting the exponent bits,
// times a Taylor series. Results below the smallest normal number are 0.
template <>
inline float exponential(float x) {
  constexpr float SMALLEST = -87.0f;
  const float halves = std::max(x, SMALLEST) * 1.44269504f;
  const float whole = std::nearbyint(halves);
  const float rest = (halves - whole) * 0.69314718f;
  float value = 1.0f / 720;
  value = value * rest + 1.0f / 120;
  value = value * rest + 1.0f / 24;
  value = value * rest + 1.0f / 6;
  value = value * rest + 0.5f;
  value = value * rest + 1.0f;
  value = value * rest + 1.0f;
  const int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x < SMALLEST ? 0.0f : x == x ? value * power : x;
}

}  // namespace lorelay
