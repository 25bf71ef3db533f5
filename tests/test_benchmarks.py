"""The benchmarks' own arithmetic: a wrong kernel has no time, ratios are within rounds, the gate shuts."""

import json
import os
import platform
import re
import subprocess
import sys
import types
from pathlib import Path

import bench_layer_norm
import command
import machine
import pytest
import report
import results
import roofline
import sass
import tables
import torch

import harness

ROOT = Path(__file__).resolve().parent.parent
NO_KERNELS = types.SimpleNamespace(BACKENDS=())


def double(x, backend=None):
    return x * 2


def made_case(ours=double, mode=harness.FORWARD, **options):
    options = {"bytes": 8 * 64, "flops": 64, "roof": "copy", "compiled": False} | options
    inputs = lambda: [torch.randn(8, 8)]  # noqa: E731
    return harness.Case(
        "double", mode, torch.float32, "8x8", inputs, NO_KERNELS, ours, {"torch": double}, **options
    )


def row(case="op/forward/float32/8x8", variant="lspm-cpu", median_us=10.0, **more):
    return {
        "benchmark": "op",
        "case": case,
        "variant": variant,
        "median_us": median_us,
        "machine": "m",
    } | more


def full_row(**more):
    seconds = {"lspm-cpu": [1e-3], "torch": [2e-3]}
    about = machine.description() | {"benchmark": "op", "command": "again", "peak_bytes": 2**20}
    about |= {"rate": 1.0, "unit": "GB/s", "goals": []}
    return [r | about | more for r in harness.summarise("op/forward", ["lspm-cpu"], seconds)]


class TestMeasuring:
    def test_every_round_runs_each_turn_once_in_reversed_order(self):
        order = []
        turns = {name: lambda calls, name=name: order.append(name) or calls * 2.0 for name in "abc"}
        seconds = harness.interleave(turns, calls=5, rounds=3)
        assert order == [*"cba", *"abc", *"cba"]
        assert seconds == {name: [2.0] * 3 for name in "abc"}

    def test_ratios_are_within_rounds(self):
        seconds = {"lspm": [1.0, 10.0, 1.0], "torch": [2.0, 20.0, 2.0], "roof": [0.5, 5.0, 0.5]}
        ours, torchs = harness.summarise("case", ["lspm"], seconds, roof="copy")
        assert ours["speedup"] == {"torch": 2.0} and torchs["speedup"] == {}
        assert (ours["roof_percent"], torchs["roof_percent"]) == (50.0, 25.0)
        assert ours["extra_us"] == -1e6 and ours["median_us"] == 1e6 and ours["high_us"] == 5.5e6

    @pytest.mark.parametrize(
        ("goal", "met"), [(("speedup", 1.5), True), (("speedup", 2.5), False), (("extra_us", -1001.0), False)]
    )
    def test_goals(self, goal, met):
        assert harness.Goal(*goal).judge(full_row()[0])["met"] is met

    def test_inputs_rotate_beyond_the_last_cache(self, monkeypatch):
        monkeypatch.setattr(machine, "last_level_cache", lambda device: 4096)
        workload = harness.Workload(made_case(), "cpu")
        seen = [next(workload.rotation)[0][0].data_ptr() for _ in range(len(workload.sets) + 1)]
        assert len(set(seen)) * 256 > 4096 and seen[0] == seen[-1]

    def test_a_row_for_each_variant(self, monkeypatch):
        monkeypatch.setattr(harness, "SECONDS_PER_CASE", 0.0)
        ours, torchs = harness.measure(made_case(mode=harness.TRAINING), "cpu", smoke=True)
        assert (ours["variant"], torchs["variant"]) == ("lspm-reference", "torch")
        assert ours["median_us"] > 0 and ours["unit"] == "GB/s" and ours["roof_percent"] > 0


class TestOracle:
    @pytest.mark.parametrize("mode", [harness.FORWARD, harness.TRAINING])
    def test_a_wrong_result_has_no_time(self, mode):
        with pytest.raises(harness.WrongError, match="lspm-reference: result 0: error"):
            harness.measure(made_case(lambda x, backend: x * 2.001, mode), "cpu", smoke=True)

    def test_a_wrong_gradient_has_no_time(self):
        crooked = lambda x, backend: x + x.detach()  # noqa: E731
        with pytest.raises(harness.WrongError, match="lspm-reference: result 1: error"):
            harness.measure(made_case(crooked, harness.TRAINING), "cpu", smoke=True)

    def test_the_script_says_so_and_fails(self, monkeypatch, capsys, tmp_path):
        path = tmp_path / "r.json"
        monkeypatch.setattr(
            sys, "argv", ["bench_double.py", "--smoke", "--json", str(path), "--device", "cpu"]
        )
        assert command.main("double", "", lambda smoke: [made_case(lambda x, backend: x * 3)]) == 1
        assert "WRONG, so no time: lspm-reference: result 0: error" in capsys.readouterr().out
        assert [set(r) & {"wrong", "median_us"} for r in json.loads(path.read_text())] == [{"wrong"}]

    def test_an_unknown_case_is_refused(self, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["bench_double.py", "--cases", "nothing/*"])
        assert command.main("double", "", lambda smoke: [made_case()]) == 2
        assert "bench_double.py: --cases must match a case, got nothing/*" in capsys.readouterr().err


