"""llama.cpp's types, by llama.cpp itself: it quantizes a GGUF of the decoder linears.

Needs the package ``llama-cpp-python`` (built from its sdist; 0.3.36 was used) in any Python, which
the environment variable LLAMA_CPP_PYTHON names. llama.cpp looks at weights row by row, so rows need
not be permuted as its converter does for Llama, and tensors outside the decoder layers may be
absent.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from benchmarks.study.activations import layer_statistics, squares
from offline_quantize.model.structure import Structure

FTYPES = {
    "q4_0": 2,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "q3_k_m": 12,
    "q4_k_m": 15,
    "q5_k_m": 17,
    "q6_k": 18,
}
"""``llama_ftype`` of llama.h: mixtures of tensor types."""

# Arguments: input, output, ftype, and an archive of importances or an empty string.
QUANTIZE = """
import ctypes, sys
import llama_cpp, numpy as np
source, target, ftype, importances = sys.argv[1:]
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread = int(ftype), 2
if importances:
    data = dict(np.load(importances))
    # The last entry, all zero, ends the list.
    entries = (llama_cpp.llama_model_imatrix_data * (len(data) + 1))()
    for entry, (name, x) in zip(entries, data.items()):
        entry.name, entry.size = name.encode(), x.size
        entry.data = x.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params.imatrix = entries
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)))
"""


def gguf_names(model: Any, structure: Structure) -> dict[str, str]:
    """GGUF's name of the weight of every decoder linear."""
    arch = architecture(model)
    names = gguf.get_tensor_name_map(arch, len(structure.layers))
    return {linear.name: f"{names.get_name(linear.name)}.weight" for linear in structure.linears()}


def architecture(model: Any) -> gguf.MODEL_ARCH:
    """llama.cpp's architecture of a transformers model."""
    by_name = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    return by_name[model.config.model_type.removesuffix("_text")]


def write_gguf(path: Path, model: Any, structure: Structure) -> None:
    """A GGUF in bfloat16 of the decoder linears, with what llama.cpp needs to quantize it."""
    config = model.config
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture(model)])
    writer.add_block_count(len(structure.layers))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for name, tensor in gguf_names(model, structure).items():
        weight = model.get_submodule(name).weight.detach().bfloat16().contiguous()
        values = weight.view(torch.uint8).numpy()
        writer.add_tensor(tensor, values, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: Path, model: Any, structure: Structure) -> float:
    """Put the decoded weights of a GGUF into the model's decoder linears.

    Returns:
        The bits per weight that the file has for them.
    """
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    num_bytes = num_weights = 0
    for name, stored in gguf_names(model, structure).items():
        tensor, weight = tensors[stored], model.get_submodule(name).weight
        weight.data.copy_(torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type)))
        num_bytes += int(tensor.n_bytes)
        num_weights += weight.numel()
    return 8 * num_bytes / num_weights


def quantize_gguf(
    model: Any,
    structure: Structure,
    tokens: torch.Tensor,
    ftype: str,
    importance: bool,
) -> float:
    """Quantize the decoder linears as llama.cpp does.

    Args:
        ftype: a key of FTYPES.
        importance: whether llama.cpp gets the importance of every input (its imatrix), from
            ``tokens`` [n, T].
    Returns:
        The effective bits per weight.
    Raises:
        subprocess.CalledProcessError: llama.cpp is not installed or failed.
    """
    with tempfile.TemporaryDirectory() as temporary:
        source, target = Path(temporary) / "source.gguf", Path(temporary) / "target.gguf"
        archive = Path(temporary) / "importances.npz"
        write_gguf(source, model, structure)
        if importance:
            np.savez(archive, **_importances(model, structure, tokens))
        python = os.environ.get("LLAMA_CPP_PYTHON", sys.executable)
        arguments = [source, target, str(FTYPES[ftype]), archive if importance else ""]
        subprocess.run([python, "-c", QUANTIZE, *arguments], check=True, capture_output=True)
        return read_gguf(target, model, structure)


def _importances(model: Any, structure: Structure, tokens: torch.Tensor) -> dict[str, Any]:
    """GGUF's name of every weight -> the mean square [K] of its inputs."""
    names = gguf_names(model, structure)
    importances: dict[str, Any] = {}
    for groups in layer_statistics(model, structure, tokens, squares):
        for linears, sums in groups:
            importance = (sums / tokens.numel()).numpy()
            importances |= {names[linear.name]: importance for linear in linears}
    return importances
