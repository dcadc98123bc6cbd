"""Activation statistics, one decoder layer in memory at a time, so that a model larger than memory can be calibrated."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from offline_quantize.checkpoint import Checkpoint
from offline_quantize.errors import QuantizeError
from offline_quantize.structure import Linear, build_empty_model, decoder_layers, on_linear_inputs, record_layer_calls, set_parameters

DEFAULT_TEXT = Path(__file__).with_name("calibration.txt")
NUM_WINDOWS = 32
WINDOW_TOKENS = 512
BATCH = 4  # windows per forward call
SAMPLE_TOKENS = 256  # inputs kept per group for measuring output errors


@dataclass
class InputStatistics:
    """What is known about the activation that an input group reads.

    Attributes:
        rms: [K] float32, root mean square of every channel over all calibration tokens.
        sample: [S, K] float32, evenly spaced tokens.
    """

    rms: torch.Tensor
    sample: torch.Tensor


def calibration_tokens(directory: Path, text_file: Path) -> torch.Tensor:
    """Tokens [NUM_WINDOWS, WINDOW_TOKENS] int64, windows spread evenly over the text, each led by BOS if the tokenizer has one.

    Raises:
        QuantizeError: the text is missing, not UTF-8, or too short; or the model has no usable tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        text = text_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise QuantizeError(f"--calibration {text_file}: {error.strerror if isinstance(error, OSError) else error}") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers fail in many ways; all mean the same here
        raise QuantizeError(f"{directory}: no usable tokenizer for calibration ({error}); use --calibration none") from None
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    width = WINDOW_TOKENS - len(bos)
    if len(tokens) < NUM_WINDOWS * width:
        raise QuantizeError(f"--calibration {text_file}: {len(tokens)} tokens, at least {NUM_WINDOWS * width} are needed")
    starts = torch.linspace(0, len(tokens) - width, NUM_WINDOWS).long().tolist()
    return torch.stack([torch.cat((torch.tensor(bos, dtype=torch.long), tokens[s : s + width])) for s in starts])


class Calibrator:
    """Carries the calibration tokens through the decoder layers, in order.

    Layers are run in float32, and the hidden states between two layers are kept in CPU memory.
    """

    def __init__(self, checkpoint: Checkpoint, tokens: torch.Tensor, device: torch.device) -> None:
        self.device = device
        self.model = build_empty_model(checkpoint.directory)
        self.layers_name, self.layers = decoder_layers(self.model)
        self.next_layer = 0
        self._load_outside_layers(checkpoint)
        self.hidden: list[torch.Tensor] = []  # per batch
        self.calls: list[list[tuple[tuple, dict]]] = []  # per batch and layer: masks, positions
        for batch in tokens.split(BATCH):
            calls = record_layer_calls(self.model, self.layers, batch.to(device))
            self.calls.append([(args, kwargs) for _, args, kwargs in calls])
            self.hidden.append(calls[0][0].cpu())
        self.num_tokens = tokens.numel()
        # Embeddings have done their work.
        set_parameters(self.model, lambda name, p: torch.empty_like(p, device="meta"), skip=self.layers_name)

    def _load_outside_layers(self, checkpoint: Checkpoint) -> None:
        tensors = checkpoint.tensors

        def real(name: str, old: torch.Tensor) -> torch.Tensor:
            # The head is not needed, and a checkpoint with tied embeddings has none.
            if name in tensors and not name.startswith("lm_head."):
                return next(checkpoint.load([name]))[1].to(self.device, torch.float32)
            return old if old.is_meta else old.to(self.device)

        set_parameters(self.model, real, skip=self.layers_name, buffers=True)

    def run_layer(self, weights: dict[str, torch.Tensor], groups: Sequence[Sequence[Linear]]) -> list[InputStatistics | None]:
        """Run the next decoder layer and collect the statistics of its input groups.

        Args:
            weights: the layer's tensors by full name.
            groups: the groups whose statistics are wanted; empty when the layer is only passed through.
        Returns:
            One entry per group; None where no token reached the group.
        """
        index, self.next_layer = self.next_layer, self.next_layer + 1
        layer = self.layers[index]
        prefix = f"{self.layers_name}.{index}."

        def real(name: str, old: torch.Tensor) -> torch.Tensor:
            stored = weights.get(prefix + name)
            return old.to(self.device) if stored is None else stored.to(self.device, torch.float32)

        set_parameters(layer, real, buffers=True)
        first = {group[0].name.removeprefix(prefix): i for i, group in enumerate(groups)}
        squares = [torch.zeros(g[0].num_inputs, dtype=torch.float64, device=self.device) for g in groups]
        counts = [0] * len(groups)
        samples: list[list[torch.Tensor]] = [[] for _ in groups]
        stride = max(1, self.num_tokens // SAMPLE_TOKENS)

        def note(name: str, x: torch.Tensor) -> None:
            if name in first:
                i, rows = first[name], x.reshape(-1, x.shape[-1])
                squares[i] += rows.double().square().sum(0)
                counts[i] += len(rows)
                samples[i].append(rows[stride // 2 :: stride].clone())

        with torch.no_grad(), on_linear_inputs(layer, note):
            for i, batch in enumerate(self.hidden):
                args, kwargs = self.calls[i][index]
                out = layer(batch.to(self.device), *args, **kwargs)
                self.hidden[i] = (out[0] if isinstance(out, tuple) else out).cpu()
        set_parameters(layer, lambda name, p: torch.empty_like(p, device="meta"))
        if not all(batch.isfinite().all() for batch in self.hidden):
            raise QuantizeError(f"{self.layers_name}.{index}: its output is not finite on the calibration text")
        return [InputStatistics((s / n).sqrt().float(), torch.cat(x)) if n else None
                for s, n, x in zip(squares, counts, samples, strict=True)]
