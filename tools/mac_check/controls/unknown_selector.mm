// Must not compile: the last label is atIndex.
#include <Metal/Metal.h>

void control(id<MTLComputeCommandEncoder> encoder, id<MTLBuffer> buffer) {
  [encoder setBuffer:buffer offset:0 noSuchLabel:0];
}
