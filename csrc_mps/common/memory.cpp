#include "memory.h"

#include <c10/util/SmallVector.h>

#include <algorithm>
#include <iterator>

namespace torch_fused {
namespace {

using Operand = MemoryCheck::Operand;

// How far apart two elements can be along a dimension: `stride` times any number from `low` to `high`.
struct Span {
  int64_t stride, low, high;
};
using Spans = c10::SmallVector<Span, 12>;

// Whether distances along all spans, the longest strides first, can add up to `distance`. Every stride leaves few
// numbers to try, unless strides are chosen to leave many: then it gives up, and says that they can.
class Sum {
 public:
  explicit Sum(const Spans& spans) : spans_(spans), low_(spans.size() + 1, 0), high_(spans.size() + 1, 0) {
    for (size_t i = spans.size(); i-- > 0;) {
      low_[i] = low_[i + 1] + spans[i].stride * spans[i].low;
      high_[i] = high_[i + 1] + spans[i].stride * spans[i].high;
    }
  }

  bool reaches(int64_t distance, size_t i = 0) {
    if (distance < low_[i] || distance > high_[i]) return false;
    if (i == spans_.size() || --tries_ < 0) return true;
    const auto [stride, low, high] = spans_[i];
    // What the spans after this one cannot add is left to it. Rounded towards zero, so at most one number too many.
    const int64_t first = std::max(low, (distance - high_[i + 1]) / stride - 1);
    const int64_t last = std::min(high, (distance - low_[i + 1]) / stride + 1);
    for (int64_t n = first; n <= last; ++n) {
      if (reaches(distance - n * stride, i + 1)) return true;
    }
    return false;
  }

 private:
  const Spans& spans_;
  c10::SmallVector<int64_t, 12> low_, high_;
  int64_t tries_ = 100000;
};

// Sorted by stride, the longest first, spans of one stride joined.
Spans joined(Spans spans) {
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.stride > b.stride; });
  Spans result;
  for (const Span& span : spans) {
    if (result.empty() || result.back().stride != span.stride) {
      result.push_back(span);
    } else {
      result.back().low += span.low;
      result.back().high += span.high;
    }
  }
  return result;
}

int64_t element_size(const Operand& x) {
  return static_cast<int64_t>(x.tensor->itemsize());
}

// Appends the spans from the first element of `x` to any other, in bytes, or back.
void append_spans(Spans& spans, const Operand& x, bool back) {
  for (int64_t dim = 0; dim < x.tensor->dim(); ++dim) {
    const int64_t most = x.tensor->size(dim) - 1, stride = x.tensor->stride(dim) * element_size(x);
    if (most > 0 && stride > 0) spans.push_back({stride, back ? -most : 0, back ? 0 : most});
  }
}

bool share_memory(const Operand& a, const Operand& b) {
  Spans spans{{1, 1 - element_size(b), element_size(a) - 1}};
  append_spans(spans, a, false);
  append_spans(spans, b, true);
  const Spans sorted = joined(std::move(spans));
  return Sum(sorted).reaches(static_cast<int64_t>(b.begin - a.begin));
}

bool overlaps_itself(const Operand& x) {
  if (x.tensor->is_non_overlapping_and_dense()) return false;
  Spans spans;
  for (int64_t dim = 0; dim < x.tensor->dim(); ++dim) {
    const int64_t most = x.tensor->size(dim) - 1, stride = x.tensor->stride(dim);
    if (most == 0) continue;
    if (stride == 0) return true;
    spans.push_back({stride, -most, most});
  }
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.stride > b.stride; });
  // Two elements differ first along one of the dimensions.
  for (; !spans.empty(); spans.erase(spans.begin())) {
    spans[0].low = 1;
    if (Sum(spans).reaches(0)) return true;
  }
  return false;
}

bool before(const Operand& a, const Operand& b) {
  return a.space != b.space ? a.space < b.space : a.begin < b.begin;
}

uint64_t storage_begin(const at::Tensor& tensor) {
  return reinterpret_cast<uint64_t>(tensor.storage().data());
}

uint64_t storage_end(const at::Tensor& tensor) {
  return storage_begin(tensor) + tensor.storage().nbytes();
}

}  // namespace

void MemoryMap::add(const at::Tensor& tensor) {
  uint64_t begin = storage_begin(tensor), end = storage_end(tensor);
  for (auto next = ends_.upper_bound(end); next != ends_.begin() && std::prev(next)->second >= begin;) {
    const auto touching = std::prev(next);
    begin = std::min(begin, touching->first);
    end = std::max(end, touching->second);
    next = ends_.erase(touching);
  }
  ends_[begin] = end;
}

bool MemoryMap::meets(const at::Tensor& tensor) const {
  const auto next = ends_.lower_bound(storage_end(tensor));
  return next != ends_.begin() && std::prev(next)->second > storage_begin(tensor);
}

std::string MemoryCheck::Operand::full_name() const {
  return index < 0 ? name : std::string(name) + "[" + std::to_string(index) + "]";
}

void MemoryCheck::add(std::vector<Operand>& operands, const char* name, const at::Tensor& tensor, int64_t index) {
  if (tensor.numel() == 0) return;
  int64_t last = 0;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) last += (tensor.size(dim) - 1) * tensor.stride(dim);
  const auto size = static_cast<uint64_t>(tensor.element_size());
  // On MPS an address is not visible: bytes are counted from the start of the storage.
  const bool visible = !tensor.is_mps();
  const auto space = visible ? 0 : reinterpret_cast<uint64_t>(tensor.storage().data());
  const auto begin = visible ? reinterpret_cast<uint64_t>(tensor.const_data_ptr())
                             : static_cast<uint64_t>(tensor.storage_offset()) * size;
  operands.push_back(
      {name, index, tensor.unsafeGetTensorImpl(), space, begin, begin + (static_cast<uint64_t>(last) + 1) * size});
}

void MemoryCheck::run() {
  std::stable_sort(written_.begin(), written_.end(), before);
  std::vector<uint64_t> ends;  // the end of the furthest operand so far
  ends.reserve(written_.size());
  // Those of the first `count` written operands that reach beyond the beginning of x.
  const auto check = [&](const Operand& x, size_t count) {
    while (count-- > 0 && written_[count].space == x.space && ends[count] > x.begin) {
      const Operand& other = written_[count];
      TORCH_CHECK(other.end <= x.begin || !share_memory(other, x), op_, ": ", x.full_name(),
                  " must not share memory with ", other.full_name(), ", which the op writes");
    }
  };
  for (size_t i = 0; i < written_.size(); ++i) {
    const Operand& x = written_[i];
    TORCH_CHECK(!overlaps_itself(x), op_, ": ", x.full_name(),
                " must not be an expanded tensor or another whose elements share memory; its strides are ",
                x.tensor->strides());
    check(x, i);
    const bool further = i > 0 && written_[i - 1].space == x.space && ends[i - 1] > x.end;
    ends.push_back(further ? ends[i - 1] : x.end);
  }
  for (const Operand& x : read_) {
    Operand past = x;
    past.begin = x.end;
    check(x, static_cast<size_t>(std::lower_bound(written_.begin(), written_.end(), past, before) - written_.begin()));
  }
}

}  // namespace torch_fused
