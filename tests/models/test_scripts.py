"""Every script in a clone where something is not installed yet: one line says what, and how to get it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lspm_models.jobs import job_of

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.name for path in (ROOT / "python").glob("*.py"))


def complaint(script, path):
    """What a script says as it ends with exit code 2, where `path` comes before all installed packages."""
    command = [sys.executable, ROOT / "python" / script, "--help"]
    environment = {**os.environ, "PYTHONPATH": f"{path}:{ROOT}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    return done.stderr


@pytest.mark.parametrize("package", ["lspm_kernels", "torch"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_package_that_is_not_installed(script, package, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{package!r}] = None\n")
    how = "install it, in the repository, with: pip install '.[models]'"
    assert complaint(script, tmp_path) == f"{script}: needs the package {package}; {how}\n"


def test_kernels_that_are_not_built(tmp_path):
    package = tmp_path / "lspm_kernels"
    shutil.copytree(ROOT / "lspm_kernels", package, ignore=shutil.ignore_patterns("*.so"))
    how = "run `pip install -e .` in it, or start Python from another folder"
    assert complaint("pretrain.py", tmp_path) == (
        f"pretrain.py: lspm_kernels: no compiled kernels in {package}: if this is the source tree, {how}\n"
    )


def test_weights_that_are_not_there_are_told_before_options_of_their_job():
    with pytest.raises(
        ValueError, match=r"^checkpoint: missing must be a run folder or a checkpoint, got no"
    ):
        job_of(["--init", "missing", "--data", "photos"], fine_tuning=True)


def test_weights_that_are_none_are_told_before_options_of_their_job(tmp_path):
    with pytest.raises(ValueError, match=r"must be a run folder or a checkpoint, got no checkpoint in it$"):
        job_of(["--init", str(tmp_path), "--data", "photos"], fine_tuning=True)
    (tmp_path / "weights.pth").write_bytes(b"PK\3\4")
    with pytest.raises(ValueError, match=r"^gguf: .*weights\.pth: magic must be GGUF, got "):
        job_of(["--init", str(tmp_path / "weights.pth"), "--data", "photos"], fine_tuning=True)
