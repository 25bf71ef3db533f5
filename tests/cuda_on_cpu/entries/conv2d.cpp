// C entries to the CUDA kernels of conv2d: each returns what went wrong, or null.
#include "conv2d.h"

#include "entry.h"

using namespace lspm;

extern "C" {

const char* conv2d_forward(const void* x, const void* weight, const Conv2dEpilogue* epilogue, void* y,
                           void* packed, const Conv2dShape* shape, int device, void* stream) {
  return message_of([&] { cuda::conv2d_forward(x, weight, *epilogue, y, packed, *shape, device, stream); });
}

const char* conv2d_backward(const void* dz, const void* x, const void* weight, void* dx, void* dweight,
                            void* packed, float* partial, int64_t partials, const Conv2dShape* shape,
                            int device, void* stream) {
  return message_of([&] {
    cuda::conv2d_backward(dz, x, weight, dx, dweight, packed, partial, partials, *shape, device, stream);
  });
}

}  // extern "C"
