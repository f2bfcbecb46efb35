// Groups of x as whole numbers, for products on units of tiles.
#pragma once
#include "dot.h"

#ifdef MQ_BITS
// x · lift · inverse counts units of unit · lower, two factors each, since a product of them may be too small for f32. The
// unit is not a number where one of x is none.
struct Units {
  float lift, inverse, unit, lower;
};

// A wave's units for a group, eight elements a lane, whose largest element's power of two is 2^TOP units.
template <int TOP>
DEVICE Units units_of(const float (&x)[PER_LANE]) {
  int most = 0;    // without their signs, f32 have the order of their bits as whole numbers
#pragma unroll
  for (int j = 0; j < PER_LANE; j++) {
    const int size = (int)__float_as_uint(fabsf(x[j]));
    most = size > most ? size : most;
  }
  most = wave_most(most);
  const bool finite = most < 0x7f800000;
  const bool tiny = most < 64 << 23;    // then all are multiplied by 2^64 first
  const float lift = tiny ? 18446744073709551616.0f : 1.0f;
  const int bits = (int)__float_as_uint(__int_as_float(most) * lift) >> 23, exponent = bits > 63 ? bits : 63;
  const float unit = finite ? __int_as_float((exponent - TOP) << 23) : not_a_number();
  return {lift, __int_as_float((254 + TOP - exponent) << 23), unit, tiny ? 5.421010862427522e-20f : 1.0f};
}
#endif
