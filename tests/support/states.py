"""States of networks: tensors by name, and what they are compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def named_tensors(*keys: str, shape: tuple[int, ...] = (2, 2)) -> dict[str, Tensor]:
    return {key: torch.zeros(shape) for key in keys}


def same_as(network: nn.Module, state: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> bool:
    expected = network.state_dict()
    return set(state) == set(expected) and all(
        torch.equal(state[key], tensor.to(dtype)) and state[key].dtype == dtype for key, tensor in expected.items()
    )


class Attention(nn.Module):
    """A VAE's attention as diffusers names it, under a text encoder's buffer: what old files spell differently."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(4, 4) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(4, 4)])


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()
