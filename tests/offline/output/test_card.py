"""The head of the model card is YAML, whatever a directory is called."""

import pytest
import yaml

from offline_quantize.output.card import _yaml


@pytest.mark.parametrize(
    "name", ["org/name-1.5B", "a: b # c", "line\nbreak", "- x", "naïve 模型 😀", "'"]
)
def test_names_survive_yaml(name: str) -> None:
    assert yaml.safe_load(f"base_model: {_yaml(name)}") == {"base_model": name}