class TestMachine:
    def test_peak_of_a_known_allocation(self):
        machine.keep_freed_memory()
        one, size = lambda: torch.zeros(2**24), 2**26
        one()  # what is kept after this must not hide the next
        for function, expected in (
            (one, size),
            (lambda: (one(), one()), 2 * size),
            (lambda: [one().sum(), one().sum()], size),
        ):
            assert machine.peak_bytes(function) == pytest.approx(expected, abs=2**21)

    def test_the_name_is_the_processor_not_the_host_and_what_is_forced(self, monkeypatch):
        monkeypatch.delenv("LSPM_ISA", raising=False)
        assert re.fullmatch(r"[a-z0-9-]+-\d+-threads", machine.slug("cpu"))
        assert platform.node().lower() not in json.dumps(machine.description("cpu")).lower()
        plain = machine.slug("cpu")
        monkeypatch.setenv("LSPM_ISA", "avx2")
        assert machine.slug("cpu") == f"{plain}-avx2"
        assert " threads under LSPM_ISA=avx2" in tables.about(full_row())

    @pytest.mark.parametrize(("roof", "method", "ways"), [("copy_roof", "copy_", 2), ("read_roof", "sum", 1)])
    def test_a_roof_moves_what_it_says(self, monkeypatch, roof, method, ways):
        moved = []
        original = getattr(torch.Tensor, method)
        monkeypatch.setattr(machine, "last_level_cache", lambda device: 2**20)
        move = getattr(machine, roof).__wrapped__("cpu")
        monkeypatch.setattr(torch.Tensor, method, lambda t, *a: moved.append(t.nbytes) or original(t, *a))
        for size in (2**20, 2**27, 2**27):  # the last two go round the end of the buffer
            moved.clear()
            move(size)
            assert ways * sum(moved) == size


class TestResults:
    def test_new_rows_take_the_place_of_old_ones(self, tmp_path):
        path = tmp_path / "m.json"
        results.save(path, [row("a"), row("b")])
        results.save(path, [row("b", median_us=5.0)])
        assert [(r["case"], r["median_us"]) for r in results.load(path)] == [("a", 10.0), ("b", 5.0)]

    def test_another_machines_rows_are_refused(self, tmp_path):
        results.save(tmp_path / "m.json", [row()])
        with pytest.raises(ValueError, match=r"save: .*m\.json must hold one machine's results, got m$"):
            results.save(tmp_path / "m.json", [row(machine="other")])

    def gate(self, monkeypatch, capsys, tmp_path, old, new):
        for name, rows in (("old", old), ("new", new)):
            (tmp_path / name).write_text(json.dumps(rows))
        arguments = ["compare", str(tmp_path / "old"), str(tmp_path / "new"), "--fail-above", "1.1"]
        monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
        return report.main(), "".join(capsys.readouterr())

    def test_the_gate_lets_through(self, monkeypatch, capsys, tmp_path):
        old = [row("a"), row("a", "torch"), row("b")]
        new = [row("a", median_us=10.9), row("a", "torch", median_us=99.0), row("b", median_us=1.0), row("c")]
        status, said = self.gate(monkeypatch, capsys, tmp_path, old, new)
        assert (status, said) == (0, "Nothing takes more than 1.1 times as long.\n")

    def test_the_gate_names_what_regressed(self, monkeypatch, capsys, tmp_path):
        old, new = [row("a"), row("b"), row("c")], [row("a", median_us=11.1), row("b")]
        status, said = self.gate(monkeypatch, capsys, tmp_path, old, new)
        assert status == 1
        assert said.splitlines() == [
            "a lspm-cpu: 10 us, now 11.1 us, 1.11 times",
            "c lspm-cpu: 10 us, now no time",
        ]

    def test_the_gate_compares_one_machine(self, monkeypatch, capsys, tmp_path):
        status, said = self.gate(monkeypatch, capsys, tmp_path, [row()], [row(machine="n")])
        assert (status, said) == (2, "report.py: compare: OLD and NEW must be of one machine, got m and n\n")


