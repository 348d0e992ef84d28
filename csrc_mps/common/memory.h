// Which memory an op's operands share. What an op writes must be reached in one way only: no element twice, and not by
// another operand.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <vector>

namespace torch_fused {

// The memory of many tensors, for a quick look at whether another may have some of it.
class MemoryMap {
 public:
  void add(const at::Tensor& tensor);
  // False only if the tensor's storage has no byte of those of the tensors added; MemoryCheck is exact.
  bool meets(const at::Tensor& tensor) const;

 private:
  std::map<uint64_t, uint64_t> ends_;  // of stretches apart from each other, by their beginnings
};

class MemoryCheck {
 public:
  explicit MemoryCheck(const char* op) : op_(op) {}

  // The operand `name`, or `name[index]` of a list. It must outlive the check.
  void writes(const char* name, const at::Tensor& tensor, int64_t index = -1) { add(written_, name, tensor, index); }
  void reads(const char* name, const at::Tensor& tensor, int64_t index = -1) { add(read_, name, tensor, index); }

  // Throws, naming the operands, if a written one has elements that share memory, with each other or with another
  // operand. Exact: views of one buffer that have no element in common are apart.
  void run();

  struct Operand {
    const char* name;
    int64_t index;
    const at::TensorImpl* tensor;
    uint64_t space, begin, end;  // bytes from its first element to its last, in an address space

    std::string full_name() const;
  };

 private:
  static void add(std::vector<Operand>& operands, const char* name, const at::Tensor& tensor, int64_t index);

  const char* op_;
  std::vector<Operand> written_, read_;
};

}  // namespace torch_fused
