"""What will be done to a checkpoint, decided from headers alone: rates, rotation, sizes, shards, tensor parallelism."""

import dataclasses
import fnmatch
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from offline_quantize.calibration.hessians import BATCH, WINDOW_TOKENS
from offline_quantize.model.checkpoint import Checkpoint, TensorInfo
from offline_quantize.errors import QuantizeError
from offline_quantize.model.structure import Linear, Structure, find_structure
from qamw_kernels.format.codebook import INDEX_BITS, codebook_bytes
from qamw_kernels.format.config import QamwFormat, layer_tensors, role_of
from qamw_kernels.format.packing import UNIT_INPUTS
from qamw_kernels.format.sharding import TP_MAX, choose_rotation_block_sizes, possible_tensor_parallel_sizes

MAX_SHARD_BYTES = 512 * 2**20
SERVED_BY_EMBEDDINGS = ("cohere", "cohere2", "cohere2_moe", "gemma2", "gemma3n", "gemma3n_text", "opt")  # model types in vLLM
HEAD_INDEX_BITS = 12  # of the head, whose errors reach every logit


@dataclass(frozen=True)
class Shard:
    """One output file and what it will hold, in order of writing."""

    file: str
    tensors: tuple[TensorInfo, ...]
    layers: range  # the decoder layers it holds; empty for tensors outside the layers


