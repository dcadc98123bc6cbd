"""The Triton kernels against plain torch.

Not collected by itself: test_triton.py runs it in a process of its own, because Triton reads
TRITON_INTERPRET when it is imported. Without that variable it needs a GPU::

    export TRITON_INTERPRET=1
    python -m pytest -o python_files='check_*.py' tests/kernels_/ops/triton_checks
"""
