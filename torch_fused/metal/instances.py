"""Finds the definition and the maximum number of threads of each kernel instance."""

from __future__ import annotations

from dataclasses import replace

from .expressions import integer
from .kernels import Definition, Instance
from .program import Kernel
from .source import Source


def resolve(source: Source, functions: dict[str, list[Definition]], instances: list[Instance]) -> list[Kernel]:
    """The kernels that the host can launch, with their arguments."""
    kernels: dict[str, Kernel] = {}
    for instance in instances:
        kernel = instance.kernel
        name = next((name for name in instance.names if name in functions), None)
        if name is None:
            name = next((name for name in functions if name.endswith("::" + kernel.function)), None)
        if name is None:
            source.error(instance.token, f"instantiation of unknown kernel '{kernel.function}'")
        elif kernel.name in kernels:
            source.error(instance.token, f"two kernels are named '{kernel.name}'")
        else:
            definition = _overload(instance, functions[name])
            deduced = bool(definition.template_params) and not kernel.template_args
            overloaded = len(functions[name]) > 1 or deduced
            kernels[kernel.name] = replace(
                kernel,
                function=name,
                params=definition.params,
                max_threads=_max_threads(source, instance, definition),
                types=instance.types if overloaded else None,
            )
    return list(kernels.values())


def _overload(instance: Instance, functions: list[Definition]) -> Definition:
    """The definition of an instance: its own, or else the one with matching parameters."""

    def likeness(function: Definition) -> tuple[bool, bool, int]:
        types = instance.types or ()
        shapes = [[[c for c in t if c in "*&"] for t in side] for side in (types, function.types)]
        equal = sum(a == b for a, b in zip(types, function.types, strict=False))
        return len(types) == len(function.types), shapes[0] == shapes[1], equal

    own = [function for function in functions if function.start == instance.token]
    return own[0] if own else max(functions, key=likeness)


def _max_threads(source: Source, instance: Instance, definition: Definition) -> int | None:
    expression = instance.max_threads or definition.max_threads
    if expression is None:
        return None
    args = instance.kernel.template_args.strip("<> ").split(",")
    params = definition.template_params
    names = source.known | dict(params) | {name: arg for (name, _), arg in zip(params, args, strict=False)}
    value = integer(expression, names)
    if value is None or not 1 <= value <= 1024:
        message = f"max_total_threads_per_threadgroup must be an integer from 1 to 1024, got '{expression}'"
        source.error(instance.token, message)
    return value
