#include "lazy_views.h"

#include <ATen/core/List_inl.h>
#include <ATen/core/Tensor.h>

namespace torch_fused {
namespace {

bool is_lazy(const c10::IValue& value) {
  return value.isTensor() && value.toTensor().defined() && (value.toTensor().is_neg() || value.toTensor().is_conj());
}

}  // namespace

void resolve_lazy_views(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  const std::string name = schema.name().substr(schema.name().find("::") + 2);
  const size_t first = stack->size() - schema.arguments().size();
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const c10::Argument& argument = schema.arguments()[i];
    const auto resolved = [&](const c10::IValue& value) {
      TORCH_CHECK(!argument.alias_info() || !argument.alias_info()->isWrite(), name, ": ", argument.name(),
                  " must not be a negated or conjugated view, which is written nowhere; got one");
      return c10::IValue(value.toTensor().resolve_neg().resolve_conj());
    };
    c10::IValue& value = (*stack)[first + i];
    if (is_lazy(value)) {
      value = resolved(value);
    } else if (value.isList()) {
      const auto list = value.toList().copy();
      for (size_t j = 0; j < list.size(); ++j) {
        if (is_lazy(list.get(j))) list.set(j, resolved(list.get(j)));
      }
      value = list;
    }
  }
  op.redispatchBoxed(keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, keys.highestPriorityTypeId()), stack);
}

}  // namespace torch_fused
