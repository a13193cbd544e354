// A chunk of the KV cache: 32 positions of one KV head, K then V, each in pieces of 16 bytes that are a lane's whole fragment of the tensor core's
// m = 16 operand, weights' way (cuda/tensor.cuh): a warp takes 32 pieces, lane n * 4 + quarter the one of row n and quarter.
//   K: the rows are 8 positions of one unit and 8 of the next, the columns 32 dims in two halves; [unit / 2][d / 32][d % 8 / 4] pieces
//   V: the rows are 8 dims and the 8 after them, the columns 32 positions in two halves; [d / 16][p % 8 / 4] pieces
// Positions p of a quarter are 8 * quarter .. + 7, and of a unit (0 .. 3) those with p % 8 / 2 == unit: so that a unit's scores, transposed,
// are the other operand for V.
#pragma once

namespace imex {

// Byte offsets in a chunk of dimension d of position p (0 .. 31). Dims d and d + 1 of a key are neighbours, d even; and positions p and p + 1 of a
// value's dimension, p even.
DEV int key_offset(int p, int d) {
  const int unit = p % 8 / 2, n = p / 8 * 2 + p % 2, dim = shape().head_dim;
  const int piece = (((unit / 2 * (dim / 32) + d / 32) * 2 + d % 8 / 4) * 8 + n) * 4 + d % 32 / 8;
  return piece * 16 + d % 4 / 2 * 8 + unit % 2 * 4 + d % 2 * 2;
}
DEV int value_offset(int p, int d) {
  const int piece = ((d / 16 * 2 + p % 8 / 4) * 8 + d % 8) * 4 + p / 8;
  return kChunk * (int)shape().head_dim * 2 + piece * 16 + p % 4 / 2 * 8 + d / 8 % 2 * 4 + p % 2 * 2;
}
DEV int merge_width() { return (int)shape().head_dim + kMergeExtra; }  // floats of a query where warps merge

}  // namespace imex
