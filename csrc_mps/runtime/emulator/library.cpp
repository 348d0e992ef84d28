#include "library.h"

#include <c10/util/Exception.h>
#include <dlfcn.h>

#include <cctype>
#include <cstdio>
#include <iomanip>
#include <map>
#include <mutex>
#include <sstream>

#include "dispatch.h"

namespace torch_fused::emulator {
namespace {

constexpr char kShims[] = "/metal/include/";  // the folder of our headers, whose lines say nothing to a kernel's author

std::string quoted(const std::string& text) {
  std::string result = "'";
  for (const char c : text) result += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return result + "'";
}

// As torch_fused/metal/program.py spells a kernel's name.
std::string identifier(const std::string& name) {
  std::ostringstream text;
  for (const unsigned char c : name) {
    if (c < 128 && (std::isalnum(c) || c == '_')) {
      text << c;
    } else {
      text << '$' << std::hex << std::setw(2) << std::setfill('0') << int{c};
    }
  }
  return text.str();
}

std::string output_of(const std::string& command) {
  std::string output;
  FILE* pipe = popen(command.c_str(), "r");
  if (!pipe) return output;
  char buffer[4096];
  while (const size_t count = fread(buffer, 1, sizeof(buffer), pipe)) output.append(buffer, count);
  pclose(pipe);
  return output;
}

// "rms_norm.metal:42" of a line of output that has "(rms_norm.metal:42)", macOS, or "/path/rms_norm.metal:42 (...)".
std::string file_and_line(const std::string& line) {
#ifdef __APPLE__
  const size_t begin = line.rfind('(') + 1, end = line.rfind(')');
#else
  const size_t begin = line.rfind('/', line.find(" (")) + 1, end = line.find(" (");
#endif
  return line.substr(begin, end == std::string::npos ? end : end - begin);
}

}  // namespace

const KernelLibrary& KernelLibrary::open(const std::string& path) {
  static std::mutex mutex;
  static std::map<std::string, KernelLibrary> libraries;
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = libraries.find(path);
  return found != libraries.end() ? found->second : libraries.emplace(path, KernelLibrary(path)).first->second;
}

KernelLibrary::KernelLibrary(const std::string& path)
    : path_(path), handle_(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
  TORCH_CHECK(handle_, "torch_fused emulator: cannot load ", path, ": ", dlerror());
  void* set_runtime = dlsym(handle_, "msl_set_runtime");
  Dl_info info;
  TORCH_CHECK(set_runtime && dladdr(set_runtime, &info), "torch_fused emulator: ", path, " is no library of kernels");
  image_ = info.dli_fbase;
  reinterpret_cast<void (*)(const msl_runtime*)>(set_runtime)(&runtime_table());
}

void (*KernelLibrary::find(const std::string& kernel) const)(const msl_args*) {
  void* function = dlsym(handle_, ("msl_k_" + identifier(kernel)).c_str());
  TORCH_CHECK(function, "torch_fused emulator: no kernel named ", kernel, " in ", path_);
  return reinterpret_cast<void (*)(const msl_args*)>(function);
}

std::string KernelLibrary::place(uintptr_t pc) const {
  const uintptr_t call = pc - 1;  // pc is where the call that reported the access returns to
  std::ostringstream command;
  command << std::hex << std::showbase;
#ifdef __APPLE__
  command << "atos -i -o " << quoted(path_) << " -l " << reinterpret_cast<uintptr_t>(image_) << " " << call;
#else
  const uintptr_t offset = call - reinterpret_cast<uintptr_t>(image_);
  const std::string arguments = " -i -e " + quoted(path_) + " ";
  command << "addr2line" << arguments << offset << " || llvm-addr2line" << arguments << offset;
#endif
  // The functions inlined into one another at that address, the innermost first.
  std::istringstream frames(output_of("(" + command.str() + ") 2>/dev/null"));
  for (std::string frame; std::getline(frames, frame);) {
    const bool known = frame.find('?') == std::string::npos && frame.find(':') != std::string::npos;
    if (known && frame.find(kShims) == std::string::npos) return " [" + file_and_line(frame) + "]";
  }
  return {};
}

}  // namespace torch_fused::emulator
