"""The forms of guidance by gradient that callers make."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastldm import ClassifierGuidance, CLIPGuidance, InputError


def linear(x: Tensor, t: Tensor) -> Tensor:
    return torch.stack((x.sum((1, 2, 3)), t.expand(len(x)), -x.square().sum((1, 2, 3))), 1)


def test_classifiers_gradient_is_that_of_the_log_softmax() -> None:
    x, t = torch.randn(2, 4, 3, 3, dtype=torch.float64) / 9, torch.full((2,), 0.5, dtype=torch.float64)
    got = ClassifierGuidance(lambda x, t: linear(x.float(), t.float()), [0, 2], 3.0)(x, t)
    p = linear(x, t).softmax(1)
    for k, label in enumerate((0, 2)):
        of_logits = -p[k].clone()
        of_logits[label] += 1
        expected = 3 * (of_logits[0] - 2 * x[k] * of_logits[2])
        assert (got[k] - expected).abs().max() < 1e-6


MADE: list[tuple[Any, dict[str, Any], str]] = [
    (ClassifierGuidance, {"model": 3, "class_labels": 0}, "model is 3"),
    (ClassifierGuidance, {"model": linear, "class_labels": -1}, "class_labels is -1"),
    (ClassifierGuidance, {"model": linear, "class_labels": [0, "a"]}, r"class_labels\[1\]"),
    (ClassifierGuidance, {"model": linear, "class_labels": 0, "scale": float("nan")}, "scale is nan"),
    (CLIPGuidance, {"scale": "much"}, "scale is 'much'"),
    (CLIPGuidance, {"num_cutouts": 1.5}, "num_cutouts is 1.5"),
    (CLIPGuidance, {"through_unet": 1}, "through_unet is 1"),
    (CLIPGuidance, {"prompt": []}, "prompt is an empty list"),
    (CLIPGuidance, {"decoder": "vae"}, "decoder is 'vae'"),
]


@pytest.mark.parametrize(("form", "arguments", "message"), MADE)
def test_wrong_arguments_are_refused(form: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        form(**arguments)


CALLED: list[tuple[Any, Any, str]] = [
    (lambda x, t: 3, 0, "the classifier returned 3: expected logits"),
    (lambda x, t: x, 0, r"the classifier returned \(2, 4, 3, 3\): expected logits \(2, classes\)"),
    (lambda x, t: linear(x.detach(), t), 0, "logits have no gradient"),
    (linear, 3, "class_labels has 3, and the classifier knows 3 classes"),
    (linear, [0, 1, 2], "class_labels has 3 classes for 2 images"),
]


@pytest.mark.parametrize(("model", "labels", "message"), CALLED)
def test_classifiers_that_say_nothing_are_refused(model: Any, labels: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ClassifierGuidance(model, labels)(torch.randn(2, 4, 3, 3), torch.zeros(2))
