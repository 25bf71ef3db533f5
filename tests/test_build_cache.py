"""A file of the cache is made once and whole, whoever wants it."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from build_cache import made


def test_threads_that_want_one_file_make_it_once(tmp_path):
    together, makes = threading.Barrier(4), []

    def make(unfinished):
        makes.append(unfinished)
        with unfinished.open("w") as file:
            file.write("half ")
            time.sleep(0.05)
            file.write("and half")

    def want(_):
        together.wait()
        return made(tmp_path / "folder" / "file", make).read_text()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(want, range(4))) == ["half and half"] * 4
    assert len(makes) == 1
