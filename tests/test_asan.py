"""The CPU kernels touch no memory but their own: the tests of the ops once more, under AddressSanitizer."""

import shutil

import asan
import pytest


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
def test_no_kernel_touches_memory_that_is_not_its_own(tmp_path):
    best = asan.available()[0]
    asan.build([best])
    with open(tmp_path / "output", "w+") as output:
        code = asan.run(best, output)
        output.seek(0)
        assert code == 0, output.read()[-6000:]
