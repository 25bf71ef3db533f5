// A C entry to the CUDA kernel of rotary: returns what went wrong, or null.
#include "rotary.h"

#include "entry.h"

using lspm::DType;
using lspm::RotaryShape;

extern "C" {

const char* rotary(const void* x, const void* cos, const void* sin, const int64_t* offsets, void* out,
                   const RotaryShape* shape, int device, void* stream) {
  return message_of([&] { lspm::cuda::rotary(x, cos, sin, offsets, out, *shape, device, stream); });
}

// sizes: the ten first members of RotaryShape, in order.
RotaryShape* rotary_shape(const int64_t* sizes, int dtype, int table_dtype, int interleaved, int inverse) {
  static RotaryShape shape;
  shape = {sizes[0],
           sizes[1],
           sizes[2],
           sizes[3],
           sizes[4],
           sizes[5],
           sizes[6],
           sizes[7],
           sizes[8],
           sizes[9],
           static_cast<DType>(dtype),
           static_cast<DType>(table_dtype),
           interleaved != 0,
           inverse != 0};
  return &shape;
}

}  // extern "C"
