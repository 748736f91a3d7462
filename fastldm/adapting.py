"""The methods of a pipeline about adapters, by diffusers' names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from fastldm import checks, openmp
from fastldm.adapters.key_formats import COMPONENTS
from fastldm.adapters.locate import find_weights
from fastldm.adapters.read import Adapter, read_adapter
from fastldm.adapters.selection import Weight
from fastldm.checks import show
from fastldm.errors import InputError
from fastldm.request import MAX_WEIGHT, adapter_weight
from fastldm.runtime.adapted import Adapted
from fastldm.runtime.stages import Stages


class Adapting:
    """What a pipeline has of adapters. All of it may be called while requests run: each keeps the adapters that it was
    submitted with."""

    stages: Stages

    def load_lora_weights(
        self,
        path_or_id: str | os.PathLike[str],
        *,
        weight_name: str | None = None,
        adapter_name: str | None = None,
        strict: bool = True,
        allow_pickle: bool = False,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> str:
        """Read a LoRA or one of its relatives (docs/adapters.md lists them): a .safetensors file, a folder or a hub id,
        of which `weight_name` says the file if it has several. Returns the adapter's name: `adapter_name`, or
        "default_0" and so on.

        The first that is loaded is active, with weight 1; `set_adapters` makes others so, or a request names its own.
        strict: refuse a file of which only a part fits the model. allow_pickle: read a pickle, of which only tensors
        are loaded.

        CheckpointError for a file that is damaged, or for another model, saying how much of it fits and for which it
        is; InputError for a name that is taken, for a bundle that takes no adapters, and for what one that does not
        take: a higher rank than it was exported for, and what is no LoRA.
        """
        adapters = self._adapters()
        if adapter_name is not None:
            checks.short_text("adapter_name", adapter_name, "a name of at most 200 characters")
            if not adapter_name.strip() or not adapter_name.isprintable():
                raise InputError(f"adapter_name is {show(adapter_name)}: expected a name")
        adapters.check_free(adapter_name)
        file = find_weights(
            path_or_id,
            kind="lora",
            weight_name=weight_name,
            allow_pickle=allow_pickle,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        adapter = read_adapter(file, self.stages.spec, strict=strict, allow_pickle=allow_pickle)
        openmp.rest()  # this thread has read it
        return adapters.add(adapter_name, adapter)

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: Weight | Sequence[Weight | None] | None = None
    ) -> None:
        """Make these adapters active, and no others, for requests that name none themselves.

        adapter_weights: one for all, or one for each; None is 1. A number, or a dictionary such as
        {"text_encoder": 0.5, "unet": {"down": 0.9, "mid": 1.0, "up": {"block_0": 0.6, "block_1": [0.4, 0.8, 1.0]}}}.
        """
        names = checks.texts("adapter_names", adapter_names, 100, 200) if adapter_names else []
        weights = adapter_weights
        if not isinstance(weights, (list, tuple)):
            weights = [weights] * len(names)  # type: ignore[list-item]
        if len(weights) != len(names):
            raise InputError(
                f"adapter_weights has {len(weights)} items for {len(names)} adapters: give one, or one each"
            )
        self._adapters().activate(
            {
                name: 1.0 if weight is None else adapter_weight(f"the weight of {show(name)}", weight)
                for name, weight in zip(names, weights, strict=True)
            }
        )

    def get_active_adapters(self) -> list[str]:
        """Their names."""
        return list(self.stages.adapters.active)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """The names of those that are loaded, by the component that they change."""
        loaded = self.stages.adapters.loaded
        lists = {
            component: [name for name, adapter in loaded.items() if component in adapter.components]
            for component in COMPONENTS
        }
        return {component: names for component, names in lists.items() if names}

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """Those that are loaded, by name, with their rank, short hash and source."""
        return self.stages.adapters.loaded

    def disable_lora(self) -> None:
        """Let no adapter be active, until `enable_lora`."""
        self.stages.adapters.enable(False)

    def enable_lora(self) -> None:
        """Let those be active again that were."""
        self.stages.adapters.enable(True)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Forget adapters; requests that were submitted with them still have them."""
        self.stages.adapters.remove(checks.texts("adapter_names", adapter_names, 1000, 200))

    def unload_lora_weights(self) -> None:
        """Forget all adapters; what was fused stays."""
        self.stages.adapters.remove()
        self.stages.adapters.enable(True)

    def fuse_lora(
        self,
        components: Sequence[str] | None = None,
        lora_scale: float = 1.0,
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        """Make adapters, by default the active ones, a part of the model: every request has them, with their active
        weights times lora_scale. They are no longer active themselves, and may be unloaded. `unfuse_lora` takes them
        out again, bitwise.

        components: "unet", "text_encoder", "text_encoder_2"; None is all. InputError for a bundle.
        """
        self._need_weights()
        components = list(COMPONENTS) if components is None else checks.texts("components", list(components), 3, 100)
        for component in components:
            checks.choice("components", component, COMPONENTS)
        scale = checks.real("lora_scale", lora_scale, -MAX_WEIGHT, MAX_WEIGHT)
        names = None if adapter_names is None else checks.texts("adapter_names", adapter_names, 100, 200)
        self._adapters().fuse(names, scale, components)

    def unfuse_lora(self) -> None:
        """Take out of the model what was fused."""
        self._need_weights()
        self.stages.adapters.unfuse()

    def _adapters(self) -> Adapted:
        """InputError for a bundle that takes none."""
        if self.stages.adapters.places is None:
            self.stages.need_torch(
                "which takes no adapters: export the model with `fastldm export --lora FILE` to merge one, or with "
                "`fastldm export --adapters RANK` to load them later"
            )
        return self.stages.adapters

    def _need_weights(self) -> None:
        """InputError for any bundle."""
        self.stages.need_torch(
            "whose weights cannot be changed: activate the adapter, or merge it with `fastldm export --lora FILE:SCALE`"
        )
