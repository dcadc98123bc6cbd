"""model.safetensors.index.json: which file holds which tensor."""

from pathlib import Path

from qamw_kernels.errors import FormatError
from qamw_kernels.files import is_inside, read_json

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"


def read_index(directory: Path) -> dict[str, str]:
    """Name of every tensor of a checkpoint -> path of its shard inside the directory.

    Raises:
        FileError: no such file, or no JSON object.
        FormatError: it has no such map, or the map names a file that is not a .safetensors file
            inside the directory.
    """
    path = directory / INDEX
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(
            f"{path}: weight_map must be a JSON object that is not empty, "
            f"got {type(weight_map).__name__}"
        )
    for file in weight_map.values():
        is_shard = isinstance(file, str) and is_inside(file) and file.endswith(".safetensors")
        if not is_shard:
            raise FormatError(
                f"{path}: weight_map names {file!r}, "
                "expected a .safetensors file inside the directory"
            )
    return dict(weight_map)
