// The few functions of NVIDIA's driver that are used, with their documented signatures; handles are opaque pointers. It
// is opened when it is first needed, so that one build serves torch with and without CUDA.
#pragma once

#include "launch.h"

namespace torch_fused {

// CUlaunchAttribute and CUlaunchConfig.
struct LaunchAttribute {
  int id, unused;
  union {
    int allowed;
    char room[64];
  };
};
struct LaunchConfig {
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};
constexpr int kProgrammaticStreamSerialization = 6;  // CU_LAUNCH_ATTRIBUTE_...

// CUDA_KERNEL_NODE_PARAMS and CUgraphEdgeData.
struct KernelNode {
  void* function;
  unsigned grid[3], block[3], shared_bytes;
  void** arguments;
  void** extra;
  void* kernel;
  void* context;
};
struct GraphEdge {
  unsigned char from_port, to_port, type, reserved[5];
};
constexpr unsigned char kProgrammatic = 1;  // a port, CU_GRAPH_KERNEL_NODE_PORT_..., and a type of an edge

constexpr int kRelaxedCaptureMode = 2;                                     // CU_STREAM_CAPTURE_MODE_RELAXED
constexpr int kComputeCapabilityMajor = 75, kComputeCapabilityMinor = 76;  // CUdevice_attribute

struct Driver {
  int (*device_get)(int*, int);
  int (*device_attribute)(int*, int, int);
  int (*primary_context)(void**, int);
  int (*current_context)(void**);
  int (*set_current_context)(void*);
  int (*exchange_capture_mode)(int*);
  int (*load_module)(void**, const void*);
  int (*get_function)(void**, void*, const char*);
  int (*launch)(const LaunchConfig*, void*, void**, void**);
  int (*error_name)(int, const char**);

  // Those of graphs, null in a driver older than CUDA 12.3.
  struct {
    int (*is_capturing)(void*, int*);
    int (*create)(void**, unsigned);
    int (*add_kernel)(void**, void*, void* const*, size_t, const KernelNode*);
    int (*add_edges)(void*, void* const*, void* const*, const GraphEdge*, size_t);
    int (*instantiate)(void**, void*, unsigned long long);
    int (*set_kernel)(void*, void*, const KernelNode*);
    int (*launch)(void*, void*);
    int (*destroy)(void*);
    int (*destroy_executable)(void*);
    bool present;
  } graph;

  // Raises c10::Error that names the kernel and the step.
  void check(int status, const Launch& launch, const char* step) const;
};

// Throws LibraryUnavailable where there is none.
const Driver& driver();

}  // namespace torch_fused
