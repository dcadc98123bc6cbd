"""Whether the headers of a QAM-W checkpoint fit its config.json; no tensor is read."""

from collections.abc import Iterator, Mapping

from offline_quantize.errors import QuantizeError
from offline_quantize.model.checkpoint import Checkpoint, TensorInfo
from qamw_kernels.errors import FormatError
from qamw_kernels.format.config import LAYER_TENSORS, QamwFormat, layer_tensors, role_of
from qamw_kernels.format.packing import UNIT_INPUTS, unpacked_shape
from qamw_kernels.format.rates import QuantizedShape

Modules = Mapping[str, QuantizedShape]


def find_modules(checkpoint: Checkpoint, fmt: QamwFormat) -> dict[str, QuantizedShape]:
    """Shape and rate of every module that has a ``qweight``.

    Raises:
        QuantizeError: there is none, or one does not have three dimensions.
    """
    modules = {}
    for name, info in checkpoint.tensors.items():
        if not name.endswith(".qweight"):
            continue
        if len(info.shape) != 3 or 0 in info.shape:
            raise QuantizeError(
                f"{info.file}: {name} has shape {list(info.shape)}, "
                f"expected [index_bits, N, K / {UNIT_INPUTS}]"
            )
        module = name.removesuffix(".qweight")
        modules[module] = QuantizedShape(
            *unpacked_shape(info.shape), fmt.index_bits_of(module), fmt.code
        )
    if not modules:
        raise QuantizeError(f"{checkpoint.directory}: no quantized layer found")
    return modules


def header_faults(checkpoint: Checkpoint, fmt: QamwFormat, modules: Modules) -> list[str]:
    """What does not fit, a line for each: of config.json, then layer by layer, then of the rest.

    Args:
        modules: of :func:`find_modules`.
    """
    roles = {role_of(module) for module in modules}
    faults = [
        f"config.json: layer_index_bits names {role}, which is not quantized"
        for role in sorted(set(fmt.layer_index_bits) - roles)
    ]
    for module, shape in modules.items():
        faults += _layer_faults(checkpoint, fmt, module, shape)
    ignored = frozenset(fmt.ignore)
    for info in checkpoint.tensors.values():
        faults += _tensor_faults(info, ignored, modules)
    return faults


def _layer_faults(
    checkpoint: Checkpoint, fmt: QamwFormat, module: str, layer: QuantizedShape
) -> Iterator[str]:
    """Faults of the tensors that stand for one weight."""
    expected = layer_tensors(layer.num_rows, layer.num_inputs, layer.index_bits)
    for suffix, (shape, dtype) in expected.items():
        info = checkpoint.tensors.get(f"{module}.{suffix}")
        if info is None:
            yield f"{checkpoint.directory}: {module}.{suffix} is missing"
        elif (info.shape, info.dtype) != (shape, dtype):
            yield (
                f"{info.file}: {info.name} is {info.dtype} {list(info.shape)}, "
                f"expected {dtype} {list(shape)}"
            )
    try:
        fmt.rotation_block_size_of(module, layer.num_inputs)
    except FormatError as error:
        yield str(error)


def _tensor_faults(info: TensorInfo, ignored: frozenset[str], modules: Modules) -> Iterator[str]:
    """Faults of a tensor that contradicts its module's other tensors or the ignore list."""
    module, _, suffix = info.name.rpartition(".")
    if suffix in LAYER_TENSORS and module not in modules:
        yield f"{info.file}: {info.name} belongs to no quantized layer: {module}.qweight is missing"
    if suffix == "qweight" and module in ignored:
        yield f"{info.file}: {info.name} is quantized, but config.json's ignore list has {module}"
    if suffix == "weight":
        if module in modules:
            yield f"{info.file}: {info.name} is stored beside {module}.qweight"
        elif len(info.shape) == 2 and module not in ignored:  # readers expect a quantized one
            yield f"{info.file}: {info.name} is neither quantized nor in config.json's ignore list"
