"""setup.py and the loader: what they say when something is missing or misspelt, and what `info` prints."""

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from lspm_kernels import compiled
from lspm_kernels.__main__ import backends, info

ROOT = Path(__file__).parents[1]


def run(*command, **environment):
    """(exit code, stdout, stderr) of a command in the source tree."""
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


def configure(tmp_path, **environment):
    """setup.py's complaint, if any, before it compiles anything."""
    command = (
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-temp",
        tmp_path,
        "--build-lib",
        tmp_path,
    )
    code, _, errors = run(*map(str, command), **environment)
    assert code == 1
    assert "Traceback" not in errors
    return errors.strip().splitlines()[-1]


def fake_nvcc(tmp_path, release):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        f"[ $1 = --version ] && echo 'Cuda compilation tools, release {release}'\n"
        "[ $1 = --version ] || echo compute_80 compute_90\n"
    )
    nvcc.chmod(0o755)
    return str(nvcc)


def test_no_compiler(tmp_path):
    message = configure(tmp_path, CXX="no-such-compiler", LSPM_CUDA="0")
    assert message == "setup: a C++ compiler must be on PATH, got 'no-such-compiler'; set CXX, or install g++"


def test_a_source_that_does_not_compile(tmp_path):
    assert configure(tmp_path, CXX="false", LSPM_CUDA="0").startswith("setup: compiling csrc/ failed")


def test_nvcc_is_asked_for_and_missing(tmp_path):
    message = configure(tmp_path, LSPM_CUDA="1", NVCC="no-such-nvcc")
    assert message == "setup: LSPM_CUDA=1, but no-such-nvcc is not on PATH"


def test_nvcc_of_an_unsupported_version(tmp_path):
    nvcc = fake_nvcc(tmp_path, "11.8, V11.8.89")
    message = configure(tmp_path, LSPM_CUDA="1", NVCC=nvcc)
    assert message == f"setup: LSPM_CUDA=1, but {nvcc} must be release 12.0 or later, got release 11.8"


def test_nvcc_of_an_unsupported_version_is_left_out_with_a_sentence(tmp_path):
    nvcc = fake_nvcc(tmp_path, "11.8, V11.8.89")
    _, _, errors = run(sys.executable, "setup.py", "-q", "--version", NVCC=nvcc, LSPM_CUDA="auto")
    assert f"the CUDA module is left out: {nvcc} must be release 12.0 or later, got release 11.8" in errors


@pytest.mark.parametrize(
    "variable, value, message",
    [
        ("LSPM_CUDA", "yes", "setup: LSPM_CUDA must be 0, 1 or auto, got 'yes'"),
        (
            "LSPM_ISAS",
            "avx2,sse9",
            "setup: LSPM_ISAS must name some of base, avx2, avx512, avx512_bf16, amx, got 'sse9'",
        ),
        ("LSPM_CUDA_ARCHS", "90;1000", "setup: LSPM_CUDA_ARCHS must name some of 80;90, got '1000'"),
    ],
)
def test_misspelt_settings(variable, value, message, tmp_path):
    nvcc = fake_nvcc(tmp_path, "13.0, V13.0.1")
    settings = {"LSPM_CUDA": "auto", "NVCC": nvcc, variable: value}
    assert configure(tmp_path, **settings) == message


def test_an_empty_setting_is_an_absent_one(tmp_path):
    message = configure(tmp_path, CXX="", NVCC="", LSPM_CUDA="", LSPM_CUDA_ARCHS="", LSPM_ISAS="", PATH="")
    assert message == "setup: a C++ compiler must be on PATH, got 'g++'; set CXX, or install g++"
    assert run(sys.executable, "-c", "import lspm_kernels", LSPM_ISA="")[0] == 0


def test_an_unknown_instruction_set():
    message = "lspm_kernels: LSPM_ISA must be one of base, avx2, avx512, avx512_bf16, amx, got 'sse9'"
    code, _, errors = run(sys.executable, "-c", "import lspm_kernels", LSPM_ISA="sse9")
    assert code == 1 and errors.strip().splitlines()[-1] == f"ImportError: {message}"
    code, out, errors = run(sys.executable, "-m", "lspm_kernels", "info", LSPM_ISA="sse9")
    assert (code, out, len(errors.splitlines())) == (1, "", 1) and message in errors


def test_an_instruction_set_that_the_processor_lacks(monkeypatch):
    monkeypatch.setattr(compiled, "cpu_flags", lambda: {"avx2"})
    with pytest.raises(
        ImportError, match=r"lspm_kernels: avx2 needs abm, bmi1, .*, which this processor lacks"
    ):
        compiled.load_cpu("avx2")


@pytest.mark.parametrize("isa", list(compiled.NEEDS))
def test_a_forced_instruction_set(isa):
    try:
        compiled.load_cpu(isa)
    except ImportError as error:
        pytest.skip(str(error))
    code, out, _ = run(
        sys.executable, "-c", "import lspm_kernels.compiled as c; print(c.cpu.isa)", LSPM_ISA=isa
    )
    assert (code, out.strip()) == (0, isa)


def test_a_source_tree_without_compiled_kernels(tmp_path):
    shutil.copytree(ROOT / "lspm_kernels", tmp_path / "lspm_kernels", ignore=shutil.ignore_patterns("*.so"))
    # -S: without the site-packages, an editable install of this very package does not come first.
    code, _, errors = run(
        sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import lspm_kernels"
    )
    assert code == 1
    assert "no compiled kernels in" in errors and "`pip install -e .`" in errors


def test_without_triton(monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nclass No:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'triton':\n            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, No())\n"
    )
    program = "import torch, lspm_kernels as l; print(l.layer_norm(torch.ones(2, 4)).shape)"
    code, out, errors = run(sys.executable, "-c", program, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert (code, out) == (0, "torch.Size([2, 4])\n"), errors
    code, out, errors = run(sys.executable, "-m", "lspm_kernels", "info", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert code == 0 and "no triton\n" in out and "it needs triton, which is not installed" in out, errors


def test_a_triton_whose_distribution_has_another_name(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(metadata, "version", Mock(side_effect=metadata.PackageNotFoundError))
    assert f", triton {triton.__version__}\n" in info()


def test_info_says_what_runs_and_why_the_rest_does_not():
    text = info()
    assert f"torch {torch.__version__}" in text
    assert f"{compiled.cpu.isa:12s}in use" in text
    for op in ("attention", "attention_with_kv_cache", "layer_norm"):
        assert re.search(rf"^  {op} +cpu +available$", text, re.M)
    if not torch.cuda.is_available():
        assert "triton    not available: it needs" in text
    code, out, _ = run(sys.executable, "-m", "lspm_kernels", "info")
    assert (code, out.strip()) == (0, text.strip())
    assert run(sys.executable, "-m", "lspm_kernels", "backends")[:2] == (0, backends() + "\n")
    assert run("sh", "-c", f"{sys.executable} -m lspm_kernels info | head -n 0")[1:] == ("", "")
    code, _, errors = run(sys.executable, "-m", "lspm_kernels", "inof")
    choices = "invalid choice: 'inof' (choose from 'info', 'backends', 'bench')"
    assert (code, errors) == (2, f"python -m lspm_kernels: COMMAND: {choices}; see --help\n")
