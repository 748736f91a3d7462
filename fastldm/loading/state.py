"""Loading a component's weights into its network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastldm.errors import CheckpointError
from fastldm.loading.key_names import ldm_bert_name
from fastldm.loading.relatives import adapter_advice, adapter_label

Module = TypeVar("Module", bound=nn.Module)


def load_module(
    module: Module,
    state: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    source: str,
) -> Module:
    """Assign the weights `state` to `module`, built on the meta device. Returns it in eval mode, without gradients.

    Tensors of the right dtype and device are not copied, so a mapped file stays mapped: pages are read on first use and
    become private to the process when written. Other tensors are converted one at a time.

    Strict: all parameters must be present in the right shape and no tensor may be unexpected, except for the forms of
    older files: `position_ids`, the names query, key, value and proj_attn in a VAE's attention, a missing or additional
    `text_model.` prefix, and linear layers stored as 1x1 convolutions. Raises CheckpointError with `source`, the first
    few names and the likely cause; `module` is then unchanged.
    """
    fitted = fit_names(module, state, source)
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    ready = {
        name: (state[key] if state[key].shape == shapes[name] else state[key].flatten(1)).to(device, dtype)
        for name, key in fitted.items()
    }
    module.load_state_dict(ready, assign=True)
    return module.requires_grad_(False).eval()


_TIED = "encoder.embed_tokens.weight"  # of T5: the same tensor as `shared.weight`, of which files have one or both
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def fit_names(module: nn.Module, state: Mapping[str, Tensor], source: str) -> dict[str, str]:
    """The module's parameter names, each with its key in `state`."""
    expected = module.state_dict()
    fitted: dict[str, str] = {}
    unexpected = []
    for key in state:
        name = next((name for name in _spellings(key) if name in expected), None)
        if name is not None and name not in fitted:
            fitted[name] = key
        elif not key.endswith("position_ids") and ldm_bert_name(key) != () and key != _TIED:
            unexpected.append(key)
    missing = [name for name in expected if name not in fitted]
    shapes = [
        f"{name} is {tuple(state[key].shape)}, expected {tuple(expected[name].shape)}"
        for name, key in fitted.items()
        if tuple(state[key].shape) not in (tuple(expected[name].shape), (*expected[name].shape, 1, 1))
    ]
    integers = [key for name, key in fitted.items() if not state[key].is_floating_point()]
    if not (missing or unexpected or shapes or integers):
        return fitted

    faults = [
        f"{len(names)} tensor{'s' * (len(names) > 1)} {fault} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
        for names, fault in (
            (missing, "missing"),
            (unexpected, "unexpected"),
            (shapes, "of another shape"),
            (integers, "not floating point"),
        )
        if names
    ]
    adapter = adapter_label({key: tuple(tensor.shape) for key, tensor in state.items()})
    if adapter:
        cause = f"It is {adapter} or contains one. {adapter_advice(adapter)}"
    elif integers or any(key.endswith((".absmax", ".scale_weight", ".weight_scale", ".qweight")) for key in unexpected):
        cause = "They look quantised: use weights in a floating-point format."
    elif not fitted:
        cause = "They are from an entirely different kind of model."
    else:
        cause = "They belong to another model or version than the config beside them."
    raise CheckpointError(f"The weights in {source} do not fit: {'; '.join(faults)}. {cause}")


def _spellings(key: str) -> Iterator[str]:
    """Names that a key may stand for: transformers 5.6 omits `text_model.`, old diffusers has `query` for `to_q`,
    LDMBert calls CLIP's layers by other names, and T5's table has two."""
    yield key
    yield f"text_model.{key}"
    yield key.removeprefix("text_model.")
    head, _, end = key.rpartition(".")
    stem, _, last = head.rpartition(".")
    if last in _OLD_VAE_ATTENTION:
        yield f"{stem}.{_OLD_VAE_ATTENTION[last]}.{end}"
    if key == _TIED:
        yield "shared.weight"
    yield from ldm_bert_name(key) or ()