@dataclass(frozen=True)
class Plan:
    """Every decision about one run.

    Attributes:
        layers: for every decoder layer, its input groups that are quantised.
        format: what config.json will say.
        shards: the output files.
        head: the model's head where it is quantised too, at HEAD_INDEX_BITS: rates are those of the decoder layers.
        tensor_parallel_sizes: the sizes up to ``tp_max`` that the result can be served with.
    """

    checkpoint: Checkpoint
    structure: Structure
    layers: tuple[tuple[tuple[Linear, ...], ...], ...]
    format: QamwFormat
    shards: tuple[Shard, ...]
    max_shard_bytes: int
    tensor_parallel_sizes: tuple[int, ...]
    head: Linear | None

    def with_shards(self) -> "Plan":
        """The same plan with the output files that its format leads to."""
        by_name = {f"{linear.name}.weight": linear for linear in self.linears}
        tensors_by_layer, in_layers = [], set()
        for i in range(len(self.layers)):
            names = self.layer_tensor_names(i)
            in_layers.update(names)
            tensors_by_layer.append([t for name in names for t in (
                self.output_tensors(by_name[name]) if name in by_name else [self.checkpoint.tensors[name]])])
        other = [info for name, info in self.checkpoint.tensors.items() if name not in in_layers]
        if self.head:
            other = [info for info in other if info.name != f"{self.head.name}.weight"] + self.output_tensors(self.head)
        return dataclasses.replace(self, shards=make_shards(tensors_by_layer, other, self.max_shard_bytes))

    def with_rates(self, index_bits: Sequence[Sequence[int]]) -> "Plan":
        """The same plan with these index bits for every input group of every layer."""
        rates = {role_of(linear.name): bits for groups, chosen in zip(self.layers, index_bits, strict=True)
                 for group, bits in zip(groups, chosen, strict=True) for linear in group}
        usual = max(INDEX_BITS, key=list(rates.values()).count)
        own = {name: bits for name, bits in rates.items() if bits != usual}
        fmt = dataclasses.replace(self.format, index_bits=usual, codebooks={}, layer_index_bits=own | _head_index_bits(self.head))
        return dataclasses.replace(self, format=fmt).with_shards()

    def index_bits_within(self, bpw: float) -> float:
        """Index bits of all pairs together that ``bpw`` pays for.

        Rates in halves are nominal: they say what the indices take. Any other rate is effective: norms, scales and codebooks are paid
        from it too.
        """
        weights = self.num_quantized_weights
        if index_bits_for(bpw)[1]:
            return bpw * weights
        return (bpw - self.effective_bits_per_weight + self.nominal_bits_per_weight) * weights

    def more_bytes_within(self, bpw: float) -> float:
        """What mixed rates may take beyond the plan's one rate."""
        return (self.index_bits_within(bpw) - self.nominal_bits_per_weight * self.num_quantized_weights) / 8

    def load_head(self) -> torch.Tensor:
        """The weight [vocabulary, hidden size] of the head, which is to be quantised."""
        return next(self.checkpoint.load_finite([self.structure.head_source]))[1]

    @property
    def linears(self) -> list[Linear]:
        return [linear for groups in self.layers for group in groups for linear in group]

    @property
    def num_quantized_weights(self) -> int:
        return sum(linear.num_rows * linear.num_inputs for linear in self.linears)

    def layer_tensor_names(self, layer: int) -> list[str]:
        """Names of the source tensors of one decoder layer."""
        prefix = f"{self.structure.layers_name}.{layer}."
        return [name for name in self.checkpoint.tensors if name.startswith(prefix)]

    def load_layer(self, layer: int) -> dict[str, torch.Tensor]:
        """The source tensors of one decoder layer; ValueError for one that is not finite."""
        return dict(self.checkpoint.load_finite(self.layer_tensor_names(layer)))

    def layer_output_names(self, layer: int) -> list[str]:
        """Names of the tensors that are written for one decoder layer."""
        prefix = f"{self.structure.layers_name}.{layer}."
        return [t.name for shard in self.shards if layer in shard.layers for t in shard.tensors if t.name.startswith(prefix)]

    def output_tensors(self, linear: Linear) -> list[TensorInfo]:
        """The tensors that replace a linear's weight."""
        tensors = layer_tensors(linear.num_rows, linear.num_inputs, self.format.index_bits_of(linear.name))
        return [TensorInfo(f"{linear.name}.{suffix}", "", shape, dtype) for suffix, (shape, dtype) in tensors.items()]

    @property
    def widest(self) -> int:
        """Inputs of the widest linear."""
        return max(linear.num_inputs for linear in self.linears)

    @property
    def nominal_bits_per_weight(self) -> float:
        """Index bits per quantised weight."""
        bits = sum(self.format.index_bits_of(linear.name) * linear.num_rows * linear.num_inputs for linear in self.linears)
        return bits / 2 / self.num_quantized_weights

    @property
    def effective_bits_per_weight(self) -> float:
        """All stored bytes of the quantised layers, codebooks included, in bits per quantised weight; without the head."""
        stored = sum(info.num_bytes for linear in self.linears for info in self.output_tensors(linear))
        codebooks = codebook_bytes(self.format.index_bits_of(linear.name) for linear in self.linears)
        return 8 * (stored + codebooks) / self.num_quantized_weights

    @property
    def source_bytes(self) -> int:
        return sum(info.num_bytes for info in self.checkpoint.tensors.values())

    @property
    def output_bytes(self) -> int:
        return sum(info.num_bytes for shard in self.shards for info in shard.tensors)

    def state_bytes(self, calibration_tokens: int) -> int:
        """The hidden states of one layer, in bfloat16."""
        return 2 * calibration_tokens * max(groups[0][0].num_inputs for groups in self.layers if groups)

    def scratch_bytes(self, calibration_tokens: int) -> int:
        """Disk for the hidden states of all layers, while sensitivities are measured."""
        return self.state_bytes(calibration_tokens) * len(self.layers)

    def peak_memory_bytes(self, calibration_tokens: int = 0) -> int:
        """Estimate: interpreter and libraries, one decoder layer, one shard twice (safetensors serialises a copy)."""
        layers = [[self.checkpoint.tensors[name] for name in self.layer_tensor_names(i)] for i in range(len(self.layers))]
        outside = [[self.checkpoint.tensors[self.structure.head_source]]] if self.head else []
        peak = 1100 * 2**20 + max(sum(t.num_bytes for t in layer) for layer in layers + outside)
        peak += 2 * max(sum(t.num_bytes for t in shard.tensors) for shard in self.shards)
        if calibration_tokens:
            # Embeddings and head; inputs, outputs and gradients of a layer; what it computes for one batch.
            widths = [{linear.reads: linear.num_inputs for group in groups for linear in group}.values() for groups in self.layers]
            peak += self.source_bytes - sum(t.num_bytes for layer in layers for t in layer) + 3 * self.state_bytes(calibration_tokens)
            peak += 8 * BATCH * WINDOW_TOKENS * max(max(own, default=0) for own in widths)
            # The layer in float32, its Hessians, one of them factored in float64; before that, logits and what is made of them.
            encoding = 4 * max(sum(torch.Size(t.shape).numel() for t in layer) for layer in layers)
            encoding += max(4 * sum(k * k for k in own) + 5 * 8 * max(own, default=0) ** 2 for own in widths)
            vocabulary = self.checkpoint.tensors[self.structure.head_source].shape[0]
            peak += max(encoding, 5 * 4 * WINDOW_TOKENS * vocabulary)
        return peak

    def table(self, mixed: bool = False) -> list[tuple[str, int, str, str, float]]:
        """Rows (module pattern, count, shape, decision, MB written), decoder layers folded into one row by ``*``.

        Args:
            mixed: rates are still to be chosen, layer by layer; MB written are at the plan's one rate.
        """
        rows: dict[tuple[str, str, str], list[float]] = {}
        quantized = {linear.name: linear for linear in self.linears}

        def add(name: str, shape: Sequence[int], decision: str, num_bytes: int) -> None:
            parts = ["*" if part.isdigit() else part for part in name.split(".")]
            rows.setdefault((".".join(parts), "x".join(map(str, shape)), decision), []).append(num_bytes / 1e6)

        def add_quantized(linear: Linear, rate: str) -> None:
            block = self.format.rotation_block_size_of(linear.name, linear.num_inputs)
            add(linear.name, (linear.num_rows, linear.num_inputs), f"{rate}, rotation {block}",
                sum(t.num_bytes for t in self.output_tensors(linear)))

        for info in self.checkpoint.tensors.values():
            module = info.name.removesuffix(".weight")
            if info.name.endswith(".weight") and module in quantized:
                add_quantized(quantized[module], "mixed rates" if mixed else f"{self.format.index_bits_of(module) / 2:g} bpw")
            elif not (self.head and module == self.head.name):
                add(info.name, info.shape, f"kept {str(info.dtype).removeprefix('torch.')}", info.num_bytes)
        if self.head:
            add_quantized(self.head, f"{HEAD_INDEX_BITS / 2:g} bpw")
        return [(name, len(mb), shape, decision, sum(mb)) for (name, shape, decision), mb in rows.items()]


