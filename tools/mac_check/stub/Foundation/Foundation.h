// Just enough of Foundation to compile torch's MPS headers and metal.mm; declared by hand from Apple's documentation.
#pragma once
#include <dispatch/dispatch.h>
#include <objc/NSObject.h>

@interface NSString : NSObject
+ (instancetype)stringWithUTF8String:(const char*)string;
@end
@class NSDictionary;
