#include "cubin.h"

#include <c10/core/TensorImpl.h>
#include <dlfcn.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <vector>

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
    // torch's stub library knows where the NVRTC of this torch is; the plain names serve builds without it.
    void* library = open_library({torch_library_folder() + "libcaffe2_nvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"});
    Nvrtc n;
    const auto bind = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(symbol(library, name));
    };
    bind(n.version, "nvrtcVersion");
    bind(n.create, "nvrtcCreateProgram");
    bind(n.compile, "nvrtcCompileProgram");
    bind(n.log_size, "nvrtcGetProgramLogSize");
    bind(n.log, "nvrtcGetProgramLog");
    bind(n.cubin_size, "nvrtcGetCUBINSize");
    bind(n.cubin, "nvrtcGetCUBIN");
    bind(n.destroy, "nvrtcDestroyProgram");
    return n;
  }();
  return api;
}

fs::path cache_folder() {
  const auto variable = [](const char* name) { return std::getenv(name) ? std::string(std::getenv(name)) : ""; };
  fs::path base = variable("TORCH_FUSED_CACHE");
  if (base.empty()) {
    base = variable("XDG_CACHE_HOME").empty() ? fs::path(variable("HOME")) / ".cache"
                                              : fs::path(variable("XDG_CACHE_HOME"));
    base /= "torch_fused";
  }
  return base / "cubin";
}

std::string compile(const Source& source, const std::string& arch) {
  const Nvrtc& api = nvrtc();
  void* program = nullptr;
  const std::string file = std::string(source.name) + ".cu";
  if (api.create(&program, source.cuda, file.c_str(), 0, nullptr, nullptr)) {
    throw LibraryUnavailable("NVRTC could not create a program for " + file);
  }
  // No contraction unless the kernel says fma: the same bits as the emulator's.
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

// 64-bit FNV-1a, as hexadecimal digits.
std::string digest(const std::string& text) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const unsigned char byte : text) hash = (hash ^ byte) * 0x100000001b3;
  std::ostringstream digits;
  digits << std::hex << hash;
  return digits.str();
}

// Written beside its place and renamed, so that processes starting at once never read half a file. A cache that cannot
// be written costs time, nothing else.
void save(const fs::path& path, const std::string& bytes) {
  std::error_code ignored;
  fs::create_directories(path.parent_path(), ignored);
  fs::permissions(path.parent_path(), fs::perms::owner_all, ignored);
  const fs::path partial = path.string() + "." + std::to_string(getpid()) + ".partial";
  std::ofstream file(partial, std::ios::binary);
  file << bytes;
  file.close();
  if (file) fs::rename(partial, path, ignored);
  fs::remove(partial, ignored);  // there only if it could not be written whole, or renamed
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
  const fs::path path = cache_folder() / (std::string(source.name) + "-" + digest(compiler + source.cuda) + ".cubin");
  if (std::ifstream file{path, std::ios::binary}) {
    std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    if (!bytes.empty()) return bytes;
  }
  std::string bytes = compile(source, arch);
  save(path, bytes);
  return bytes;
}

}  // namespace torch_fused
