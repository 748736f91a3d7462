"""fastldm's ops as single nodes of an ONNX graph, each with a function of standard ops that defines it.

    fastldm::GroupNorm[Skip][Shift][SiLU]    kernels/group_norm.py
    fastldm::[Causal]HeadAttention           kernels/attention.py
    fastldm::GEGLU                           the gate of kernels/linear.py's linear_geglu

A backend that knows such a node can run it as one kernel. Others, such as ONNX Runtime and TensorRT, inline the
function. OpenVINO (2026.4) does neither: it cannot read such a file. Layer norms are single nodes of standard ONNX. No
name is used by TensorRT in another domain, since it ignores domains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx.parser
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.kernels.attention import attention_reference

DOMAIN = "fastldm"


def replacements() -> dict[str, Callable[..., Tensor]]:
    """Functions that a trace records in place of the ops of kernels/, by op name."""
    return {"group_norm": _group_norm, "attention": _attention, "linear_geglu": _linear_geglu}


def add_functions(model: ir.Model, opset: int) -> None:
    """Add the functions of all fused nodes to a model."""
    names = {node.op_type for node in model.graph.all_nodes() if node.domain == DOMAIN}
    for name in sorted(names):
        text = f'<domain: "{DOMAIN}", opset_import: ["": {opset}]>\n{_function(name, opset)}'
        function = ir.serde.deserialize_function(onnx.parser.parse_function(text))
        model.functions[function.identifier()] = function
    if names:
        model.opset_imports[DOMAIN] = 1


def core_op(node: ir.Node) -> str:
    """The type of a node, or of the main standard op of its function."""
    if node.domain != DOMAIN:
        return node.op_type
    if node.op_type == "GEGLU":
        return "Gelu"
    return "Attention" if node.op_type.endswith("Attention") else "GroupNormalization"


# --------------------------------------------------------------------------------------------------- while tracing


def _node(name: str, inputs: list[Tensor], shape: tuple[int, ...], **attributes: Any) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}", inputs, attributes, dtype=inputs[0].dtype, shape=shape, version=1
    )


def _group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool = False,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    name = "GroupNorm" + "Skip" * (skip is not None) + "Shift" * (shift is not None) + "SiLU" * silu
    inputs = [tensor for tensor in (x, skip, shift, weight, bias) if tensor is not None]
    return _node(name, inputs, (x.shape[0], weight.shape[0], *x.shape[2:]), groups=groups, epsilon=eps)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    scale: float | None = None,
    causal: bool = False,
    kv_len: Tensor | None = None,
    slots: None = None,
) -> Tensor:
    if kv_len is not None:  # of a prior alone: no node masks keys
        return attention_reference(q, k, v, heads, scale, causal, kv_len)
    scale = (q.shape[-1] // heads) ** -0.5 if scale is None else scale
    return _node("Causal" * causal + "HeadAttention", [q, k, v], tuple(q.shape), heads=heads, scale=scale)


def _linear_geglu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    both = F.linear(x, weight, bias)
    return _node("GEGLU", [both], (*x.shape[:-1], weight.shape[0] // 2))


# ------------------------------------------------------------------------------------------- functions of the nodes


def _function(name: str, opset: int) -> str:
    if name == "GEGLU":
        return _GEGLU
    if name.endswith("Attention"):
        causal = name.startswith("Causal")
        if opset >= 23:
            return _ATTENTION_23.format(name=name, causal=int(causal))
        return _ATTENTION.format(name=name, mask=_MASK if causal else "seen = Identity (scores)")
    return _group_norm_function(name)


def _group_norm_function(name: str) -> str:
    inputs, body, x = ["x"], "", "x"
    if "Skip" in name:
        inputs.append("skip")
        body += "both = Concat <axis = 1> (x, skip)\n"
        x = "both"
    if "Shift" in name:
        inputs.append("shift")
        body += f"""
            sides = Constant <value = int64[2] {{2, 3}}> ()
            row = Unsqueeze (shift, sides)
            shifted = Add ({x}, row)
        """
        x = "shifted"
    body += f"normalised = GroupNormalization <num_groups: int = @groups, epsilon: float = @epsilon> ({x}, scale, bias)"
    if "SiLU" in name:
        body += """
            gate = Sigmoid (normalised)
            out = Mul (normalised, gate)
        """
    else:
        body += "\nout = Identity (normalised)\n"
    return f"{name} <groups, epsilon> ({', '.join(inputs)}, scale, bias) => (out) {{ {body} }}"


_GEGLU = """
GEGLU (x) => (out) {
    a, b = Split <axis = -1, num_outputs = 2> (x)
    gate = Gelu (b)
    out = Mul (a, gate)
}
"""
_ATTENTION_23 = """
{name} <heads, scale> (q, k, v) => (out) {{
    out = Attention <q_num_heads: int = @heads, kv_num_heads: int = @heads, scale: float = @scale,
                     is_causal = {causal}> (q, k, v)
}}
"""
_ATTENTION = """
{name} <heads, scale> (q, k, v) => (out) {{
    count = Constant <value_int: int = @heads> ()
    first = Constant <value = int64[1] {{0}}> ()
    counts = Unsqueeze (count, first)
    same = Constant <value = int64[2] {{0, 0}}> ()
    rest = Constant <value = int64[1] {{-1}}> ()
    apart = Concat <axis = 0> (same, counts, rest)
    q_heads = Reshape (q, apart)
    k_heads = Reshape (k, apart)
    v_heads = Reshape (v, apart)
    queries = Transpose <perm = [0, 2, 1, 3]> (q_heads)
    keys = Transpose <perm = [0, 2, 3, 1]> (k_heads)
    values = Transpose <perm = [0, 2, 1, 3]> (v_heads)
    factor = Constant <value_float: float = @scale> ()
    scale_like = CastLike (factor, q)
    scaled = Mul (queries, scale_like)
    scores = MatMul (scaled, keys)
    {mask}
    weights = Softmax <axis = -1> (seen)
    sums = MatMul (weights, values)
    by_token = Transpose <perm = [0, 2, 1, 3]> (sums)
    together = Constant <value = int64[3] {{0, 0, -1}}> ()
    out = Reshape (by_token, together)
}}
"""
_MASK = """
    length = Shape <start = 1, end = 2> (q)
    square = Concat <axis = 0> (length, length)
    lowest = Constant <value = float[1] {-3.0e38}> ()
    all = Expand (lowest, square)
    one = Constant <value = int64 {1}> ()
    later = Trilu <upper = 1> (all, one)
    mask = CastLike (later, q)
    seen = Add (scores, mask)
"""
