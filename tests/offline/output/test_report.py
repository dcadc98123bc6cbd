"""What a run reports."""

import json
from dataclasses import replace
from pathlib import Path

from offline_quantize.output.report import LayerReport, Report

LAYER = LayerReport("model.layers.0.mlp.up_proj", (64, 128), 11, 128, 5.9, 30.0, 1e-3, 2e-4)
REPORT = Report(
    qamw_version="1",
    calibration="text.txt",
    calibration_tokens=512,
    encoder="feedback",
    code="plain",
    rates="mixed",
    nominal_bits_per_weight=5.5,
    effective_bits_per_weight=5.9,
    quantized_weights=8192,
    source_bytes=16384,
    output_bytes=6000,
    tensor_parallel_sizes=(1, 2),
    layers=(),
)


def test_layers_survive_json() -> None:
    for layer in (LAYER, replace(LAYER, output_nmse=None, sqnr_db=None)):
        assert LayerReport.from_dict(json.loads(json.dumps(layer.to_dict()))) == layer
    assert "output_nmse" not in replace(LAYER, output_nmse=None).to_dict()


def test_the_error_that_matters_is_that_of_the_output_if_it_is_known() -> None:
    layers = [replace(LAYER, name=f"{i}", nmse=10.0**-i, output_nmse=10.0**i) for i in range(7)]
    unreached = replace(LAYER, name="unreached", output_nmse=None)
    report = replace(REPORT, layers=(*layers, unreached))
    assert report.not_reached == ["unreached"]
    assert report.worst_layers[0] == "6: output_nmse 1.00e+06" and len(report.worst_layers) == 5
    plain = replace(report, calibration=None)
    assert plain.not_reached == [] and plain.worst_layers[0] == "0: nmse 1.00e+00"


def test_report_on_disk_has_every_key_in_order(calibrated: Path) -> None:
    report = json.loads((calibrated / "qamw_report.json").read_text())
    layers = tuple(map(LayerReport.from_dict, report["layers"]))
    rest = {k: v for k, v in report.items() if k not in ("not_reached", "worst_layers")}
    sizes = tuple(report["tensor_parallel_sizes"])
    made = Report(**{**rest, "layers": layers, "tensor_parallel_sizes": sizes})
    again = json.loads(json.dumps(made.to_dict()))
    assert again == report and list(again) == list(report)
