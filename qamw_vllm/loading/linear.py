"""What a checkpoint delivers for one linear layer.

What arrives decides whether the layer is quantized, and at which rate.

vLLM leaves uninitialized memory where a quantized checkpoint lacks a tensor, and its own shape
checks are assertions without names; both are caught here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from qamw_kernels.codec.encode import check_source_dtype
from qamw_kernels.errors import TensorError
from qamw_kernels.format.codebook import INDEX_BITS
from qamw_kernels.format.config import LAYER_TENSORS, layer_tensors
from qamw_kernels.format.weight import check_input_scales
from qamw_vllm.loading.form import FORM_TENSORS, LayerForm, note_for_reload
from qamw_vllm.loading.load_formats import fill_with_dummy_values, loads_dummy_weights
from qamw_vllm.loading.reading import READING
from qamw_vllm.parallel import slice_of_rank

_QKV = {"q": 0, "k": 1, "v": 2}

ShardId = int | str | tuple[int, ...] | None
Loader = Callable[..., None]


class LayerLoader:
    """Loaders for the tensors of one vLLM linear layer, on one tensor-parallel rank.

    Args:
        layer: the layer, a LinearBase of vLLM.
        parts: names of the checkpoint's modules that the layer holds; one name for a layer that
            is fused on disk too.
        index_bits: bits per pair of all parts. If the layer has a :attr:`form`, this is only the
            expectation until planes arrive.
        num_inputs: inputs of the whole layer, not of this rank's shard.
        num_shards: how many matrices vLLM stacks in the layer.

    Attributes:
        form: of a layer that takes the form of what arrives; None for one whose form is fixed.
        loaders: name of a tensor -> the loader of its parameter, made by :meth:`wrap`.
        check_possible: is called before a layer becomes a quantized one, and may refuse.
        checks_source: whether plain weights will be quantized, and must pass :func:`check_source`.
    """

    form: LayerForm | None = None
    checks_source = False

    def __init__(
        self,
        layer: Any,
        parts: tuple[str, ...],
        index_bits: int,
        num_inputs: int,
        num_shards: int,
    ) -> None:
        self.layer = layer
        self.names = parts if len(parts) == num_shards else parts[:1] * num_shards
        self.num_inputs = num_inputs
        self.dummy = loads_dummy_weights()
        self.arrived: set[tuple[str, int]] = set()
        self.loaders: dict[str, Loader] = {}
        self.check_possible: Callable[[], object] = lambda: None
        self._index_bits = index_bits
        self._first: tuple[str, bool] | None = None  # name and whether it is quantized
        self._planes: str | None = None  # name of the first planes
        self._load_weight: Loader | None = None  # see take_loader

    @property
    def index_bits(self) -> int:
        """Bits per pair, of the layer or, while it is a plain one, as config.json has them."""
        form = self.form
        return self._index_bits if form is None or form.index_bits is None else form.index_bits

    def shards_of(self, shard_id: ShardId) -> tuple[int, ...]:
        """Positions of the matrices that a loader's shard id stands for; all of them for None."""
        if shard_id is None:
            return tuple(range(len(self.names)))
        if isinstance(shard_id, tuple):
            return shard_id
        return (_QKV[shard_id] if isinstance(shard_id, str) else shard_id,)

    def wrap(self, tensor: str, load: Loader) -> Loader:
        """``load``, a loader of vLLM, preceded by checks; afterwards the arrival is recorded.

        Raises (from the loader):
            TensorError: the tensor's shape or dtype is not that of the format.
        """

        def loader(
            param: Parameter, loaded_weight: torch.Tensor, loaded_shard_id: Any = None
        ) -> None:
            shards = self.shards_of(loaded_shard_id)
            if self.form is not None and tensor in FORM_TENSORS:
                self._settle(self.form, tensor, loaded_weight, self.names[shards[0]])
                param = getattr(self.layer, tensor)  # vLLM's model may hold a replaced one
            if tensor in LAYER_TENSORS:
                self._check(tensor, loaded_weight, shards)
            elif tensor == "weight" and self.checks_source:
                check_source(f"{self.names[shards[0]]}.weight", loaded_weight, param.dtype)
            if loaded_shard_id is None:  # not every loader of vLLM takes a shard id
                load(param, loaded_weight)
            else:
                load(param, loaded_weight, loaded_shard_id)
            self.arrived.update((tensor, shard) for shard in shards)

        self.loaders[tensor] = loader
        return loader

    def take_loader(self) -> None:
        """Use the model class's own loader of the layer's weight, if it has set one.

        Mamba-2's class does so where ranks share a group of states: each rank gets rows of its own
        and rows that all ranks have. That loader is made for the plain weight. So it chooses rows
        of the weight, and the same rows are taken of packed tensors.
        """
        theirs = self.layer.weight.weight_loader
        if theirs is self.loaders["weight"]:
            return
        self._load_weight = theirs
        loads = {"weight": theirs, "qweight": self._load_rows, "row_norms": self._load_rows}
        for name, load in loads.items():
            if hasattr(self.layer, name):
                getattr(self.layer, name).weight_loader = self.wrap(name, load)
        note_for_reload(self.layer)

    def _load_rows(self, param: Parameter, loaded: torch.Tensor) -> None:
        """Copy the rows that the model class's loader would take of the plain weight for this rank.

        Raises:
            TensorError: the loader leaves rows empty, or does not only choose rows.
        """
        assert self._load_weight is not None
        dim = param.output_dim  # type: ignore[attr-defined]  # it is vLLM's
        num_rows = loaded.shape[dim]
        chosen = torch.full((param.shape[dim], 1), -1, device="cpu")
        self._load_weight(chosen, torch.arange(num_rows, device="cpu")[:, None])
        if chosen.min() < 0 or chosen.max() >= num_rows:
            raise TensorError(
                f"{self.names[0]}: vLLM's model class does not load whole rows of its weight on "
                f"rank {self.layer.tp_rank}, so packed rows cannot be loaded: quantize again with "
                f"--ignore '*.{self.names[0].rpartition('.')[2]}'"
            )
        param.data.copy_(loaded.index_select(dim, chosen.flatten().to(loaded.device)))

    def _settle(self, form: LayerForm, tensor: str, loaded: torch.Tensor, name: str) -> None:
        """Give the layer the form of what arrives, and refuse parts of different forms or rates."""
        quantized = tensor != "weight"
        first, self._first = self._first, self._first or (name, quantized)
        if first is None:
            if quantized:
                self.check_possible()
            if quantized != (form.index_bits is not None):
                form.change(self._index_bits if quantized else None)
        elif first[1] != quantized:
            raise self._mixed(first[0], _described(first[1]), name, _described(quantized))
        if tensor != "qweight":
            return
        index_bits = loaded.shape[0] if loaded.ndim == 3 else 0
        planes, self._planes = self._planes, self._planes or name
        if index_bits == form.index_bits:
            return
        if planes is not None:
            raise self._mixed(
                planes, f"{form.index_bits} index bits", name, f"{index_bits} index bits"
            )
        if index_bits not in INDEX_BITS:
            raise TensorError(
                f"{name}.qweight: expected {INDEX_BITS.start} to {INDEX_BITS.stop - 1} planes of "
                f"[N, K / 64], the checkpoint has {tuple(loaded.shape)}"
            )
        form.change(index_bits)

    def _mixed(self, one: str, is_one: str, other: str, is_other: str) -> TensorError:
        return TensorError(
            f"{' / '.join(dict.fromkeys(self.names))}: vLLM fuses these modules, or loads them "
            "again, so they must be quantized alike, but the checkpoint has "
            f"{one}: {is_one}, {other}: {is_other}"
        )

    def load_input_scales(
        self, param: Parameter, loaded: torch.Tensor, shard_id: Any = None
    ) -> None:
        """Copy one vector [K] into its rows of ``param`` [num_shards, K of this rank].

        vLLM has no parameter class for a vector over the inputs of which each stacked matrix has
        its own.

        Raises:
            TensorError: vLLM's model class has changed them.
        """
        READING.check_input_scales(loaded)
        num_inputs = param.shape[1]
        if num_inputs != self.num_inputs:  # row parallel
            loaded = slice_of_rank(loaded, 0, num_inputs, self.layer.tp_rank)
        for shard in self.shards_of(shard_id):
            param.data[shard].copy_(loaded)

    def check_complete(self, tensors: tuple[str, ...]) -> None:
        """Refuse a layer that lacks one of these tensors, or its bias, unless weights are random.

        Afterwards the arrivals are forgotten, so that a later reload is checked too.

        Raises:
            TensorError: names what is missing.
        """
        if self.dummy:
            return
        if getattr(self.layer, "bias", None) is not None:
            tensors = (*tensors, "bias")
        missing = {
            f"{name}.{tensor}": None
            for shard, name in enumerate(self.names)
            for tensor in tensors
            if (tensor, shard) not in self.arrived
        }
        if missing:
            raise TensorError(f"the checkpoint lacks {', '.join(missing)}")
        self.arrived.clear()

    def check_loaded(self) -> None:
        """Refuse a layer that is incomplete, or whose parts scale one activation differently.

        If weights are random, the layer is filled with them.

        Raises:
            TensorError: names the tensor, what was expected and what was found.
        """
        if self.form is not None and self.form.index_bits is None:
            self.check_complete(("weight",))
            return
        self.check_complete(LAYER_TENSORS)
        if self.dummy:
            fill_with_dummy_values(*(getattr(self.layer, name).data for name in LAYER_TENSORS))
        input_scales = self.layer.input_scales.data
        for name, scales in zip(self.names, input_scales, strict=True):
            check_input_scales(scales, f"{name}.input_scales")
            if not torch.equal(scales, input_scales[0]):
                raise TensorError(
                    f"{name}.input_scales differs from {self.names[0]}.input_scales: modules that "
                    "vLLM fuses read the same activation and must share one vector"
                )

    def _check(self, tensor: str, loaded: torch.Tensor, shards: tuple[int, ...]) -> None:
        rows = None if self._load_weight else _rows_on_disk(self.layer, shards)
        if rows is None:
            rows = loaded.shape[min(1, loaded.ndim - 1)] if loaded.ndim else 0
        check_stored_tensor(
            f"{self.names[shards[0]]}.{tensor}", loaded, rows, self.num_inputs, self.index_bits
        )


