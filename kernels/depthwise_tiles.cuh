// depthwise_tiles.cuh -- what the depthwise kernels share that take tiles of stride 1 through shared memory.

#pragma once

#include "depthwise.cuh"

// One axis of the tiles. Of phase f, output j is at f + j * step, and its first tap reads first + f + j * step.
struct TiledAxis {
  Index source, target;              // positions
  Index tiles, phases;               // as blocks count them
  Index step, first;
  Index source_pitch, target_pitch;  // elements from one position to the next
};

struct Params {
  const E* x;
  const E* w;
  const E* bias;
  E* y;
  Index channels, channel_tiles;
  Index source_batch, target_batch;      // elements of a batch item
  Index source_channel, target_channel;  // elements from one channel to the next
  Index tap_first, tap_step;             // elements of w
  TiledAxis inner, outer;
};

// Neighbours in phase order: number i is at + i * step. Where the phases of a sequence are many and short, a tile has
// several, as an outer axis of one tap: PHASED, and the position on the inner axis is the sum of both.
struct Side {
  Index at, step;
};

// Where a block stands: blockIdx.x counts, fastest first, tile of channels, tile of the inner and of the outer axis,
// phase of the inner and of the outer axis, item.
struct Tile {
  Index c0, inner0, outer0, inner_phase, outer_phase, batch;
  int channels;

  __device__ __forceinline__ Tile(const Params& p, int channels_each, int inner_each, int outer_each) {
    Index n = Index(blockIdx.x);
    c0 = take(n, p.channel_tiles) * channels_each;
    inner0 = take(n, p.inner.tiles) * inner_each;
    outer0 = take(n, p.outer.tiles) * outer_each;
    inner_phase = take(n, p.inner.phases);
    outer_phase = take(n, p.outer.phases);
    batch = n;
    channels = int(p.channels - c0 < channels_each ? p.channels - c0 : channels_each);
  }
  // What the first tap reads, `before` earlier; and what is written.
  __device__ __forceinline__ Side inner_source(const Params& p, int before) const {
    return {p.inner.first + inner_phase + inner0 * p.inner.step - before, p.inner.step};
  }
  __device__ __forceinline__ Side outer_source(const Params& p) const {
    return {p.outer.first + outer_phase + outer0 * p.outer.step, p.outer.step};
  }
  __device__ __forceinline__ Side inner_target(const Params& p) const {
    return {inner_phase + inner0 * p.inner.step, p.inner.step};
  }
  __device__ __forceinline__ Side outer_target(const Params& p) const {
    return {outer_phase + outer0 * p.outer.step, p.outer.step};
  }
};
