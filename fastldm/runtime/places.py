"""The places of a bundle's networks that adapters take (adapters/packing.py): as pages beside weights are, but for a
rank of 1.

What text encoders, keys and values and time rows have is the request's in hand; what every step reads has a scale for
each row, so that different adapters share a batch as long as there is room for all.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from fastldm.adapters.forms import LoRA
from fastldm.adapters.packing import Packed
from fastldm.adapters.read import Adapter
from fastldm.adapters.selection import Selected, Selection
from fastldm.adapters.targets import Target
from fastldm.errors import InputError
from fastldm.runtime.pages import Pool, Variant, loras_of, rank_of

INSTEAD = "export the model with it: `fastldm export --lora FILE:SCALE`"


class Places(Pool):
    """Of a bundle. The worker's thread alone writes to it."""

    def __init__(self, networks: Mapping[str, Packed]) -> None:
        self.networks, self._step = networks, networks["unet_step"]
        self.rank = self._step.rank
        super().__init__(self.rank)

    @property
    def nbytes(self) -> int:
        return self._step.nbytes

    def size(self, one: Selected) -> int:
        return rank_of(one)

    def trim(self) -> None:
        """Forget which adapters they hold; the memory is the networks'."""
        self._held = {}

    def _fill(self, one: Selected, variant: Variant, parts: Sequence[int]) -> None:
        places, written = [part - 1 for part in parts], {}
        for path, (form, scale) in loras_of(one).items():
            target = Target("unet", path)
            written[target] = self._step.cast(target, form, scale if variant.scales else 1.0)
        for target in self._step.targets:
            self._step.clear(target, places)
            if target in written:
                self._step.write(target, places[: len(written[target][0])], written[target])

    def check_adapter(self, adapter: Adapter) -> None:
        """InputError for what is not of low rank, or of a higher rank than the bundle takes."""
        for target, change in adapter.changes.items():
            kind = type(change.weight).__name__
            if not isinstance(change.weight, LoRA) or change.bias is not None:
                what = "a bias" if change.bias is not None else f"a change that is no LoRA ({kind})"
                raise InputError(
                    f"{adapter.source} has {what} for {target}: a bundle takes LoRA alone. For this, {INSTEAD}"
                )
            if change.weight.rank > self.rank:
                raise InputError(
                    f"{adapter.source} has rank {change.weight.rank} for {target}, and this bundle takes "
                    f"{self.rank}: export it with `--adapters {change.weight.rank}`, or {INSTEAD}"
                )
            if all(target not in packed.targets for packed in self.networks.values()):
                raise InputError(f"{adapter.source} changes {target}, which is fixed in a bundle. For this, {INSTEAD}")

    def check(self, selection: Selection) -> None:
        """InputError for adapters whose ranks are too many together."""
        step = sum(rank_of(one) for one in selection.own_step)
        once = (
            sum(form.rank or 0 for form, _ in deltas)
            for part in ("text", "conditions")
            for deltas in selection.by_part[part].values()
        )
        most = max(itertools.chain([step], once))
        if most > self.rank:
            raise InputError(
                f"the adapters of this request have a rank of {most} together, and this bundle takes {self.rank}: "
                f"export it with `--adapters {most}`, or with one of them: `fastldm export --lora FILE:SCALE`"
            )