def _head_index_bits(head: Linear | None) -> dict[str, int]:
    return {head.name: HEAD_INDEX_BITS} if head else {}


def index_bits_for(bpw: float) -> tuple[int, bool]:
    """The most index bits per pair that a rate in bits per weight pays for, and whether it is just that rate.

    Raises:
        QuantizeError: not in 3.0 to 6.0.
    """
    if not INDEX_BITS.start / 2 <= bpw <= (INDEX_BITS.stop - 1) / 2:  # also refuses NaN
        raise QuantizeError(f"--bpw {bpw:g}: expected {INDEX_BITS.start / 2:g} to {(INDEX_BITS.stop - 1) / 2:g}")
    return int(2 * bpw), int(2 * bpw) == 2 * bpw


def _served(structure: Structure, linears: Sequence[Linear], rotation_block_sizes: dict[int, int], tp: int) -> bool:
    for linear in linears:
        if linear.row_parallel:
            width, rest = divmod(linear.num_inputs, tp)
            if rest or width % UNIT_INPUTS or width % rotation_block_sizes[linear.num_inputs]:
                return False
        elif linear.num_rows % tp and linear.num_rows != structure.kv_rows:
            return False
    return True


def _select(structure: Structure, ignore: Sequence[str]) -> tuple[tuple[tuple[Linear, ...], ...], ...]:
    names = [linear.name for linear in structure.linears()]
    for pattern in ignore:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise QuantizeError(f"--ignore {pattern!r} matches no linear layer of the decoder; names look like {names[0]} "
                                "(everything outside the decoder layers, such as lm_head, is left alone unless asked for)")

    def ignored(linear: Linear) -> bool:
        return any(fnmatch.fnmatchcase(linear.name, pattern) for pattern in ignore)

    layers = []
    for groups in structure.layers:
        kept = []
        for group in groups:
            left = [linear.name for linear in group if ignored(linear)]
            if left and len(left) < len(group):
                raise QuantizeError(f"--ignore leaves out {left} but not {[x.name for x in group if x.name not in left]}: "
                                    "layers that read the same input are fused when served, ignore all or none of them")
            if not left:
                kept.append(group)
        experts = [group for group in groups if group[0].routed]
        if 0 < sum(group in kept for group in experts) < len(experts):
            raise QuantizeError(f"--ignore leaves out some matrices of the experts of {experts[0][0].name.rpartition('.experts.')[0]}, but "
                                "not others: they are served together, ignore all or none of them")
        layers.append(tuple(kept))
    if not any(layers):
        raise QuantizeError("--ignore leaves nothing to quantise")
    return tuple(layers)


