"""What a user asks the quantizer for."""

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from offline_quantize.calibration.text import DEFAULT_TEXT, WINDOW_TOKENS, default_num_tokens
from offline_quantize.encoding.group import CODERS, ENCODERS
from offline_quantize.errors import Option, QuantizeError, check_at_least
from offline_quantize.planning.shards import MAX_SHARD_BYTES
from qamw_kernels.errors import FormatError
from qamw_kernels.format.codebook import CODES, PLAIN
from qamw_kernels.format.defaults import BITS_PER_WEIGHT, TP_MAX
from qamw_kernels.format.rates import index_bits_within, is_nominal

RATES = ("mixed", "uniform")


class Effort(NamedTuple):
    """Defaults for what a request with a calibration text leaves open.

    Attributes:
        tokens: factor on the default number of calibration tokens.
    """

    encoder: str
    rates: str
    tokens: int


EFFORTS = {
    "fast": Effort("feedback", "uniform", 1),
    "normal": Effort("feedback", "mixed", 1),
    "best": Effort("beam", "mixed", 2),
}


@dataclass(frozen=True, init=False)
class QuantizeRequest:
    """Everything that decides the bytes of a quantized checkpoint, except the model and the device.

    Attributes:
        bpw: bits per weight, 3 to 6: nominal in halves (what the indices take), effective between
            them (what all stored bytes of the quantized layers take).
        calibration: UTF-8 text file, or None for no calibration.
        calibration_tokens: how many tokens of that text are read; None for
            :meth:`default_tokens`, or all of them if the text has fewer.
        effort: one of EFFORTS: the defaults of the encoder, the rates and the number of tokens.
        encoder: one of ENCODERS, see :mod:`offline_quantize.encoding.group`.
        code: "plain", or "trellis": about a quarter less squared error from as many bits, in more
            time; see :mod:`qamw_kernels.codec.trellis`.
        rates: "mixed" measures sensitivities: bits go to the layers, and calibration tokens count,
            by what their errors cost. "uniform" treats all alike, in about half the time.
        tp_max: widest tensor parallelism that rotation blocks are chosen for.
        ignore: glob patterns of linear layers that stay as they are.
        allow_partial: go on where more than a tenth of the decoder's weights cannot be quantized.
        quantize_lm_head: also quantize the head, at 6 bits per weight; it no longer shares its
            weight with the embeddings.
        max_shard_bytes: largest output file, unless one layer or tensor is larger.
        window_tokens: tokens of the calibration text that are read together, at most.
        balance_scales: False encodes with input scales of one, for comparisons.
    """

    bpw: float
    calibration: Path | None
    calibration_tokens: int | None
    effort: str
    encoder: str
    code: str
    rates: str
    tp_max: int
    ignore: tuple[str, ...]
    allow_partial: bool
    quantize_lm_head: bool
    max_shard_bytes: int
    window_tokens: int
    balance_scales: bool

    def __init__(
        self,
        bpw: float = BITS_PER_WEIGHT,
        calibration: Path | str | None = DEFAULT_TEXT,
        calibration_tokens: int | None = None,
        effort: str = "normal",
        encoder: str | None = None,
        code: str = PLAIN,
        rates: str | None = None,
        tp_max: int = TP_MAX,
        ignore: Iterable[str] = (),
        allow_partial: bool = False,
        quantize_lm_head: bool = False,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        window_tokens: int = WINDOW_TOKENS,
        balance_scales: bool = True,
    ) -> None:
        """Fill in the defaults and validate.

        Args:
            encoder: None for that of ``effort`` with calibration, nearest without.
            rates: None for those of ``effort`` with calibration, uniform without.
        Raises:
            QuantizeError: a value is not possible, or two of them do not go together.
        """
        preset = Effort("nearest", "uniform", 0)
        if calibration is not None:
            preset = EFFORTS.get(effort, EFFORTS["normal"])  # an unknown one is refused below
        values = {
            "bpw": bpw,
            "calibration": None if calibration is None else Path(calibration),
            "calibration_tokens": calibration_tokens,
            "effort": effort,
            "encoder": encoder or preset.encoder,
            "code": code,
            "rates": rates or preset.rates,
            "tp_max": tp_max,
            "ignore": tuple(ignore),
            "allow_partial": allow_partial,
            "quantize_lm_head": quantize_lm_head,
            "max_shard_bytes": max_shard_bytes,
            "window_tokens": window_tokens,
            "balance_scales": balance_scales,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen
        self._check_choices()
        self._check_rate()
        check_at_least("tp_max", tp_max, 1)
        check_at_least("max_shard_bytes", max_shard_bytes, 1)
        check_at_least("window_tokens", window_tokens, 2)  # BOS may be one
        if calibration_tokens is not None:
            check_at_least("calibration_tokens", calibration_tokens, 1)

    def _check_choices(self) -> None:
        choices = (  # name, value, all values, those that need a calibration text
            ("encoder", self.encoder, ENCODERS, CODERS),
            ("code", self.code, CODES, ()),
            ("rates", self.rates, RATES, ("mixed",)),
            ("effort", self.effort, EFFORTS, ("fast", "best")),
        )
        for name, value, known, calibrated in choices:
            if value not in known:
                raise QuantizeError(Option(name, value), f": expected one of {', '.join(known)}")
            if value in calibrated:
                self._check_calibrated(Option(name, value))
        if self.calibration_tokens is not None:
            self._check_calibrated(Option("calibration_tokens", self.calibration_tokens))

    def _check_calibrated(self, option: Option) -> None:
        if self.calibration is None:
            none = Option("calibration", None)
            raise QuantizeError(option, " needs a calibration text, but got ", none)

    def _check_rate(self) -> None:
        try:
            index_bits_within(self.bpw)
        except FormatError as error:
            raise QuantizeError(Option("bpw", self.bpw), f": {error}") from None
        if self.rates == "uniform" and not is_nominal(self.bpw):
            raise QuantizeError(
                Option("bpw", self.bpw),
                ": uniform rates must be multiples of 0.5, from 3 to 6; others need ",
                Option("rates", "mixed"),
                ", which needs a calibration text",
            )

    @property
    def mixed(self) -> bool:
        """Whether every layer gets a rate of its own, chosen by its sensitivity."""
        return self.rates == "mixed"

    def default_tokens(self, num_inputs: int) -> int:
        """Calibration tokens for a model whose widest layer has ``num_inputs`` inputs."""
        return EFFORTS[self.effort].tokens * default_num_tokens(num_inputs)

    @property
    def calibration_name(self) -> str | None:
        """File name of the calibration text; bytes that are no UTF-8 are replaced."""
        if self.calibration is None:
            return None
        return os.fsencode(self.calibration.name).decode(errors="replace")

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the interrupted one, as JSON.

        The text counts by its name only and the number of tokens not at all: a run compares the
        tokens that it reads.
        """
        values = asdict(self) | {"calibration": self.calibration_name}
        del values["calibration_tokens"]
        return values


DEFAULT_REQUEST = QuantizeRequest()
