"""Runs every benchmark, each in a process of its own, and then prints and draws what they found.

python benchmarks/run.py            writes benchmarks/results/<machine>.json and a plot of each benchmark
python benchmarks/run.py --smoke    each benchmark once on tiny shapes: writes nothing
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import machine

FOLDER = Path(__file__).resolve().parent


def one_by_one(commands: list[list[str]]) -> Iterator[int]:
    """Runs commands; gives their exit statuses."""
    for command in commands:
        print("\n" + Path(command[1]).name, flush=True)
        yield subprocess.run(command, check=False).returncode


def at_once(commands: list[list[str]]) -> Iterator[int]:
    """The same on all cores, for what takes no time: each one's output is shown when it has ended."""

    def run(command):
        return subprocess.run(
            command, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for command, done in zip(commands, pool.map(run, commands), strict=True):
            print("\n" + Path(command[1]).name, done.stdout, sep="\n", end="", flush=True)
            yield done.returncode


def main() -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    json = FOLDER / "results" / f"{machine.slug()}.json"
    extra = ["--smoke"] if options.smoke else ["--json", str(json)]
    scripts = [*sorted(FOLDER.glob("bench_*.py")), FOLDER / "roofline.py"]
    commands = [[sys.executable, str(script), *extra] for script in scripts]
    codes = at_once(commands) if options.smoke else one_by_one(commands)
    failed = [script.name for script, code in zip(scripts, codes, strict=True) if code]
    if not options.smoke:
        subprocess.run([sys.executable, str(FOLDER / "report.py"), "plot"], check=True)
    if failed:
        print(f"run.py: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
