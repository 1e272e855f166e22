"""Triton's interpreter as tests need it: faster, and with e4m3 as a GPU rounds it.

Triton 3.8 looks through the whole language module for built-ins at each launch and at each call
from one kernel function to another (1.5 ms each, a third of a kernel test), to put the same
substitutes in place. Here they are found once; a launch puts them in place and takes them away as
before.

Its own conversion of float32 to e4m3 rounds ties away from zero, loses the carry into the exponent
and cuts subnormals off. A GPU has cvt.rn.satfinite: to the nearest, ties to even.
"""

import dataclasses
import math

import numpy as np
import torch
import triton.language as tl
from triton.language import core
from triton.runtime import interpreter

_INTEGERS = frozenset((*core.dtype.SINT_TYPES, *core.dtype.UINT_TYPES))
_shapes: dict[tuple[int, ...], tuple] = {}  # sizes: (shape, numel) of a tensor
_depth = 0  # of launches; calls inside a launch find the substitutes in place


class _Kernel:
    """What _patch_lang looks at of a kernel: the language modules that its module has."""

    __globals__ = {"tl": tl, "core": tl.core}


class _Substitutes:
    """As interpreter._LangPatchScope: in place from its creation until restore()."""

    found: list[tuple[object, str, object, object]] = []  # (where, name, substitute, original)

    def __init__(self):
        global _depth
        _depth += 1
        if _depth == 1:
            for where, name, substitute, _ in self.found:
                setattr(where, name, substitute)

    def restore(self) -> None:
        global _depth
        _depth -= 1
        if _depth:
            return
        for where, name, _, original in self.found:
            if original is interpreter._MISSING:
                delattr(where, name)
            else:
                setattr(where, name, original)


def _find() -> list[tuple[object, str, object, object]]:
    """Every attribute that Triton replaces for a launch, each once."""
    scope = interpreter._patch_lang(_Kernel)
    originals = {}
    for where, name, original in scope._changes:
        originals.setdefault((where, name), original)
    found = [
        (where, name, getattr(where, name), original)
        for (where, name), original in originals.items()
    ]
    scope.restore()
    return found


def _call(function, *args, **kwargs):
    """One kernel function calls another: InterpretedFunction.__call__ inside a launch."""
    if not _depth:
        raise RuntimeError("a kernel function must be called from a launch: got no launch.")
    try:
        return function.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def new_memory_is_garbage(on: bool = True) -> None:
    """Have torch.empty give NaNs and the largest integers: on the CPU it often gives zeros."""
    torch.use_deterministic_algorithms(on, warn_only=True)


_launch = interpreter.GridExecutor.__call__


def refuse() -> None:
    """No kernel runs in this process: a CPU host has no Triton, and no interpreter of it."""
    interpreter.GridExecutor.__call__ = _refused


def allow() -> None:
    """As before refuse()."""
    interpreter.GridExecutor.__call__ = _launch


def _refused(executor, *args, **kwargs):
    name = getattr(executor.fn, "__name__", executor.fn)
    raise RuntimeError(f"the CPU platform must run no Triton kernel: got {name}. Hook its caller.")


def make_fast() -> None:
    """Change the interpreter of this process. Idempotent."""
    if _Substitutes.found:
        return
    builder = interpreter.interpreter_builder
    if not builder.options.debug:  # else it reports what it finds
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    _Substitutes.found = _find()
    core.tensor.__init__ = _make_tensor
    core.block_type.with_element_ty = _with_element_ty
    core.dtype.is_int = lambda kind: kind.name in _INTEGERS
    core._unwrap_if_constexpr = _unwrap(core._unwrap_if_constexpr)
    interpreter._patch_lang = lambda function: _Substitutes()
    interpreter.InterpretedFunction.__call__ = _call
    interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)
    interpreter._convert_float = _with_e4m3(interpreter._convert_float)


def _make_tensor(tensor, handle, kind) -> None:
    """tensor.__init__, with one shape for all tensors of one."""
    tensor.handle, tensor.type, tensor.dtype = handle, kind, kind.scalar
    sizes = tuple(kind.shape.values) if kind.is_block() else ()
    if sizes not in _shapes:
        _shapes[sizes] = (
            core.tuple([core.constexpr(size) for size in sizes]),
            core.constexpr(math.prod(sizes)),
        )
    tensor.shape, tensor.numel = _shapes[sizes]


def _with_element_ty(block, kind):
    """block_type.with_element_ty, once for a block type and an element's."""
    if type(kind) is not core.dtype:
        return core.block_type(kind, block.shape)
    known = block.__dict__.setdefault("_by_element", {})
    if kind.name not in known:
        known[kind.name] = core.block_type(kind, block.shape)
    return known[kind.name]


def _unwrap(original):
    """_unwrap_if_constexpr, which asks four questions of what is mostly a number or a type."""
    plain = {int, bool, float, str, core.dtype, core.block_type, core.pointer_type, core.tensor}

    def unwrap(value):
        kind = type(value)
        if kind in plain:
            return value
        return value.value if kind is core.constexpr else original(value)

    return unwrap


def _by_name(dtype_of):
    """_get_np_dtype, which makes a table of all types at every call, with one table for all."""
    known = {}

    def get(kind):
        name = (kind.element_ty if isinstance(kind, tl.block_type) else kind).name
        if name not in known:
            known[name] = dtype_of(kind)
        return known[name]

    return get


def _with_e4m3(convert):
    """_convert_float, with torch's conversion of float32 to e4m3; what is too large saturates."""

    def convert_float(values, source, target, rounding_mode):
        if source is not tl.float32 or target is not tl.float8e4nv:
            return convert(values, source, target, rounding_mode)
        limit = torch.finfo(torch.float8_e4m3fn).max
        within = torch.from_numpy(np.ascontiguousarray(values)).clamp(-limit, limit)
        return within.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    return convert_float
