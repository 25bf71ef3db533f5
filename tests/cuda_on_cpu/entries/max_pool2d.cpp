// C entries to the CUDA kernels of max_pool2d: each returns what went wrong, or null.
#include "max_pool2d.h"

#include "entry.h"

using lspm::DType;
using lspm::MaxPool2dShape;

extern "C" {

const char* max_pool2d_forward(const void* x, void* y, void* positions, const MaxPool2dShape* shape,
                               int device, void* stream) {
  return message_of([&] { lspm::cuda::max_pool2d_forward(x, y, positions, *shape, device, stream); });
}

const char* max_pool2d_backward(const void* dy, const void* positions, void* dx, const MaxPool2dShape* shape,
                                int device, void* stream) {
  return message_of([&] { lspm::cuda::max_pool2d_backward(dy, positions, dx, *shape, device, stream); });
}

// sizes: images and channels, then the six numbers of the axis of rows and of that of columns.
MaxPool2dShape* max_pool2d_shape(const int64_t* sizes, int dtype) {
  static MaxPool2dShape shape;
  const auto axis = [&](const int64_t* n) { return lspm::PoolAxis{n[0], n[1], n[2], n[3], n[4], n[5]}; };
  shape = {sizes[0], sizes[1], axis(sizes + 2), axis(sizes + 8), static_cast<DType>(dtype)};
  return &shape;
}

}  // extern "C"
