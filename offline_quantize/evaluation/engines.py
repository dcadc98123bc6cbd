"""What runs a model: an engine yields the last hidden states of windows, which are small."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from offline_quantize.checkpoints.quantized import decoded_tensors
from offline_quantize.errors import QuantizeError
from offline_quantize.evaluation.conventions import Window
from offline_quantize.model.checkpoint import Checkpoint
from offline_quantize.model.empty import build_empty_model, loaded_dtype, set_parameters
from offline_quantize.model.products import quick_products
from offline_quantize.model.tied import share_tensors
from offline_quantize.model.unwanted import unwanted

# Of every window: [num_scored, hidden size], after the last norm.
HiddenStates = Iterator[torch.Tensor]
Engine = Callable[[Path, Sequence[Window], torch.dtype, torch.device], HiddenStates]


def load_model(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The transformers model of a checkpoint, plain or QAM-W (decoded), on the CPU.

    Args:
        dtype: of the parameters, see :func:`loaded_dtype`; buffers that no checkpoint has, such as
            rotary frequencies, stay as the model makes them.
    Raises:
        QuantizeError: a parameter of the model has no tensor, or a tensor no parameter.
    """
    checkpoint = Checkpoint(directory)
    model, tensor_map = build_empty_model(checkpoint)
    tensors = tensor_map.apart(decoded_tensors(checkpoint, dtype))
    values = dict(tensor_map.parameters(tensors))
    dtype_of = loaded_dtype(model, dtype)

    def real(name: str, old: torch.Tensor) -> torch.Tensor:
        return values.pop(name).to(dtype_of(name, old)) if name in values else old

    set_parameters(model, real, buffers=True)
    share_tensors(model, tensor_map.shared())
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    unknown = unwanted(model, tensor_map)
    faults = []
    if missing:
        faults.append(f"no tensor for {missing[:3]}")
    if unknown:
        faults.append(f"no parameter for {list(unknown[:3])}")
    if faults:
        raise QuantizeError(f"{directory}: {', '.join(faults)}")
    return model


@torch.no_grad()
def transformers_states(
    directory: Path,
    windows: Sequence[Window],
    dtype: torch.dtype,
    device: torch.device,
) -> HiddenStates:
    """The last hidden states of a plain or QAM-W checkpoint (decoded) in transformers.

    The model is freed when the generator ends.

    Yields:
        [num_scored, hidden size] in ``dtype`` on ``device``, of every window.
    Raises:
        QuantizeError: the checkpoint cannot be loaded.
    """
    model = load_model(directory, dtype).to(device).base_model
    for window in windows:
        ids = torch.tensor([window.token_ids[:-1]], device=device)
        with quick_products(device):
            states = model(input_ids=ids, use_cache=False).last_hidden_state
        yield states[0, -window.num_scored :]


def vllm_states(
    directory: Path,
    windows: Sequence[Window],
    dtype: torch.dtype,
    device: torch.device,
) -> HiddenStates:
    """The same from vLLM's engine, which serves the checkpoint: see ``vllm_engine``."""
    # vLLM is slow to import, and not always there.
    from offline_quantize.evaluation.vllm_engine import hidden_states

    return hidden_states(directory, windows, dtype, device)


ENGINES: dict[str, Engine] = {"transformers": transformers_states, "vllm": vllm_states}
