"""Executes PTX on the CPU: a kernel that has no interpreter can be checked without a GPU.

Written after the PTX ISA reference. The instructions are those that the tests of the kernels meet;
any other is an error. Accesses out of bounds and misaligned ones are errors too, and so are races
in shared memory: an access that no barrier orders after what another warp does there.
"""
