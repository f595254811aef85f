// structure.cu -- a structure passed by value, with pointers in it, and offsets beyond 32 bits.
//
//   y[i] = scale * x[i * stride], negated if asked

struct Arguments {
  const unsigned short* x;
  float scale;
  bool negate;
  long long stride;
  unsigned int* y;
};

extern "C" __global__ void gather(Arguments p, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
#ifdef BUG_NARROW_OFFSET
  const long long at = (int)(i * (int)p.stride);
#else
  const long long at = i * p.stride;
#endif
  const int v = (int)(p.scale * (float)p.x[at]);
  p.y[i] = p.negate ? -v : v;
}