def _check_weights(checkpoint: Checkpoint, structure: Structure, linears: Sequence[Linear]) -> None:
    for name in structure.parameter_names:
        if name not in checkpoint.tensors:
            others = sorted(set(checkpoint.tensors) - set(structure.parameter_names))[:3]
            raise QuantizeError(f"{checkpoint.directory}: no tensor {name}, which the architecture of config.json has"
                                + (f"; there are others that it has not: {', '.join(others)}" if others else ""))
    for linear in linears:
        _check_weight(checkpoint, linear, f"{linear.name}.weight", linears)


def _check_weight(checkpoint: Checkpoint, linear: Linear, source: str, linears: Sequence[Linear]) -> None:
    info = checkpoint.tensors[source]
    if info.shape != (linear.num_rows, linear.num_inputs):
        raise QuantizeError(f"{info.file}: {info.name} has shape {list(info.shape)}, "
                            f"config.json says {[linear.num_rows, linear.num_inputs]}")
    if info.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise QuantizeError(f"{info.file}: {info.name} is {info.dtype}, expected bfloat16, float16 or float32")
    if linear.num_inputs % UNIT_INPUTS:
        raise QuantizeError(f"{info.file}: {info.name} has {linear.num_inputs} inputs, not a multiple of {UNIT_INPUTS}: "
                            "leave what reads them unquantised with "
                            + " ".join(f"--ignore '*.{x.name.rpartition('.')[2]}'" for x in linears if x.reads == linear.reads))


def make_shards(tensors_by_layer: list[list[TensorInfo]], other: list[TensorInfo], max_bytes: int) -> tuple[Shard, ...]:
    """Shards of at most ``max_bytes``, if no layer is larger: whole layers together while they fit; then the tensors outside them."""
    groups: list[tuple[list[TensorInfo], range]] = []

    def add(tensors: list[TensorInfo], layers: range) -> None:
        if groups and bool(groups[-1][1]) == bool(layers) and sum(t.num_bytes for t in groups[-1][0] + tensors) <= max_bytes:
            groups[-1] = (groups[-1][0] + tensors, range(groups[-1][1].start, layers.stop))
        else:
            groups.append((tensors, layers))

    for layer, tensors in enumerate(tensors_by_layer):
        add(tensors, range(layer, layer + 1))
    for tensor in other:
        add([tensor], range(0))
    return tuple(Shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", tuple(tensors), layers)
                 for i, (tensors, layers) in enumerate(groups, 1))


