"""The fork's whole difference from SGLang: one module per upstream module.

Each module here but `contract` and `topk_stream` exposes `HOOKS: tuple[Hook, ...]`; the bodies
delegate to the rooms of `sglang_ess`.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `python -m ess_patches.contract` must not find it imported already
    from ess_patches.contract import Hook


def all_hooks() -> tuple[Hook, ...]:
    """Every row of every hook module, modules in name order; not those of `topk_stream`.

    Raises: RuntimeError if a module of this package has no HOOKS.
    """
    rows: list[Hook] = []
    for name in sorted(info.name for info in pkgutil.iter_modules(__path__)):
        if name in ("contract", "topk_stream"):
            continue
        module = importlib.import_module(f"{__name__}.{name}")
        if not hasattr(module, "HOOKS"):
            raise RuntimeError(
                f"{module.__name__} must expose HOOKS: got none. Add the tuple of its Hook rows."
            )
        rows.extend(module.HOOKS)
    return tuple(rows)
