"""How transformers' modules of fused experts arrange the matrices of every expert.

Such a module has parameters of three dimensions, ``gate_up_proj`` or ``up_proj``, and
``down_proj``, and perhaps their biases.
"""

from typing import Any

_GATED = {"gate_up_proj", "down_proj"}
_UNGATED = {"up_proj", "down_proj"}
_BIAS = "_bias"


def are_fused_experts(module: Any) -> bool:
    """Whether a module is one of fused experts."""
    names = {name: p.ndim for name, p in module.named_parameters(recurse=False)}
    matrices = {name for name in names if not name.endswith(_BIAS)}
    biases = names.keys() - matrices
    return (
        matrices in (_GATED, _UNGATED)
        and {names[name] for name in matrices} == {3}
        and biases in (set(), {name + _BIAS for name in matrices})
        and (hasattr(module, "act_fn") or hasattr(module, "_apply_gate"))
    )


def pieces(fused: Any, name: str) -> list[tuple[str, slice]]:
    """Which matrices or biases of an expert a parameter holds.

    Args:
        fused: the module.
        name: of the parameter.
    Returns:
        For each matrix or bias, the name that it would have in a separate expert, such as
        ``gate_proj.weight``, and its rows in the parameter, which are columns if the module is
        :func:`transposed`.
    """
    matrix = name.removesuffix(_BIAS)
    kind = "weight" if matrix == name else "bias"
    if matrix != "gate_up_proj":
        return [(f"{matrix}.{kind}", slice(None))]
    inner = sizes(fused)[1]
    gate, up = slice(0, inner), slice(inner, None)
    if interleaved(fused):
        gate, up = slice(0, None, 2), slice(1, None, 2)
    return [(f"gate_proj.{kind}", gate), (f"up_proj.{kind}", up)]


def has_biases(fused: Any) -> bool:
    """Whether the matrices have biases."""
    return hasattr(fused, "down_proj" + _BIAS)


def is_bias(name: str) -> bool:
    """Whether a parameter of such a module has the biases of a matrix."""
    return name.endswith(_BIAS)


def sizes(fused: Any) -> tuple[int, int]:
    """Hidden size and inner size of an expert."""
    _, rows, inputs = fused.down_proj.shape
    return (inputs, rows) if transposed(fused) else (rows, inputs)


def interleaved(fused: Any) -> bool:
    """Whether the rows of gate and up alternate, instead of all of gate coming first."""
    return not getattr(fused, "is_concatenated", True)


def transposed(fused: Any) -> bool:
    """Whether the matrices are [inputs, rows]; for Llama 4, which does not say, by their shapes."""
    stated = getattr(fused, "is_transposed", None)
    if stated is None and hasattr(fused, "gate_up_proj"):
        return bool(fused.gate_up_proj.shape[2] != fused.down_proj.shape[1])
    return bool(stated)
