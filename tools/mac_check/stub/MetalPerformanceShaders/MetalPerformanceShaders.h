// The names that torch's MPSStream.h mentions.
#pragma once
#include <Metal/Metal.h>

@interface MPSCommandBuffer : NSObject <MTLCommandBuffer>
@end
