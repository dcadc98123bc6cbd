"""``make check-versions``: does every release of the range have what the plugin uses of vLLM?

Nothing is run. The wheels are downloaded (some 400 MB each, thrown away) and their Python files are
read: every name that is imported from vLLM must exist, every method that is overridden or called
must have the parameters that it is given.
"""

import argparse
import ast
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
RELEASES = [f"0.{minor}.0" for minor in range(24, 34)]
SOURCES = [
    *sorted((ROOT / "qamw_vllm").rglob("*.py")),
    ROOT / "offline_quantize" / "evaluation" / "vllm_engine.py",
]

EXPERTS = "vllm.model_executor.layers.fused_moe"
LINEAR = "vllm.model_executor.layers.linear"
QUANTIZATION = "vllm.model_executor.layers.quantization"
LOADER = "vllm.model_executor.model_loader"
RELOAD = f"{LOADER}.reload.layerwise"

Signatures = Mapping[tuple[str, str, str], tuple[str, ...]]
Words = Mapping[str, tuple[str, ...]]

SIGNATURES: Signatures = {
    (LINEAR, "LinearMethodBase", "create_weights"): (
        "self",
        "layer",
        "input_size_per_partition",
        "output_partition_sizes",
        "input_size",
        "output_size",
        "params_dtype",
    ),
    (LINEAR, "LinearMethodBase", "apply"): ("self", "layer", "x", "bias"),
    (LINEAR, "UnquantizedLinearMethod", "apply"): ("self", "layer", "x", "bias"),
    (LINEAR, "UnquantizedLinearMethod", "process_weights_after_loading"): ("self", "layer"),
    (f"{QUANTIZATION}.base_config", "QuantizationConfig", "get_quant_method"): (
        "self",
        "layer",
        "prefix",
    ),
    (f"{QUANTIZATION}.base_config", "QuantizationConfig", "from_config"): ("cls", "config"),
    (f"{QUANTIZATION}.base_config", "QuantizationConfig", "get_min_capability"): ("cls",),
    (f"{QUANTIZATION}.base_config", "QuantizationConfig", "get_config_filenames"): (),
    (f"{QUANTIZATION}.base_config", "QuantizationConfig", "apply_vllm_mapper"): (
        "self",
        "hf_to_vllm_mapper",
    ),
    (f"{EXPERTS}.fused_moe_method_base", "FusedMoEMethodBase", "create_weights"): (
        "self",
        "layer",
        "num_experts",
        "hidden_size",
        "intermediate_size_per_partition",
        "params_dtype",
    ),
    (f"{EXPERTS}.fused_moe_method_base", "FusedMoEMethodBase", "apply"): (
        "self",
        "layer",
        "x",
        "topk_weights",
        "topk_ids",
        "shared_experts",
        "shared_experts_input",
    ),
    (f"{EXPERTS}.routed_experts", "RoutedExperts", "load_weights"): ("self", "weights"),
    (
        f"{EXPERTS}.routed_experts",
        "RoutedExperts",
        "_map_global_expert_id_to_local_expert_id",
    ): ("self", "expert_id"),
    (f"{EXPERTS}.moe_align_block_size", "", "moe_align_block_size"): (
        "topk_ids",
        "block_size",
        "num_experts",
        "expert_map",
        "pad_sorted_ids",
        "ignore_invalid_experts",
    ),
    (f"{EXPERTS}.activation", "", "apply_moe_activation"): ("activation", "output", "input"),
    (QUANTIZATION, "", "register_quantization_config"): ("quantization",),
    (QUANTIZATION, "", "get_quantization_config"): ("quantization",),
    ("vllm.model_executor.models.utils", "WeightsMapper", "apply_list"): ("self", "values"),
    (RELOAD, "", "initialize_online_processing"): ("layer",),
    (f"{LOADER}.reload.meta", "", "materialize_meta_tensor"): ("meta_tensor",),
    (f"{LOADER}.reload.meta", "", "capture_layer_to_meta"): ("layer",),
    (f"{LOADER}.default_loader", "DefaultModelLoader", "get_all_weights"): (
        "self",
        "model_config",
        "model",
    ),
    (f"{LOADER}.default_loader", "DefaultModelLoader", "load_weights"): (
        "self",
        "model",
        "model_config",
    ),
    (f"{LOADER}.default_loader", "DefaultModelLoader", "track_weights_loading"): (
        "self",
        "model",
        "loaded_weights",
    ),
}
"""(module, class or "", function) -> its first parameters."""

