// What a mask says: which lanes of a vector take part, how many elements, and where they lie.
#pragma once
#include <cstring>

#include "channel.h"
#include "kernels.h"
#include "simd.h"

namespace nw::NW_ISA {

// All bits of a lane set where its byte is not 0.
template <class R> NW_INLINE Bits<R> taken(const uint8_t* m) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (sizeof(R) == 4) {
    return bit_cast<Bits<R>>(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)m))) != 0;
  } else {
    int32_t four;
    std::memcpy(&four, m, sizeof four);
    return bit_cast<Bits<R>>(_mm256_cvtepi8_epi64(_mm_cvtsi32_si128(four))) != 0;
  }
#else
  typedef uint8_t Bytes __attribute__((vector_size(kLanes<R>)));
  Bytes bytes;
  std::memcpy(&bytes, m, sizeof bytes);
  return __builtin_convertvector(bytes, Bits<R>) != 0;
#endif
}

// The same at a place: `m` is the byte of place 0. Of a step's vectors of BFloat16 the even ones and
// the odd ones.
template <class T> NW_INLINE auto taken_at(const uint8_t* m, int64_t i) {
  return taken<Compute<T>>(m + i);
}
NW_INLINE WordBits two_a_lane(const uint8_t* m) {
  typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / 2)));
  Bytes bytes;
  std::memcpy(&bytes, m, sizeof bytes);
#if defined(__AVX2__) && !defined(__AVX512F__)
  return bit_cast<WordBits>(_mm256_cvtepu8_epi16(bit_cast<__m128i>(bytes)));
#else
  typedef uint16_t Words __attribute__((vector_size(kVectorBytes)));
  return bit_cast<WordBits>(__builtin_convertvector(bytes, Words));
#endif
}
template <class T> NW_INLINE auto taken_at(const uint8_t* m, First s) {
  if constexpr (kInterleaved<T>)
    return bit_cast<Bits<float>>(two_a_lane(m + s.i) << 16) != 0;
  else
    return taken<Compute<T>>(m + s.i);
}
template <class T> NW_INLINE auto taken_at(const uint8_t* m, Second s) {
  if constexpr (kInterleaved<T>)
    return bit_cast<Bits<float>>(two_a_lane(m + s.i) >> 16) != 0;
  else
    return taken<Compute<T>>(m + s.i + kWidth<T>);
}

// The elements of a row that take part lie in [begin, end).
struct Span {
  int64_t begin, end;
};

// How many take part, and some of them, spread evenly: their numbers in the mask.
struct Taken {
  int64_t n = 0;
  int64_t samples = 0, sample[16];
};

NW_INLINE int64_t count_taken(const uint8_t* m, int64_t length) {
  int64_t n = 0;
  while (length > 0) {  // sums of bytes, before they overflow
    const int64_t part = length < 128 ? length : 128;
    uint8_t some = 0;
    for (int64_t i = 0; i < part; ++i) some = uint8_t(some + (m[i] != 0));
    n += some;
    m += part;
    length -= part;
  }
  return n;
}

// Looks through a mask of `rows` rows of `length`.
inline Taken look_through(const uint8_t* mask, int64_t rows, int64_t length) {
  Taken t;
  t.n = count_taken(mask, rows * length);
  if (t.n == 0) return t;
  t.samples = sample_count(t.n);
  const int64_t step = t.n / t.samples;
  constexpr int64_t kStride = 4096;
  int64_t passed = 0, found = 0;
  for (int64_t i = 0; i < rows * length && found < t.samples; i += kStride) {
    const int64_t part = rows * length - i < kStride ? rows * length - i : kStride;
    const int64_t here = count_taken(mask + i, part);
    int64_t seen = passed;
    for (int64_t j = i; found < t.samples && passed + here > found * step; ++j) {
      if (!mask[j]) continue;
      if (seen++ == found * step) t.sample[found++] = j;
    }
    passed += here;
  }
  return t;
}

inline Span span_of(const uint8_t* m, int64_t length) {
  int64_t begin = 0, end = length;
  const auto nothing = [](const uint8_t* p) {
    uint64_t eight;
    std::memcpy(&eight, p, 8);
    return eight == 0;
  };
  while (begin + 8 <= end && nothing(m + begin)) begin += 8;
  while (begin < end && !m[begin]) ++begin;
  while (end - 8 >= begin && nothing(m + end - 8)) end -= 8;
  while (end > begin && !m[end - 1]) --end;
  return {begin, end};
}

}  // namespace nw::NW_ISA
