"""``make check-versions``: are the interfaces of vLLM that the plugin uses there in every release of the range? Nothing is run.

Downloads the wheels (some 400 MB each, thrown away) and reads their Python files: every name that is imported from vLLM must exist,
every method that is overridden or called must have the parameters that it is given.
"""

import ast
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
RELEASES = [f"0.{minor}.0" for minor in range(24, 34)]
SOURCES = [*sorted((ROOT / "qamw_vllm").glob("*.py")), ROOT / "offline_quantize" / "served.py"]
EXPERTS = "vllm.model_executor.layers.fused_moe"
LINEAR, QUANTIZATION = "vllm.model_executor.layers.linear", "vllm.model_executor.layers.quantization"
CREATE_WEIGHTS = ("self", "layer", "input_size_per_partition", "output_partition_sizes", "input_size", "output_size", "params_dtype")
# (module, class or "", function) -> its first parameters
SIGNATURES = {
    (LINEAR, "LinearMethodBase", "create_weights"): CREATE_WEIGHTS,
    (LINEAR, "LinearMethodBase", "apply"): ("self", "layer", "x", "bias"),
    (LINEAR, "UnquantizedLinearMethod", "apply"): ("self", "layer", "x", "bias"),
    (LINEAR, "UnquantizedLinearMethod", "process_weights_after_loading"): ("self", "layer"),
    (f"{QUANTIZATION}.base_config", "QuantizationConfig", "get_quant_method"): ("self", "layer", "prefix"),
    (f"{QUANTIZATION}.base_config", "QuantizationConfig", "from_config"): ("cls", "config"),
    (f"{QUANTIZATION}.base_config", "QuantizationConfig", "get_min_capability"): ("cls",),
    (f"{QUANTIZATION}.base_config", "QuantizationConfig", "get_config_filenames"): (),
    (f"{QUANTIZATION}.base_config", "QuantizationConfig", "apply_vllm_mapper"): ("self", "hf_to_vllm_mapper"),
    (f"{EXPERTS}.fused_moe_method_base", "FusedMoEMethodBase", "create_weights"):
        ("self", "layer", "num_experts", "hidden_size", "intermediate_size_per_partition", "params_dtype"),
    (f"{EXPERTS}.fused_moe_method_base", "FusedMoEMethodBase", "apply"):
        ("self", "layer", "x", "topk_weights", "topk_ids", "shared_experts", "shared_experts_input"),
    (f"{EXPERTS}.routed_experts", "RoutedExperts", "load_weights"): ("self", "weights"),
    (f"{EXPERTS}.routed_experts", "RoutedExperts", "_map_global_expert_id_to_local_expert_id"): ("self", "expert_id"),
    (f"{EXPERTS}.moe_align_block_size", "", "moe_align_block_size"): ("topk_ids", "block_size", "num_experts", "expert_map"),
    (f"{EXPERTS}.activation", "", "apply_moe_activation"): ("activation", "output", "input"),
    (QUANTIZATION, "", "register_quantization_config"): ("quantization",),
    (QUANTIZATION, "", "get_quantization_config"): ("quantization",),
    ("vllm.model_executor.models.utils", "WeightsMapper", "apply_list"): ("self", "values"),
    ("vllm.model_executor.model_loader.reload.layerwise", "", "initialize_online_processing"): ("layer",),
}
# Words that must occur: attributes that are set in vLLM and read here, or the other way round.
WORDS = {
    LINEAR: ("total_num_heads", "total_num_kv_heads", "output_sizes", "output_size", "tp_rank", "skip_bias_add"),
    "vllm.model_executor.parameter": ("output_dim", "input_dim", "weight_loader"),
    f"{QUANTIZATION}.base_config": ("uses_meta_device",),
    "vllm.model_executor.model_loader.reload.layerwise": ("_already_called_process_weights_after_loading",),
    "vllm.lora.layers.utils": ("qweight",),
    f"{EXPERTS}.routed_experts": ("global_num_experts", "local_num_experts", "expert_map", "swiglu_limit", "apply_router_weight_on_input"),
    f"{EXPERTS}.config": ("moe_parallel_config", "tp_rank", "tp_size", "has_bias", "is_act_and_mul"),
    "vllm.config.pooler": ("task", "use_activation"),
    "vllm.pooling_params": ("task", "use_activation"),
}


def imports() -> set[tuple[str, str]]:
    """(module, name) of everything that our sources import from vLLM."""
    found = set()
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                found |= {(str(node.module), alias.name) for alias in node.names}
    return found


def source_of(folder: Path, module: str) -> str | None:
    base = folder / module.replace(".", "/")
    file = next((f for f in (base.with_suffix(".py"), base / "__init__.py") if f.is_file()), None)
    return file.read_text() if file else None


def names_in(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """Name -> the statement that binds it, at the top of a module or class, or under a condition there."""
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
            found |= names_in([*node.body, *node.orelse])
    return found


def faults(folder: Path) -> list[str]:
    """What the plugin needs and the vLLM unpacked in ``folder`` does not have."""
    found = []
    for module, name in sorted(imports()):
        source = source_of(folder, module)
        lazy = source is not None and f'"{name}"' in source  # vllm/__init__.py and platforms look names up when asked
        if source is None:
            if source_of(folder, f"{module}.{name}") is None:
                found.append(f"no module {module}")
        elif name not in names_in(ast.parse(source).body) and not lazy and source_of(folder, f"{module}.{name}") is None:
            found.append(f"{module} has no {name}")
    for (module, owner, function), expected in SIGNATURES.items():
        names = names_in(ast.parse(source_of(folder, module) or "").body)
        if owner:
            names = names_in(names[owner].body) if isinstance(names.get(owner), ast.ClassDef) else {}  # type: ignore[attr-defined]
        node = names.get(function)
        have = tuple(a.arg for a in (*node.args.posonlyargs, *node.args.args)) if isinstance(node, ast.FunctionDef) else None
        if have is None or have[: len(expected)] != expected:
            found.append(f"{module}: {owner or 'module'}.{function} has parameters {have}, expected {expected} first")
    for module, words in WORDS.items():
        found += [f"{module} does not mention {word}" for word in words if word not in (source_of(folder, module) or "")]
    return found


def main() -> None:
    bad = False
    for release in sys.argv[1:] or RELEASES:
        with tempfile.TemporaryDirectory() as directory:
            tags = [("--platform", f"{tag}_x86_64") for tag in ("manylinux_2_28", "manylinux_2_31", "manylinux2014", "manylinux1")]
            tags += [("--abi", tag) for tag in ("cp38", "abi3", "none")]
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--python-version", "3.12"]
            subprocess.run([*pip, *(word for tag in tags for word in tag), "--dest", directory, f"vllm=={release}"], check=True)
            (wheel,) = Path(directory).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(directory, [name for name in archive.namelist() if name.endswith(".py")])
            wrong = faults(Path(directory))
        print(f"vllm {release}:", "all there" if not wrong else "", *wrong, sep="\n    " if wrong else " ", flush=True)
        bad = bad or bool(wrong)
    sys.exit(bad)


if __name__ == "__main__":
    main()
