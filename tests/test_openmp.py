"""The compiled modules and torch share one OpenMP runtime, one pool of threads and one setting."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from lspm_kernels import add_layer_norm

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
ROWS, COLS = 512, 256


def ours():
    return add_layer_norm(torch.ones(ROWS, COLS), torch.ones(ROWS, COLS), torch.ones(COLS), torch.ones(COLS))


def theirs():
    return torch.nn.functional.layer_norm(torch.ones(ROWS, COLS), (COLS,))


def tasks():
    return len(os.listdir("/proc/self/task"))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


RUNTIMES = """
import os, torch, lspm_kernels
torch.set_num_threads(2)
lspm_kernels.layer_norm(torch.ones(512, 256))
paths = {line.split()[-1] for line in open("/proc/self/maps")}
print(*sorted(path for path in paths if "gomp" in os.path.basename(path)), sep="\\n")
"""


def test_one_runtime():
    """In a process of its own: other packages that the suite imports bring a runtime with them."""
    found = subprocess.run([sys.executable, "-c", RUNTIMES], capture_output=True, text=True, check=True)
    assert len(found.stdout.split()) == 1, found.stdout


def test_one_pool(threads):
    threads(2)
    theirs()
    before = tasks()
    ours()
    theirs()
    assert tasks() == before


def test_set_num_threads_holds_in_a_new_python_thread(threads):
    threads(1)
    started = []

    def run():
        before = tasks()
        ours()
        started.append(tasks() - before)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert started == [0]


def test_after_a_fork(threads):
    """With one thread, as in a DataLoader's worker; with more, torch's own operators hang too."""
    ours()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        ours()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