class TestReport:
    def test_tables_go_between_the_markers(self, monkeypatch, capsys, tmp_path):
        readme = tmp_path / "README.md"
        forced = "<!-- forced:begin op -->\n<!-- forced:end op -->"
        readme.write_text(f"{forced}\n<!-- results:begin op */forward -->\nold\n<!-- results:end op -->\nb\n")
        results.save(tmp_path / "m.json", full_row() + full_row(case="op/backward"))
        results.save(tmp_path / "n.json", full_row(machine="m-avx2", forced="LSPM_ISA=avx2", case="op/avx2"))
        start = ["report.py", "--results", str(tmp_path), "readme", "--file", str(readme)]
        for extra, status in ((["--check"], 1), ([], 0), (["--check"], 0)):
            monkeypatch.setattr(sys, "argv", start + extra)
            assert report.main() == status
        assert "README.md is stale: run python benchmarks/report.py readme" in capsys.readouterr().out
        brief, text = readme.read_text().split("<!-- forced:end op -->\n")
        assert "LSPM_ISA=avx2" in brief and "| op/avx2 | 1,000 (1,000 to 1,000) | 2,000 | 2.00 |\n" in brief
        assert text.startswith("<!-- results:begin op */forward -->\n")
        assert text.endswith("\n<!-- results:end op -->\nb\n")
        assert "| op/forward | cpu | 1,000 (1,000 to 1,000) | 2,000 | 2.00 |" in text
        assert "`again` |" in text and not any(x in text for x in ("old", "op/backward", "avx2"))

    def test_plots(self, tmp_path):
        (path,) = report.plot(full_row(), tmp_path)
        assert path.name == f"{machine.slug()}-op.png" and path.stat().st_size > 1000

    def test_goals_are_shown(self):
        goals = [harness.Goal("speedup", 1.8).judge(r) for r in full_row()[:1]]
        assert "x torch >= 1.80 pass" in tables.table(full_row(goals=goals))


class TestPredictions:
    @pytest.mark.parametrize(
        ("bytes", "flops", "bound"), [(10**9, 1, (1e6, "memory")), (1, 10**9, (5e5, "compute"))]
    )
    def test_the_bound_is_the_larger_time(self, bytes, flops, bound):
        case = made_case(bytes=bytes, flops=flops)
        assert roofline.bound(case, 1.0, {torch.float32: 2.0}) == bound

    def test_machine_code(self, tmp_path):
        if reason := sass.missing():
            pytest.skip(reason)
        source = tmp_path / "k.cu"
        source.write_text(KERNEL)
        (kernel,) = sass.kernels(source, "sm_80")
        tensor, other = kernel.inner_loop()
        assert kernel.name == "tensor_kernel" and tensor == 1 and other >= 1
        assert kernel.most_threads == 1024 and kernel.shared == 65536 // 2 and kernel.occupancy() == 0.5
        assert kernel.spilled > 0  # the array that is indexed at run time


KERNEL = r"""
namespace a { namespace {
template <class T>
__global__ void __launch_bounds__(1024) tensor_kernel(const unsigned* a, T* c, int n, int m) {
  __shared__ float held[8192];
  float d[4] = {}, table[64];
  for (int i = 0; i < 64; ++i) table[i] = a[i * n];
  held[threadIdx.x] = table[m];
  __syncthreads();
#pragma unroll 1
  for (int i = 0; i < n; ++i)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
                 " {%0,%1,%2,%3},{%4,%4,%4,%4},{%4,%4},{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[i]));
  c[threadIdx.x] = d[0] + d[1] + d[2] + d[3] + held[threadIdx.x ^ m];
}
template __global__ void tensor_kernel<float>(const unsigned*, float*, int, int);
} }
"""


@pytest.mark.long
@pytest.mark.parametrize("name", ["attention", "gpt", "layer_norm"])
def test_smoke(name, tmp_path):
    path = tmp_path / "r.json"
    script = ROOT / "benchmarks" / f"bench_{name}.py"
    paths = os.pathsep.join((str(ROOT), str(ROOT / "python")))
    done = subprocess.run(
        [sys.executable, str(script), "--smoke", "--json", str(path)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = results.load(path)
    assert {r["variant"].split("-")[0] for r in rows} == {"lspm", "torch"} and all(
        r["median_us"] > 0 for r in rows
    )
    assert all(r["command"] in done.stdout for r in rows)


def test_the_cases_of_the_goals_exist():
    goals = [(str(case), goal.what) for case in bench_layer_norm.cases() for goal in case.goals]
    assert ("add_layer_norm/forward+backward/float32/4096x1024", "speedup") in goals
    assert ("layer_norm/forward-recorded/bfloat16/1x768", "extra_us") in goals
    assert len({str(case) for case in bench_layer_norm.cases()}) == len(list(bench_layer_norm.cases()))


def test_pytest_benchmark_runs_them(tmp_path):
    one = ["-k", "rms_norm/forward/float32/1x768", "--benchmark-max-time=0.01", "--benchmark-min-rounds=1"]
    path = tmp_path / "b.json"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", f"--benchmark-json={path}", *one],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    groups = [benchmark["group"] for benchmark in json.loads(path.read_text())["benchmarks"]]
    assert len(groups) >= 2 and set(groups) == {"rms_norm/forward/float32/1x768"}
