"""The command line of the package."""

import sys
from pathlib import Path

from cuda_on_cpu.ptx2cpp import translate

sys.stdout.write(translate(Path(sys.argv[-1]).read_text(), export="--export" in sys.argv))
