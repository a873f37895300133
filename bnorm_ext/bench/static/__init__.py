"""What the compiled CUDA kernels do per element, read from their SASS.

``sass`` parses what cuobjdump prints, ``flow`` finds the loops, ``counts`` counts the instructions
of one pass through a loop, ``instances`` does so for each instance of a kernel.
"""
