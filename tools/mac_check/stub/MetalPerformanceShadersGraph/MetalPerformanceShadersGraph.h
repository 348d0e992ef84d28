// The names that torch's MPSStream.h mentions.
#pragma once
#include <MetalPerformanceShaders/MetalPerformanceShaders.h>

@class MPSGraph, MPSGraphExecutionDescriptor, MPSGraphCompilationDescriptor;
