// Vectors through the compiler's vector extension: one source, as wide as the instruction set.
// Compiled once per instruction set inside a namespace of its own, so that no linker can hand the
// code of one to another.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__F16C__) || defined(__AVX__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif
#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define NW_INLINE inline __attribute__((always_inline))
#define NW_LAMBDA_INLINE __attribute__((always_inline))

namespace nw::NW_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

// The type that arithmetic is done in.
template <class T> struct ComputeOf { using type = float; };
template <> struct ComputeOf<double> { using type = double; };
template <class T> using Compute = typename ComputeOf<T>::type;

template <class R> struct PackOf;
template <> struct PackOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t bits __attribute__((vector_size(kVectorBytes)));
};
template <> struct PackOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t bits __attribute__((vector_size(kVectorBytes)));
};
template <class R> using Pack = typename PackOf<R>::type;
template <class R> using Bits = typename PackOf<R>::bits;
template <class R> constexpr int kLanes = kVectorBytes / int(sizeof(R));
template <class T> constexpr int kWidth = kLanes<Compute<T>>;

constexpr int kFloats = kLanes<float>;
typedef uint16_t HalfBits __attribute__((vector_size(kFloats * 2)));
typedef uint32_t WordBits __attribute__((vector_size(kVectorBytes)));

template <class P, class S> NW_INLINE P splat(S s) { return P{} + s; }
template <class To, class From> NW_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
template <class R> NW_INLINE Pack<R> lane_numbers() {
  Pack<R> p;
  for (int i = 0; i < kLanes<R>; ++i) p[i] = R(i);
  return p;
}

// a * b + c, rounded once where the processor can. Said outright: left to the compiler one copy of a
// loop had it and another not, and the bits depended on which loop a channel went through.
template <class R> NW_INLINE Pack<R> multiply_add(Pack<R> a, Pack<R> b, Pack<R> c) {
  return a * b + c;
}
#if defined(__AVX512F__)
template <> NW_INLINE Pack<float> multiply_add<float>(Pack<float> a, Pack<float> b, Pack<float> c) {
  return bit_cast<Pack<float>>(
      _mm512_fmadd_ps(bit_cast<__m512>(a), bit_cast<__m512>(b), bit_cast<__m512>(c)));
}
template <> NW_INLINE Pack<double> multiply_add<double>(Pack<double> a, Pack<double> b,
                                                        Pack<double> c) {
  return bit_cast<Pack<double>>(
      _mm512_fmadd_pd(bit_cast<__m512d>(a), bit_cast<__m512d>(b), bit_cast<__m512d>(c)));
}
#elif defined(__FMA__)
template <> NW_INLINE Pack<float> multiply_add<float>(Pack<float> a, Pack<float> b, Pack<float> c) {
  return _mm256_fmadd_ps(a, b, c);
}
template <> NW_INLINE Pack<double> multiply_add<double>(Pack<double> a, Pack<double> b,
                                                        Pack<double> c) {
  return _mm256_fmadd_pd(a, b, c);
}
#elif defined(__ARM_NEON) && defined(__aarch64__)
template <> NW_INLINE Pack<float> multiply_add<float>(Pack<float> a, Pack<float> b, Pack<float> c) {
  return bit_cast<Pack<float>>(vfmaq_f32(bit_cast<float32x4_t>(c), bit_cast<float32x4_t>(a),
                                         bit_cast<float32x4_t>(b)));
}
template <> NW_INLINE Pack<double> multiply_add<double>(Pack<double> a, Pack<double> b,
                                                        Pack<double> c) {
  return bit_cast<Pack<double>>(vfmaq_f64(bit_cast<float64x2_t>(c), bit_cast<float64x2_t>(a),
                                          bit_cast<float64x2_t>(b)));
}
#endif

