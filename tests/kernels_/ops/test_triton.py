"""Runs triton_checks in Triton's interpreter, and compiled where there is a GPU.

In a process of its own each, because Triton reads TRITON_INTERPRET when it is imported.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CHECKS = Path(__file__).with_name("triton_checks")
ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("interpret", ["1", "0"] if torch.cuda.is_available() else ["1"])
@pytest.mark.parametrize("name, least", [("kernels", 267), ("linear", 17), ("routed", 25)])
def test_kernels(name: str, least: int, interpret: str) -> None:
    run_checks(f"check_{name}.py", "not matrix", least, interpret)


@pytest.mark.matrix
def test_kernels_in_more_combinations() -> None:
    run_checks("check_linear.py", "matrix", least=4, interpret="1")


def run_checks(file: str, marks: str, least: int, interpret: str) -> None:
    """Run a file of checks, of which so many must pass and none may be skipped."""
    options = ["-q", "-p", "no:cacheprovider", "-o", "python_files=check_*.py", "-m", marks]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(CHECKS / file)],
        env={**os.environ, "TRITON_INTERPRET": interpret},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    report = done.stdout[-20000:] + done.stderr[-5000:]
    assert done.returncode == 0, report
    passed = re.search(r"^(\d+) passed\b.*$", done.stdout, re.MULTILINE)
    assert passed and int(passed[1]) >= least and "skipped" not in passed[0], report
