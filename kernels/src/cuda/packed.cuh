// A group of 8 elements as it lies in memory.
//
// Where some of several loads may be left out, conversions must not stand between them, or each
// load would be waited for before the next one begins. Packed groups are fetched first, all of them
// under way together, and unpacked afterwards; they also take half the registers for bf16.
#pragma once

#include "common.cuh"

template <class T> struct Packed {
  Quad quad[sizeof(T) * GROUP / 16];
};

// 8 times the same number.
template <class T> DEVICE Packed<T> packed(float x) {
  u32 word = __float_as_uint(x);
  if (sizeof(T) == 2) {
    word = bf16_pair(x, x);
  }
  Packed<T> group;
  for (Quad &quad : group.quad) {
    for (u32 i = 0; i < 4; i++) {
      quad.word[i] = word;
    }
  }
  return group;
}

template <class T> DEVICE void load_packed(const T *at, Packed<T> &group) {
  for (u32 i = 0; i < sizeof(T) * GROUP / 16; i++) {
    group.quad[i] = load16(at + i * (16 / sizeof(T)));
  }
}

template <class T> DEVICE void store_packed(T *at, const Packed<T> &group) {
  for (u32 i = 0; i < sizeof(T) * GROUP / 16; i++) {
    store16(at + i * (16 / sizeof(T)), group.quad[i]);
  }
}

// The elements that `load_row` would give; what lies past the end of the row stays as it is.
template <class T>
DEVICE void load_packed_row(const T *row, u64 start, u64 length, bool aligned, Packed<T> &group) {
  if (aligned) {
    if (start < length) {
      load_packed(row + start, group);
    }
    return;
  }
  T *const element = reinterpret_cast<T *>(group.quad);
  for (u32 i = 0; i < GROUP; i++) {
    if (start + i < length) {
      element[i] = row[start + i];
    }
  }
}

template <class T> DEVICE void unpack(const Packed<T> &group, float (&x)[GROUP]) {
  load_group(reinterpret_cast<const T *>(group.quad), x);
}