// ---- one value --------------------------------------------------------------------------------
NW_INLINE float to_compute(float v) { return v; }
NW_INLINE double to_compute(double v) { return v; }
NW_INLINE float to_compute(BFloat16 v) { return bit_cast<float>(uint32_t(v.bits) << 16); }
NW_INLINE float to_compute(Float16 v) {
  const uint32_t sign = uint32_t(v.bits & 0x8000u) << 16, rest = v.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  // 2^-24 times the integer is exact for subnormals; others shift into place.
  if (rest < 0x400u) return bit_cast<float>(sign | bit_cast<uint32_t>(float(rest) * 0x1p-24f));
  return bit_cast<float>(sign | ((rest << 13) + ((127u - 15u) << 23)));
}

template <class T> NW_INLINE T from_compute(Compute<T> v);
template <> NW_INLINE float from_compute<float>(float v) { return v; }
template <> NW_INLINE double from_compute<double>(double v) { return v; }
template <> NW_INLINE BFloat16 from_compute<BFloat16>(float v) {
  const uint32_t u = bit_cast<uint32_t>(v);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {uint16_t((u >> 16) | 0x40u)};  // quiet NaN
  return {uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};                  // nearest even
}
template <> NW_INLINE Float16 from_compute<Float16>(float v) {
  const uint32_t u = bit_cast<uint32_t>(v);
  const uint16_t sign = uint16_t((u >> 16) & 0x8000u);
  const uint32_t mag = u & 0x7fffffffu;
  if (mag > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (mag >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // 65520 and more round to infinity
  if (mag < 0x38800000u) {
    // Subnormal result: adding 0.5 leaves the rounded integer in the low mantissa bits.
    const float rounded = bit_cast<float>(mag) + 0.5f;
    return {uint16_t(sign | uint16_t(bit_cast<uint32_t>(rounded) - 0x3f000000u))};
  }
  const uint32_t odd = (mag >> 13) & 1u;
  return {uint16_t(sign | uint16_t((mag - (112u << 23) + 0xfffu + odd) >> 13))};
}

// A per-channel vector of any dtype, read as double.
NW_INLINE double read(const Vector& v, int64_t c, double absent) {
  if (!v.data) return absent;
  switch (v.dtype) {
    case kFloat32: return static_cast<const float*>(v.data)[c];
    case kFloat64: return static_cast<const double*>(v.data)[c];
    case kBFloat16: return to_compute(static_cast<const BFloat16*>(v.data)[c]);
    default: return to_compute(static_cast<const Float16*>(v.data)[c]);
  }
}

NW_INLINE void write(void* to, int dtype, int64_t c, double v) {
  switch (dtype) {
    case kFloat32: static_cast<float*>(to)[c] = float(v); break;
    case kFloat64: static_cast<double*>(to)[c] = v; break;
    case kBFloat16: static_cast<BFloat16*>(to)[c] = from_compute<BFloat16>(float(v)); break;
    default: static_cast<Float16*>(to)[c] = from_compute<Float16>(float(v));
  }
}

// ---- a vector of values -----------------------------------------------------------------------
template <class T> NW_INLINE Pack<Compute<T>> load(const T* p);
template <> NW_INLINE Pack<float> load<float>(const float* p) {
  Pack<float> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <> NW_INLINE Pack<double> load<double>(const double* p) {
  Pack<double> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <> NW_INLINE Pack<float> load<BFloat16>(const BFloat16* p) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return bit_cast<Pack<float>>(_mm256_slli_epi32(words, 16));
#endif
  HalfBits h;
  std::memcpy(&h, p, sizeof h);
  return bit_cast<Pack<float>>(__builtin_convertvector(h, WordBits) << 16);
}
// Where the processor cannot convert: value by value, and not inlined, for the compiler's sake.
[[maybe_unused]] static __attribute__((noinline)) Pack<float> load_halves(const Float16* p) {
  Pack<float> v;
  for (int i = 0; i < kFloats; ++i) v[i] = to_compute(p[i]);
  return v;
}
[[maybe_unused]] static __attribute__((noinline)) HalfBits encode_halves(Pack<float> v) {
  HalfBits h;
  for (int i = 0; i < kFloats; ++i) h[i] = from_compute<Float16>(v[i]).bits;
  return h;
}
template <> NW_INLINE Pack<float> load<Float16>(const Float16* p) {
#if defined(__AVX512F__)
  return bit_cast<Pack<float>>(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)));
#elif defined(__F16C__)
  return bit_cast<Pack<float>>(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return bit_cast<Pack<float>>(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)p))));
