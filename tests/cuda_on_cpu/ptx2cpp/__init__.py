"""PTX of nvcc or Triton as C++ for the runtime beside this package.

    python -m cuda_on_cpu.ptx2cpp [--export] kernels.ptx > kernels.cpp

It knows the instructions that our kernels have met (instructions.py); an unknown one is an error that names
it, never a guess. The C++ is compiled with -ffp-contract=off. Lines of `.loc` become #line, so that reports
name the kernel's own source.
"""

from cuda_on_cpu.ptx2cpp.module import translate

__all__ = ["translate"]
