// Names of Metal's scalar types, and the bits of one as another.
#pragma once

namespace metal {

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;
typedef ulong uintptr_t;
typedef long intptr_t;

template <class To, class From>
MSL_FN To as_type(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "as_type: the sizes differ");
  To to;
  msl_copy(&to, &from, sizeof(to));
  return to;
}

template <class To, class T, int Size, int... I>
MSL_FN To as_type(const swz<T, Size, I...>& from) {
  return as_type<To>(vec<T, int(sizeof...(I))>(from));
}

}  // namespace metal
