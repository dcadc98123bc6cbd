"""Executes PTX on the CPU: a kernel that has no interpreter can be checked without a GPU.

Follows the PTX ISA reference, with only the instructions that the tests of the kernels use; any
other is an error. Accesses out of bounds and misaligned ones are errors too, and so are races in
shared memory: an access that no barrier orders after that of another warp to the same place.
"""