WORDS: Words = {
    LINEAR: (
        "total_num_heads",
        "total_num_kv_heads",
        "output_sizes",
        "output_size",
        "tp_rank",
        "skip_bias_add",
        "update_param_tp_status",
    ),
    "vllm.model_executor.parameter": ("output_dim", "input_dim", "weight_loader"),
    f"{QUANTIZATION}.base_config": ("uses_meta_device",),
    f"{QUANTIZATION}.utils.quant_utils": ("qweight",),
    RELOAD: ("_already_called_process_weights_after_loading",),
    "vllm.lora.layers.utils": ("qweight", "w2_qweight"),
    f"{EXPERTS}.routed_experts": (
        "global_num_experts",
        "local_num_experts",
        "expert_map",
        "swiglu_limit",
        "_replace_quant_method",
        "apply_router_weight_on_input",
    ),
    f"{EXPERTS}.config": (
        "moe_parallel_config",
        "tp_rank",
        "tp_size",
        "has_bias",
        "is_act_and_mul",
    ),
    "vllm.config.lora": ("target_modules",),
    f"{LOADER}.reload.types": ("restore_metadata",),
    f"{LOADER}.default_loader": ("enable_weights_track",),
    "vllm.config.pooler": ("task", "use_activation"),
    "vllm.pooling_params": ("task", "use_activation"),
}
"""Module -> words that must occur: attributes that are set in vLLM and read here, or vice versa."""


def imports_of(sources: Iterable[Path]) -> set[tuple[str, str]]:
    """(module, name) of everything that these files import from vLLM."""
    found = set()
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                found |= {(str(node.module), alias.name) for alias in node.names}
    return found


def faults(
    folder: Path,
    imports: Collection[tuple[str, str]] | None = None,
    signatures: Signatures = SIGNATURES,
    words: Words = WORDS,
) -> list[str]:
    """What the plugin needs and the vLLM unpacked in ``folder`` does not have.

    Args:
        imports: (module, name) of what must be importable; None for what our sources import.
        signatures: as :data:`SIGNATURES`. words: as :data:`WORDS`.
    """
    imports = imports_of(SOURCES) if imports is None else imports
    found = [fault for module, name in sorted(imports) for fault in _import(folder, module, name)]
    for (module, owner, function), expected in signatures.items():
        have = _parameters(folder, module, owner, function)
        if have is None or have[: len(expected)] != expected:
            place = f"{module}: {owner or 'module'}.{function}"
            found.append(f"{place} has parameters {have}, expected {expected} first")
    for module, expected in words.items():
        text = _source(folder, module) or ""
        found += [f"{module} does not mention {word}" for word in expected if word not in text]
    return found


def _import(folder: Path, module: str, name: str) -> list[str]:
    if _source(folder, f"{module}.{name}") is not None:
        return []
    source = _source(folder, module)
    if source is None:
        return [f"no module {module}"]
    lazy = f'"{name}"' in source  # vllm/__init__.py and platforms look names up when asked
    if lazy or name in _bound_names(ast.parse(source).body):
        return []
    return [f"{module} has no {name}"]


def _parameters(folder: Path, module: str, owner: str, function: str) -> tuple[str, ...] | None:
    names = _bound_names(ast.parse(_source(folder, module) or "").body)
    if owner:
        node = names.get(owner)
        names = _bound_names(node.body) if isinstance(node, ast.ClassDef) else {}
    node = names.get(function)
    if not isinstance(node, ast.FunctionDef):
        return None
    return tuple(argument.arg for argument in (*node.args.posonlyargs, *node.args.args))


def _source(folder: Path, module: str) -> str | None:
    base = folder / module.replace(".", "/")
    files = (base.with_suffix(".py"), base / "__init__.py")
    return next((file.read_text() for file in files if file.is_file()), None)


def _bound_names(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """Name -> the statement that binds it, in a module or class, or under a condition there."""
    found: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name: node for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id: node for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.If | ast.Try):
            found |= _bound_names([*node.body, *node.orelse])
    return found


def unpack_release(release: str, folder: Path) -> None:
    """Put the Python files of a release of vLLM for CUDA into ``folder``."""
    platforms = ("manylinux_2_28", "manylinux_2_31", "manylinux2014", "manylinux1")
    tags = [f"--platform={platform}_x86_64" for platform in platforms]
    tags += [f"--abi={abi}" for abi in ("cp38", "abi3", "none")]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    pip += ["--only-binary=:all:", "--python-version=3.12"]
    subprocess.run([*pip, *tags, "--dest", str(folder), f"vllm=={release}"], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.endswith(".py")])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("releases", nargs="*", default=RELEASES, metavar="RELEASE")
    incomplete = False
    for release in parser.parse_args().releases:
        with tempfile.TemporaryDirectory() as folder:
            unpack_release(release, Path(folder))
            found = faults(Path(folder))
        print(f"vllm {release}:", *(found or ["all there"]), sep="\n    " if found else " ")
        sys.stdout.flush()
        incomplete = incomplete or bool(found)
    sys.exit(incomplete)


if __name__ == "__main__":
    main()
