// What the kernels need of Metal, under the names that prelude.cu gives to CUDA's counterparts.
#define DEVICE device
#define PRIVATE thread
#define GROUP_FLOATS threadgroup float
#define TICKETS 0
#define GROUP_MEMORY threadgroup
#define FN inline
#define BARRIER() threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device)
typedef uint word;

FN float bits_as_float(word bits) { return as_type<float>(bits); }
FN word float_as_bits(float value) { return as_type<uint>(value); }
FN float exp_2(float x) { return precise::exp2(x); }
FN float root_inverse(float x) { return precise::rsqrt(x); }
FN void turn(float angle, thread float* c, thread float* s) { *s = precise::sincos(angle, *c); }
FN float lanes_xor(float value, int mask) { return simd_shuffle_xor(value, ushort(mask)); }
FN word lanes_max(word value) { return simd_max(value); }
FN word lanes_min(word value) { return simd_min(value); }

template <typename E> FN void load4(const device E* from, thread float* to) {
  for (int i = 0; i < 4; i++) to[i] = float(from[i]);
}

// Eight neighbours of a plain array. One by one: a tensor in a mapped file need not lie on a multiple of 16 bytes.
template <typename E> struct Eight {
  E v[8];
  FN void load(const device E* from) { for (int i = 0; i < 8; i++) v[i] = from[i]; }
  FN void clear() { for (int i = 0; i < 8; i++) v[i] = E(0.0f); }
  FN void unfold(thread float* to) const { for (int i = 0; i < 8; i++) to[i] = float(v[i]); }
};
template <int N> FN void load_words(const device word* from, thread word* to) {
  for (int i = 0; i < N; i++) to[i] = from[i];
}
