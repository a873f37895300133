"""What the compiled CUDA kernels do per element, read from their SASS, and what follows for GPUs.

``sass`` parses what cuobjdump prints, ``flow`` finds the loops, ``counts`` counts the instructions
of one pass through a loop.
"""
