"""Which layers read one top-k.

In DeepSeek-V3.2 each layer selects for itself. In GLM-5.2 a layer with an indexer selects, and
the layers after it that have none read the same rows. Such layers are one *index group*: they
share one map, one order of use, one plan and one list of misses. Hot row r holds the same slot in
each of them. Rows themselves stay layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate


@dataclass(frozen=True)
class IndexGroups:
    """The index groups of a pool's layers, in order.

    sizes: layers of each group
    Raises: ValueError for a group without layers.
    """

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"index groups must have a layer each: got {self.sizes}.")

    @classmethod
    def single(cls, layers: int) -> IndexGroups:
        """Each layer is a group."""
        return cls((1,) * layers)

    @classmethod
    def of_layers(cls, selects: Sequence[bool]) -> IndexGroups:
        """selects [layers]: whether the layer selects for itself.

        The first layer always begins a group: what precedes a pipeline stage is not here.
        """
        firsts = [i for i, selected in enumerate(selects) if selected or i == 0]
        ends = [*firsts[1:], len(selects)]
        return cls(tuple(end - first for first, end in zip(firsts, ends, strict=True)))

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def layers(self) -> int:
        return sum(self.sizes)

    @cached_property
    def firsts(self) -> tuple[int, ...]:
        """layer_index of each group's first layer, which selects."""
        return (0, *accumulate(self.sizes[:-1]))

    @cached_property
    def places(self) -> tuple[tuple[int, int], ...]:
        """(group, position in the group) of each layer."""
        return tuple((group, i) for group, size in enumerate(self.sizes) for i in range(size))

    def members(self, group: int) -> range:
        """layer_index of the group's layers."""
        return range(self.firsts[group], self.firsts[group] + self.sizes[group])

    def by_size(self) -> dict[int, list[int]]:
        """The groups of each size. Hot rows move between groups of one size only."""
        found: dict[int, list[int]] = {}
        for group, size in enumerate(self.sizes):
            found.setdefault(size, []).append(group)
        return found
