#include "cubin.h"

#include <c10/core/TensorImpl.h>
#include <dlfcn.h>

#include <filesystem>

#include "kept_file.h"

namespace torch_fused {
namespace {

namespace fs = std::filesystem;

// The few NVRTC functions used, with their documented signatures; a program handle is an opaque pointer.
struct Nvrtc {
  int (*version)(int*, int*);
  int (*create)(void**, const char*, const char*, int, const char* const*, const char* const*);
  int (*compile)(void*, int, const char* const*);
  int (*log_size)(void*, size_t*);
  int (*log)(void*, char*);
  int (*cubin_size)(void*, size_t*);
  int (*cubin)(void*, char*);
  int (*destroy)(void**);
};

std::string torch_library_folder() {
  Dl_info info;
  const bool found = dladdr(reinterpret_cast<void*>(&c10::impl::GetAutogradMetaFactory), &info) != 0;
  return found ? fs::path(info.dli_fname).parent_path().string() + "/" : "";
}

const Nvrtc& nvrtc() {
  static const Nvrtc api = [] {
    // torch's stub library finds this torch's NVRTC; the plain names are for builds without it.
    void* library = open_library({torch_library_folder() + "libcaffe2_nvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"});
    Nvrtc n;
    bind(library, n.version, "nvrtcVersion");
    bind(library, n.create, "nvrtcCreateProgram");
    bind(library, n.compile, "nvrtcCompileProgram");
    bind(library, n.log_size, "nvrtcGetProgramLogSize");
    bind(library, n.log, "nvrtcGetProgramLog");
    bind(library, n.cubin_size, "nvrtcGetCUBINSize");
    bind(library, n.cubin, "nvrtcGetCUBIN");
    bind(library, n.destroy, "nvrtcDestroyProgram");
    return n;
  }();
  return api;
}

std::string compile(const Source& source, const std::string& arch) {
  const Nvrtc& api = nvrtc();
  void* program = nullptr;
  const std::string file = std::string(source.name) + ".cu";
  if (api.create(&program, source.cuda, file.c_str(), 0, nullptr, nullptr)) {
    throw LibraryUnavailable("NVRTC could not create a program for " + file);
  }
  // No contraction except explicit fma: the same bits as in the emulator.
  const char* options[] = {arch.c_str(), "--std=c++17", "--device-as-default-execution-space", "--fmad=false",
                           "--generate-line-info"};
  const int status = api.compile(program, std::size(options), options);
  size_t size = 0;
  std::string result;
  if (status) {
    api.log_size(program, &size);
    result.resize(size);
    api.log(program, result.data());
    api.destroy(&program);
    throw LibraryUnavailable("NVRTC: " + file + " (" + arch + "): " + result);
  }
  api.cubin_size(program, &size);
  result.resize(size);
  api.cubin(program, result.data());
  api.destroy(&program);
  return result;
}

}  // namespace

void* open_library(std::initializer_list<std::string> paths) {
  std::string tried;
  for (const std::string& path : paths) {
    if (void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
    tried += std::string(tried.empty() ? "" : "; ") + dlerror();
  }
  throw LibraryUnavailable(tried);
}

void* symbol(void* library, const char* name) {
  if (void* address = dlsym(library, name)) return address;
  throw LibraryUnavailable(std::string("no function ") + name + " in the CUDA libraries");
}

std::string cubin(const Source& source, int major, int minor) {
  const std::string arch = "--gpu-architecture=sm_" + std::to_string(major) + std::to_string(minor);
  int version[2] = {};
  nvrtc().version(&version[0], &version[1]);
  const std::string compiler = arch + " " + std::to_string(version[0]) + "." + std::to_string(version[1]) + "\n";
  const fs::path path =
      cache_folder("cubin") / (std::string(source.name) + "-" + digest(compiler + source.cuda) + ".cubin");
  std::string bytes = load_kept(path);
  if (bytes.empty()) {
    bytes = compile(source, arch);
    save_kept(path, bytes);
  }
  return bytes;
}

}  // namespace torch_fused
