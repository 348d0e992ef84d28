#pragma once
#include <MetalPerformanceShaders/MetalPerformanceShaders.h>

@class MPSGraph, MPSGraphExecutionDescriptor, MPSGraphCompilationDescriptor;