#else
  return load_halves(p);
#endif
}

// A vector as it lies in memory.
template <class T> NW_INLINE auto encode(Pack<Compute<T>> v) { return v; }
// The upper half of each lane is v rounded to the nearest BFloat16, ties to even; but for NaN, whose
// lower half may carry it into infinity and beyond.
NW_INLINE WordBits nearest(Pack<float> v) {
  const WordBits u = bit_cast<WordBits>(v);
  return u + 0x7fffu + ((u >> 16) & 1u);
}
template <> NW_INLINE auto encode<BFloat16>(Pack<float> v) {
  // NaN stays NaN, quiet. (v != v is one instruction; a comparison of unsigned integers is several.)
  const WordBits u = bit_cast<WordBits>(v);
  const WordBits bits = (v != v ? u | 0x400000u : nearest(v)) >> 16;
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i words = bit_cast<__m256i>(bits);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
#else
  return __builtin_convertvector(bits, HalfBits);
#endif
}
template <> NW_INLINE auto encode<Float16>(Pack<float> v) {
#if defined(__AVX512F__)
  return _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return vcvt_f16_f32(bit_cast<float32x4_t>(v));
#else
  return encode_halves(v);
#endif
}
template <class T> NW_INLINE void store(T* p, Pack<Compute<T>> v) {
  const auto bits = encode<T>(v);
  std::memcpy(p, &bits, sizeof bits);
}

// A store past the caches: p is aligned to what is stored. Saves the read of the line that an
// ordinary store to memory begins with (a third of a normalization's traffic).
template <class V> NW_INLINE void stream_bytes(void* p, const V& bits) {
#if defined(__AVX512F__)
  if constexpr (sizeof bits == 64) return _mm512_stream_si512((__m512i*)p, bit_cast<__m512i>(bits));
#endif
#if defined(__AVX__)
  if constexpr (sizeof bits == 32) return _mm256_stream_si256((__m256i*)p, bit_cast<__m256i>(bits));
#endif
#if defined(__SSE2__)
  if constexpr (sizeof bits == 16) return _mm_stream_si128((__m128i*)p, bit_cast<__m128i>(bits));
#endif
  std::memcpy(p, &bits, sizeof bits);
}
template <class T> NW_INLINE void stream(T* p, Pack<Compute<T>> v) {
  stream_bytes(p, encode<T>(v));
}
// Two vectors in a row. Those of half types make one store: four small ones to a line, beside
// another tensor's, left lines half filled (0.3 of the speed of ordinary stores). They are joined in
// registers: through memory the load would wait for two stores.
template <class T> NW_INLINE void stream(T* p, Pack<Compute<T>> v, Pack<Compute<T>> w) {
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 2) {
    const auto low = encode<T>(v), high = encode<T>(w);
#if defined(__AVX512F__)
    stream_bytes(p, _mm512_inserti64x4(_mm512_castsi256_si512(bit_cast<__m256i>(low)),
                                       bit_cast<__m256i>(high), 1));
#else
    stream_bytes(p, _mm256_inserti128_si256(_mm256_castsi128_si256(bit_cast<__m128i>(low)),
                                            bit_cast<__m128i>(high), 1));
#endif
    return;
  }
#endif
  stream<T>(p, v);
  stream<T>(p + kWidth<T>, w);
}

// ---- a step: two vectors of values ------------------------------------------------------------
// The two vectors of a step at place i: values [i, i + W) and [i + W, i + 2 W). Of BFloat16 the even
// and the odd ones: a shift and a mask take them from one load, and back, where unpacking halves in
// order is a shuffle across the register for each vector (1.6 times the instructions, all in all).
struct First { int64_t i; };
struct Second { int64_t i; };
template <class T> struct FirstOf { const T* p; };
template <class T> struct SecondOf { const T* p; };
template <class T> NW_INLINE FirstOf<T> operator+(const T* p, First s) { return {p + s.i}; }
template <class T> NW_INLINE SecondOf<T> operator+(const T* p, Second s) { return {p + s.i}; }

