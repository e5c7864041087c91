// What the kernels need of CUDA, under the names that prelude.metal gives to Metal's counterparts.
#define DEVICE
#define PRIVATE
#define GROUP_FLOATS float
#define TICKETS 1
#define PUBLISH() __threadfence()
#define TAKE_TICKET(counter) atomicAdd((int*)(counter), 1)
#define FRESH(place) __ldcg(&(place))
#define GROUP_MEMORY __shared__
#define FN __device__ __forceinline__
#define BARRIER() __syncthreads()
typedef unsigned int word;

FN float bits_as_float(word bits) { return __uint_as_float(bits); }
FN word float_as_bits(float value) { return __float_as_uint(value); }
FN float exp_2(float x) { return exp2f(x); }
FN float root_inverse(float x) { return rsqrtf(x); }
FN void turn(float angle, float* c, float* s) { sincosf(angle, s, c); }
FN float lanes_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
FN word lanes_max(word value) { return __reduce_max_sync(0xffffffffu, value); }
FN word lanes_min(word value) { return __reduce_min_sync(0xffffffffu, value); }

FN void split_pair(word pair, float* to, const __nv_bfloat16*) {
  to[0] = bits_as_float(pair << 16);
  to[1] = bits_as_float(pair & 0xffff0000u);
}
FN void split_pair(word pair, float* to, const __half*) {
  float2 both = __half22float2(*reinterpret_cast<const __half2*>(&pair));
  to[0] = both.x;
  to[1] = both.y;
}
FN void load4(const float* from, float* to) {
  float4 v = *reinterpret_cast<const float4*>(from);
  to[0] = v.x; to[1] = v.y; to[2] = v.z; to[3] = v.w;
}
template <typename E>
FN void load4(const E* from, float* to) {
  uint2 v = *reinterpret_cast<const uint2*>(from);
  split_pair(v.x, to, from);
  split_pair(v.y, to + 2, from);
}

// Eight neighbours of a plain array as they lie in memory, to be loaded early and unfolded late.
template <typename E> struct Eight {
  uint4 v;
  FN void load(const E* from) { v = *reinterpret_cast<const uint4*>(from); }
  FN void clear() { v = make_uint4(0, 0, 0, 0); }
  FN void unfold(float* to) const {
    const E* tag = nullptr;
    split_pair(v.x, to, tag); split_pair(v.y, to + 2, tag);
    split_pair(v.z, to + 4, tag); split_pair(v.w, to + 6, tag);
  }
};
template <> struct Eight<float> {
  float4 v[2];
  FN void load(const float* from) {
    v[0] = reinterpret_cast<const float4*>(from)[0];
    v[1] = reinterpret_cast<const float4*>(from)[1];
  }
  FN void clear() { v[0] = v[1] = make_float4(0, 0, 0, 0); }
  FN void unfold(float* to) const {
    to[0] = v[0].x; to[1] = v[0].y; to[2] = v[0].z; to[3] = v[0].w;
    to[4] = v[1].x; to[5] = v[1].y; to[6] = v[1].z; to[7] = v[1].w;
  }
};
template <int N> FN void load_words(const word* from, word* to) {
  if constexpr (N % 4 == 0) {
    for (int i = 0; i < N; i += 4) {
      uint4 v = *reinterpret_cast<const uint4*>(from + i);
      to[i] = v.x; to[i + 1] = v.y; to[i + 2] = v.z; to[i + 3] = v.w;
    }
  } else {
    for (int i = 0; i < N; i++) to[i] = from[i];
  }
}
