"""Runs every benchmark, each in a process of its own, and then prints and draws what they found.

python benchmarks/run.py            writes benchmarks/results/<machine>.json and a plot of each benchmark
python benchmarks/run.py --smoke    each benchmark once on tiny shapes: writes nothing
"""

import argparse
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing import connection
from pathlib import Path

import machine

FOLDER = Path(__file__).resolve().parent


def one_by_one(scripts: list[Path], options: list[str]) -> Iterator[str]:
    """Runs scripts; gives the names of those that failed."""
    for script in scripts:
        print("\n" + script.name, flush=True)
        if subprocess.run([sys.executable, str(script), *options], check=False).returncode:
            yield script.name


def at_once(scripts: list[Path], options: list[str]) -> Iterator[str]:
    """The same on all cores, for what takes no time: each one's output is shown when it has ended.

    Each is a copy of this process, which has imported torch; to import it takes longer than most of them.
    """
    waiting, running = list(reversed(scripts)), {}
    while waiting or running:
        while waiting and len(running) < os.cpu_count():
            script, output = waiting.pop(), tempfile.TemporaryFile("w+")
            process = multiprocessing.get_context("fork").Process(target=_run, args=(script, options, output))
            process.start()
            running[process.sentinel] = process, script, output
        for ended in connection.wait(running):
            process, script, output = running.pop(ended)
            process.join()
            output.seek(0)
            print("\n" + script.name, output.read(), sep="\n", end="", flush=True)
            output.close()
            if process.exitcode:
                yield script.name


def _run(script, options, output):
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    sys.argv = [str(script), *options]
    runpy.run_path(str(script), run_name="__main__")


def main() -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    json = FOLDER / "results" / f"{machine.slug()}.json"
    extra = ["--smoke"] if options.smoke else ["--json", str(json)]
    scripts = [*sorted(FOLDER.glob("bench_*.py")), FOLDER / "roofline.py"]
    failed = list((at_once if options.smoke else one_by_one)(scripts, extra))
    if not options.smoke:
        subprocess.run([sys.executable, str(FOLDER / "report.py"), "plot"], check=True)
    if failed:
        print(f"run.py: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