template <class T> constexpr bool kInterleaved = false;
template <> constexpr bool kInterleaved<BFloat16> = true;

NW_INLINE WordBits load_words(const BFloat16* p) {
  WordBits u;
  std::memcpy(&u, p, sizeof u);
  return u;
}
template <class T> NW_INLINE Pack<Compute<T>> load(FirstOf<T> s) {
  if constexpr (kInterleaved<T>)
    return bit_cast<Pack<float>>(load_words(s.p) << 16);
  else
    return load<T>(s.p);
}
template <class T> NW_INLINE Pack<Compute<T>> load(SecondOf<T> s) {
  if constexpr (kInterleaved<T>)
    return bit_cast<Pack<float>>(load_words(s.p) & 0xffff0000u);
  else
    return load<T>(s.p + kWidth<T>);
}
// No case for NaN (3 of 10 instructions): its lower half must be 0, as it is where values are read from
// 16 bits and constants come from constant() in channel.h.
NW_INLINE WordBits interleave(Pack<float> first, Pack<float> second) {
  const WordBits even = nearest(first) >> 16, odd = nearest(second);
#if defined(__AVX2__) && !defined(__AVX512F__)
  return bit_cast<WordBits>(
      _mm256_blend_epi16(bit_cast<__m256i>(even), bit_cast<__m256i>(odd), 0xaa));
#else
  return even | (odd & 0xffff0000u);
#endif
}
template <class T>
NW_INLINE void store_step(T* p, Pack<Compute<T>> first, Pack<Compute<T>> second) {
  if constexpr (kInterleaved<T>) {
    const WordBits bits = interleave(first, second);
    std::memcpy(p, &bits, sizeof bits);
  } else {
    store<T>(p, first);
    store<T>(p + kWidth<T>, second);
  }
}
template <class T>
NW_INLINE void stream_step(T* p, Pack<Compute<T>> first, Pack<Compute<T>> second) {
  if constexpr (kInterleaved<T>)
    stream_bytes(p, interleave(first, second));
  else
    stream<T>(p, first, second);
}
// Brings `count` values from p on into the second level cache, without waiting.
template <class T> NW_INLINE void prefetch(const T* p, int64_t count) {
  const char* b = reinterpret_cast<const char*>(p);
  for (int64_t i = 0; i < count * int64_t(sizeof(T)); i += 64) __builtin_prefetch(b + i, 0, 2);
}
// How many of the values from p on lie before the next line of the cache.
constexpr int64_t kLine = 64;
template <class T> NW_INLINE int64_t to_line(const T* p) {
  return int64_t((kLine - uintptr_t(p) % kLine) % kLine / sizeof(T));
}
// Streamed lines are ordered before what the thread does next.
NW_INLINE void stream_end() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <class R> NW_INLINE double lane_sum(const Pack<R>& v) {
  double total = 0;
  for (int i = 0; i < kLanes<R>; ++i) total += double(v[i]);
  return total;
}

// A double for each lane of a Pack<R>.
template <class R> struct WideSum {
  typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
  Pack<double> low, high;
  NW_INLINE void clear() { low = high = Pack<double>{}; }
  NW_INLINE void add(const Pack<float>& v) {
    Half half[2];
    std::memcpy(half, &v, sizeof v);
    low += __builtin_convertvector(half[0], Pack<double>);
    high += __builtin_convertvector(half[1], Pack<double>);
  }
  NW_INLINE double value() const { return lane_sum<double>(low + high); }
};
template <> struct WideSum<double> {
  Pack<double> sum;
  NW_INLINE void clear() { sum = Pack<double>{}; }
  NW_INLINE void add(const Pack<double>& v) { sum += v; }
  NW_INLINE double value() const { return lane_sum<double>(sum); }
};

}  // namespace nw::NW_ISA
