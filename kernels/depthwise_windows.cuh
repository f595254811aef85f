// depthwise_windows.cuh -- windows of V neighbouring elements of a row, one for each tap, out of whole vectors.

#pragma once

#include "depthwise.cuh"

constexpr int V = 16 / sizeof(E);

// window[r][v] = element AT + r * dilation + v of a row whose vector i is read(i). AT < V; dilation is 1 if ONE, else
// its remainder by V is REST: which registers hold a window is known at compile time.
template <int N, int AT, bool ONE, int REST, class Read>
__device__ __forceinline__ void windows(S (&window)[N][V], Index dilation, const Read& read) {
  if constexpr (ONE) {
    constexpr int COUNT = ceil_div(AT + N - 1 + V, V);
    Vector<E, V> all[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) all[i] = read(Index(i));
#pragma unroll
    for (int r = 0; r < N; ++r)
#pragma unroll
      for (int v = 0; v < V; ++v) window[r][v] = widen(all[(AT + r + v) / V].at[(AT + r + v) % V]);
  } else {
#pragma unroll
    for (int r = 0; r < N; ++r) {
      const int low = (AT + r * REST) % V;
      const Index i = (AT + r * dilation - low) / V;
      const Vector<E, V> left = read(i);
      Vector<E, V> right{};
      if (low) right = read(i + 1);
#pragma unroll
      for (int v = 0; v < V; ++v) window[r][v] = widen(low + v < V ? left.at[(low + v) % V] : right.at[(low + v) % V]);
    }
  }
}
