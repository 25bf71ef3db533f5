"""Runs every benchmark, each in a process of its own, and then prints and draws what they found.

python benchmarks/run.py            writes benchmarks/results/<machine>.json and a plot of each benchmark
python benchmarks/run.py --smoke    each benchmark once on tiny shapes: writes nothing
"""

import argparse
import subprocess
import sys
from pathlib import Path

import machine

FOLDER = Path(__file__).resolve().parent


def main() -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    json = FOLDER / "results" / f"{machine.slug()}.json"
    extra = ["--smoke"] if options.smoke else ["--json", str(json)]
    scripts = [*sorted(FOLDER.glob("bench_*.py")), FOLDER / "roofline.py"]
    failed = []
    for script in scripts:
        print(f"\n{script.name}", flush=True)
        if subprocess.run([sys.executable, str(script), *extra], check=False).returncode:
            failed.append(script.name)
    if not options.smoke:
        subprocess.run([sys.executable, str(FOLDER / "report.py"), "plot"], check=True)
    if failed:
        print(f"run.py: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