def make_plan(directory: Path, bpw: float = 5.5, tp_max: int = TP_MAX, ignore: Sequence[str] = (),
              max_shard_bytes: int = MAX_SHARD_BYTES, quantize_lm_head: bool = False) -> Plan:
    """Decide everything about quantising the checkpoint in ``directory``; reads config.json and shard headers only.

    All layers get one rate, the highest that ``bpw`` pays for; :meth:`Plan.with_rates` changes that once sensitivities are known.

    Raises:
        QuantizeError: the checkpoint cannot be quantised as asked; names the tensor and says what to do.
    """
    index_bits, _ = index_bits_for(bpw)
    if tp_max < 1:
        raise QuantizeError(f"--tp-max {tp_max}: expected at least 1")
    checkpoint = Checkpoint(directory)
    if checkpoint.config.get("quantization_config"):
        method = checkpoint.config["quantization_config"].get("quant_method", "an unknown method")
        raise QuantizeError(f"{directory}: already quantised with {method}; start from the unquantised model")
    structure = find_structure(directory)
    layers = _select(structure, ignore)
    linears = [linear for groups in layers for group in groups for linear in group]
    head = structure.head if quantize_lm_head else None
    if head and checkpoint.config.get("model_type") in SERVED_BY_EMBEDDINGS:
        raise QuantizeError(f"--quantize-lm-head: vLLM's {checkpoint.config['model_type']} has no head that could be quantised, it makes "
                            "logits with the embeddings")
    _check_weights(checkpoint, structure, linears)
    if head:
        _check_weight(checkpoint, head, structure.head_source, [head])
    possible = possible_tensor_parallel_sizes(structure.num_heads, structure.num_kv_heads, tp_max)
    all_linears = [*linears, head] if head else linears
    rotation_block_sizes = choose_rotation_block_sizes(((x.num_inputs, x.row_parallel) for x in all_linears), possible)
    quantized = {linear.name for linear in all_linears}
    # Every other matrix is listed, not only nn.Linear: vLLM builds routers and heads as linears of its own.
    kept = sorted(name.removesuffix(".weight") for name, info in checkpoint.tensors.items()
                  if name.endswith(".weight") and len(info.shape) == 2 and name.removesuffix(".weight") not in quantized)
    if "lm_head" not in kept and not head:
        kept.append("lm_head")  # tied to the embedding
    fmt = QamwFormat(index_bits, rotation_block_sizes, _head_index_bits(head), tuple(kept))

    served = tuple(t for t in possible if _served(structure, linears, rotation_block_sizes, t))
    plan = Plan(checkpoint, structure, layers, fmt, (), max_shard_bytes, served, head).with_shards()
    least = INDEX_BITS.start / 2
    if plan.index_bits_within(bpw) < least * plan.num_quantized_weights:
        taken = least + plan.effective_bits_per_weight - plan.nominal_bits_per_weight
        raise QuantizeError(f"--bpw {bpw:g}: the least is {taken:.3f}, {least:g} for indices and the rest for norms, scales and codebooks; "
                            f"--bpw {least:g} is nominal, and takes just that")
    return plan


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest directory above it that exists."""
    path = path.absolute()
    return path if path.exists() else existing_parent(path.parent)


def check_disk(plan: Plan, out: Path, bpw: float, scratch_tokens: int) -> None:
    """Raise QuantizeError when what is still to be written, and the hidden states of all layers for ``scratch_tokens``, would not fit
    with a little to spare."""
    present = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    copies = sum((plan.checkpoint.directory / file).stat().st_size for file in plan.checkpoint.other_files())
    output = int(plan.output_bytes + plan.more_bytes_within(bpw)) - present
    needed, free = output + copies + plan.scratch_bytes(scratch_tokens) + 64 * 2**20, shutil.disk_usage(existing_parent(out)).free
    if free < needed:
        raise QuantizeError(f"{out}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free on its disk")
