"""Components laid side by side: which copy and coefficient belongs to which, and maps over all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bayestie._components import Component, Frozen, outside_transforms

# Up to here one matrix product beats the transforms; beyond, no K x K matrix is formed for structured kinds.
DENSE_COPIES = 256


@dataclass(frozen=True)
class Layout(Frozen):
    """Components in the order of their first copy.

    order: copy at each place of the components laid end to end; None where that is 0 .. K - 1.

    Equal components are one batch, a block; coefficients come block by block, in copy order where all
    components are exchangeable.
    """

    components: tuple[Component, ...]
    order: tuple[int, ...] | None = None

    @cached_property
    def num_copies(self) -> int:
        return sum(part.num_copies for part in self.components)

    @cached_property
    def rank(self) -> int:
        return sum(part.rank for part in self.components)

    @cached_property
    def hubs_only(self) -> bool:
        return all(part.hub for part in self.components)

    @cached_property
    def copies(self) -> tuple[Tensor, ...]:
        """Copies of each component, in the component's own order."""
        with outside_transforms():
            laid = range(self.num_copies) if self.order is None else self.order
            return torch.tensor(laid, device="cpu").split([part.num_copies for part in self.components])

    @cached_property
    def labels(self) -> Tensor:
        with outside_transforms():
            numbers = torch.empty(self.num_copies, dtype=torch.int64, device="cpu")
            for number, copies in enumerate(self.copies):
                numbers[copies] = number
            return numbers

    @cached_property
    def blocks(self) -> dict[Component, list[int]]:
        """Each distinct component with the numbers of the components equal to it."""
        found: dict[Component, list[int]] = {}
        for number, part in enumerate(self.components):
            found.setdefault(part, []).append(number)
        return found

    @cached_property
    def shared(self) -> tuple[Component, ...]:
        """The components, equal ones as one object, so that a spectrum is computed once."""
        one = {part: part for part in self.blocks}
        return tuple(one[part] for part in self.components)

    @cached_property
    def coefficient_labels(self) -> Tensor:
        if self.hubs_only:
            return self.labels
        with outside_transforms():
            numbers = [n for part, same in self.blocks.items() for n in same for _ in range(part.rank)]
            return torch.tensor(numbers, dtype=torch.int64, device="cpu")

    @cached_property
    def eigenvalues(self) -> Tensor:
        with outside_transforms():
            if self.hubs_only:
                return torch.ones(self.rank, dtype=torch.float64, device="cpu")
            return torch.cat([p.eigenvalues().repeat(len(same)) for p, same in self.blocks.items()])

    # -- maps on the last axis -------------------------------------------------------------------------------

    def synthesize(self, coefficients: Tensor) -> Tensor:
        if self.num_copies <= DENSE_COPIES and not self.hubs_only:
            matrix = self.cast("synthesis", self._synthesis, coefficients.dtype, coefficients.device)
            return coefficients @ matrix.mT
        return self.synthesize_by_transforms(coefficients)

    def analyze(self, x: Tensor) -> Tensor:
        if self.num_copies <= DENSE_COPIES and not self.hubs_only:
            return x @ self.cast("analysis", self._analysis, x.dtype, x.device).mT
        return self.analyze_by_transforms(x)

    def diagonal(self, v: Tensor) -> Tensor:
        return v if self.hubs_only else self._to_copies(lambda part, own: part.diagonal(own), v)

    def synthesize_by_transforms(self, coefficients: Tensor) -> Tensor:
        if self.hubs_only:
            return coefficients
        return self._to_copies(lambda part, own: part.synthesize(own), coefficients)

    def analyze_by_transforms(self, x: Tensor) -> Tensor:
        if self.hubs_only:
            return x
        return torch.cat([part.analyze(own).flatten(-2) for part, own in self.in_blocks(x)], -1)

    def _synthesis(self) -> Tensor:
        unit = torch.eye(self.rank, dtype=torch.float64, device="cpu")
        return self.synthesize_by_transforms(unit).mT.contiguous()

    def _analysis(self) -> Tensor:
        unit = torch.eye(self.num_copies, dtype=torch.float64, device="cpu")
        return self.analyze_by_transforms(unit).mT.contiguous()

    def in_blocks(self, x: Tensor) -> list[tuple[Component, Tensor]]:
        """(..., K) -> for each block (..., components, copies of one)."""
        if self._block_order is not None:
            x = x.index_select(-1, self.index("_block_order", x.device))
        sizes = [len(same) * part.num_copies for part, same in self.blocks.items()]
        return [
            (part, own.unflatten(-1, (len(same), part.num_copies)))
            for (part, same), own in zip(self.blocks.items(), x.split(sizes, -1), strict=True)
        ]

    def _to_copies(self, apply: Callable[[Component, Tensor], Tensor], coefficients: Tensor) -> Tensor:
        """(..., r) -> (..., K), each block by its own component."""
        sizes = [len(same) * part.rank for part, same in self.blocks.items()]
        pieces = []
        for (part, same), own in zip(self.blocks.items(), coefficients.split(sizes, -1), strict=True):
            if part.rank:
                pieces.append(apply(part, own.unflatten(-1, (len(same), part.rank))).flatten(-2))
            else:
                pieces.append(own.new_zeros((*own.shape[:-1], len(same))))
        laid = torch.cat(pieces, -1)
        if self._block_order is None:
            return laid
        return laid.index_select(-1, self.index("_block_place", laid.device))

    @cached_property
    def _block_order(self) -> Tensor | None:
        """Copy at each place of the blocks laid end to end; None where that is 0 .. K - 1."""
        with outside_transforms():
            order = torch.cat([self.copies[number] for same in self.blocks.values() for number in same])
            return None if bool((order == torch.arange(len(order), device="cpu")).all()) else order

    @cached_property
    def _block_place(self) -> Tensor:
        with outside_transforms():
            assert self._block_order is not None
            return torch.argsort(self._block_order)

    # -- one value per component -----------------------------------------------------------------------------

    def index(self, name: str, device: torch.device) -> Tensor:
        """An integer attribute of the layout on a device."""
        return self.cast(name, lambda: getattr(self, name), torch.int64, device)

    @cached_property
    def component_sizes(self) -> Tensor:
        with outside_transforms():
            return torch.tensor([part.num_copies for part in self.components], device="cpu")

    @cached_property
    def first_copies(self) -> Tensor:
        with outside_transforms():
            return torch.stack([copies[0] for copies in self.copies])

    @cached_property
    def hub_mask(self) -> Tensor:
        with outside_transforms():
            return torch.tensor([part.hub for part in self.components], device="cpu")

    @cached_property
    def anchored_mask(self) -> Tensor:
        with outside_transforms():
            return torch.tensor([part.anchored for part in self.components], device="cpu")

    @cached_property
    def contrast_shares(self) -> Tensor:
        """Contrasts per coefficient with hubs integrated out, (r,): (K_c - 1) / K_c around a hub, else 1."""
        with outside_transforms():
            shares = [1 - part.hub / part.num_copies for part in self.components]
            return torch.tensor(shares, dtype=torch.float64, device="cpu")[self.coefficient_labels]