def _described(quantized: bool) -> str:
    return "quantized" if quantized else "not quantized"


def check_source(name: str, loaded: torch.Tensor, dtype: torch.dtype) -> None:
    """Refuse a plain weight that cannot be quantized while loading.

    Args:
        dtype: of the layer, to which vLLM rounds the weight before it is quantized.
    Raises:
        TensorError: ``qamw quantize`` does not read its dtype; or it is finite, but would not be
            in ``dtype``.
    """
    check_source_dtype(name, loaded.dtype)
    if torch.finfo(loaded.dtype).max > torch.finfo(dtype).max:
        most = max(map(abs, map(float, loaded.aminmax())))
        if torch.finfo(dtype).max < most < torch.inf:
            raise TensorError(
                f"{name} has {most:g}, too large for {dtype}; bfloat16 and float32 have a "
                "wider range"
            )


def check_stored_tensor(
    name: str,
    loaded: torch.Tensor,
    num_rows: int,
    num_inputs: int,
    index_bits: int,
) -> None:
    """Refuse a tensor ``<module>.<suffix>`` that a weight [N, K] cannot have.

    Raises:
        TensorError: its shape or dtype is not that of the format.
    """
    suffix = name.rpartition(".")[2]
    shape, dtype = layer_tensors(num_rows, num_inputs, index_bits)[suffix]
    if tuple(loaded.shape) != shape or loaded.dtype != dtype:
        raise TensorError(
            f"{name}: expected shape {shape} {dtype} for {index_bits} index bits, "
            f"the checkpoint has {tuple(loaded.shape)} {loaded.dtype}"
        )


def _rows_on_disk(layer: Any, shards: tuple[int, ...]) -> int | None:
    """Rows of ``shards`` of a layer in the checkpoint; None where a model's own class decides."""
    if type(layer) is QKVParallelLinear:
        # not output_sizes, which counts replicated kv heads
        head_sizes = (
            layer.head_size,
            layer.head_size,
            getattr(layer, "v_head_size", layer.head_size),
        )
        num_heads = layer.total_num_heads, layer.total_num_kv_heads, layer.total_num_kv_heads
        sizes = [heads * size for heads, size in zip(num_heads, head_sizes, strict=True)]
    elif type(layer) is MergedColumnParallelLinear:
        sizes = layer.output_sizes
    elif isinstance(layer, ParallelLMHead):
        sizes = [layer.org_vocab_size]
    elif type(layer) in (ColumnParallelLinear, RowParallelLinear, ReplicatedLinear):
        sizes = [layer.output_size]
    else:
        return None
    return sum(sizes[shard] for shard in shards)
