"""What a model of an H100 and an H200 says of the kernels' speed. Nothing is measured.

``make kernels-model`` compiles the kernels, takes their machine code apart, and replays it: every
warp of every program of a launch, with the stall counts and scoreboards that the assembler wrote
into the instructions, on 132 multiprocessors that share HBM and L2. The simulator is C++, because
a launch is some ten million instructions: numpy cannot batch them, as all warps share the queues,
and numba is not among this project's packages. Everything else is Python:

    assumptions   every number that is not in the machine code, with its source
    listing       machine code with its control bits, and the loops in it
    trace         what an instruction costs, and what of memory it asks for
    paths         which instructions a warp executes, given how often it goes round each loop
    simulate      a launch as a job for simulator.cpp
    blocks        what launches have in common
    narrow, wide, rotation
                  launches of this project's kernels
    experts       launches of the kernel for mixtures of experts
    report, mixtures
                  tables
"""
