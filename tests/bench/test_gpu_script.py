"""`bench/gpu.py`: a step that hangs, raises or misses a module takes nothing else along, and the page says so."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
sys.path.insert(0, str(BENCH))
try:
    import gpu
    import gpu_checks
    import gpu_child
    import gpu_goals
    import gpu_page
    import gpu_parts
    import gpu_process
    import gpu_sanitizer
    import gpu_tests
    import gpu_wheels
    from gpu_problems import Problem
    from gpu_report import Report, Skipped
finally:
    sys.path.remove(str(BENCH))

REPORTS = """
import json, sys
path = sys.argv[sys.argv.index("--report") + 1]
def report(**found):
    open(path, "w").write(json.dumps(found))
"""


def step(name: str, code: str, seconds: float = 30.0, waits: bool = False) -> gpu_process.Step:
    return gpu_process.Step(name, (sys.executable, "-c", REPORTS + code), seconds, waits=waits)


def part(name: str, *steps: gpu_process.Step, seconds: float = 60.0, **more: Any) -> gpu_process.Part:
    return gpu_process.Part(name, name, steps, seconds, **more)


def run_all(tmp_path: Path, *parts: gpu_process.Part, seconds: float = 60.0) -> tuple[int, dict[str, Any], str]:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    code = gpu.run(
        parts,
        seconds=seconds,
        out=tmp_path / "out",
        name="some-gpu",
        pretend=False,
        environment=dict(os.environ),
        scratch=scratch,
    )
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["some-gpu.json", "some-gpu.log", "some-gpu.md"]
    found = json.loads((tmp_path / "out" / "some-gpu.json").read_text())
    return code, found, (tmp_path / "out" / "some-gpu.md").read_text()


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_one_that_hangs_one_that_raises_and_one_without_its_module(tmp_path: Path) -> None:
    child = tmp_path / "child"
    hangs = f"""
import subprocess, time
started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(child)!r}, "w").write(str(started.pid))
report(goals={{"linear": {{"measured": 1.1}}}}, began=time.monotonic())
time.sleep(600)
"""
    code, found, page = run_all(
        tmp_path,
        part("ops", step("linear_large", hangs, seconds=2.0), step("raises", "raise SystemError('broken')")),
        part("absent", step("module", "import no_such_module_at_all")),
        part("dies", step("signal", "import os; os.kill(os.getpid(), 9)")),
        part("last", step("fine", "report(status='ok', lines=[{'name': 'a', 'ok': True, 'detail': ''}])")),
    )
    states = {name: (s["status"], s["why"]) for name, s in found["steps"].items()}
    assert code == 1 and found["finished"]
    assert states["ops/linear_large"] == ("killed", "its limit of 2 s was over")
    assert states["ops/raises"] == ("failed", "exit code 1: SystemError: broken")
    assert states["absent/module"][1].endswith("No module named 'no_such_module_at_all'")
    assert states["dies/signal"][1].startswith("signal 9") and states["last/fine"][0] == "ok"
    assert gone(int(child.read_text())), "what the killed step started lives on"
    assert "| linear_grpo_loss / three bare products: <= 1.15 x | 1.1 | yes |" in page, "told before it was killed"
    for name in ("ops/linear_large: killed", "absent/module: failed", "dies/signal: failed"):
        assert f"- {name}" in page
    assert "- last/fine" not in page and "| last/fine | 1 | 0 | 0 |" in page
    assert "No module named" in (tmp_path / "out" / "some-gpu.log").read_text()


def test_what_an_unmet_goal_and_a_wrong_check_do(tmp_path: Path) -> None:
    """A goal that is missed is said on the page; a check that is wrong is an exit code, too."""
    slow = "report(status='ok', goals={'grpo_loss': {'measured': 17.5}, 'never heard of': {'measured': 1}})"
    code, found, page = run_all(tmp_path, part("ops", step("grpo_loss", slow)))
    assert code == 0 and "| grpo_loss of 65,536 tokens, graph replay: <= 10 us | 17.5 | **NO** |" in page
    assert [line["met"] for line in found["goals"]].count(None) == len(gpu_goals.GOALS) - 1
    assert "cuda/grpo_loss has not run | not measured |" in page
    wrong = part(
        "checks", step("x", "report(status='failed', why='1', lines=[{'name':'v','ok':False,'detail':'off'}])")
    )
    again = tmp_path / "again"
    again.mkdir()
    code, _, page = run_all(again, wrong)
    assert code == 1 and "- WRONG v: off" in page


def test_later_parts_get_what_is_left(tmp_path: Path) -> None:
    """The first part may not take the least that the second is owed; steps without time are told of."""
    sleeps = "import time; report(status='ok'); time.sleep(60)"
    began = time.monotonic()
    code, found, page = run_all(
        tmp_path,
        part("greedy", step("a", sleeps), step("b", sleeps)),
        part("owed", step("c", "report(status='ok')"), least=3.0),
        seconds=5.0,
    )
    assert time.monotonic() - began < 15 and code == 1
    assert {name: s["status"] for name, s in found["steps"].items()} == {
        "greedy/a": "killed",
        "greedy/b": "not started",
        "owed/c": "ok",
    }
    assert "- greedy/b: not started: no time was left" in page


def test_steps_prepare_while_another_runs_and_wait_for_their_turn(tmp_path: Path) -> None:
    """Imports overlap, work does not; steps that only check run at once."""
    timed = """
import time
loaded = time.monotonic()
sys.stdin.readline()
began = time.monotonic()
time.sleep(0.5)
report(status="ok", began=began, loaded_at=loaded, from_=began, to=time.monotonic())
"""
    checks = (
        "import time\nbegan = time.monotonic()\ntime.sleep(1)\nreport(status='ok', from_=began, to=time.monotonic())"
    )
    _, found, _ = run_all(
        tmp_path,
        part("timed", *(step(name, timed, waits=True) for name in "ab")),
        part("next", step("c", timed, waits=True)),
        part("checks", step("d", checks), step("e", checks), together=2),
    )
    a, b, c, d, e = (found["steps"][name] for name in ("timed/a", "timed/b", "next/c", "checks/d", "checks/e"))
    for before, after in ((a, b), (b, c)):
        assert after["loaded_at"] < before["to"] <= after["from_"]
    assert d["from_"] < e["to"] and e["from_"] < d["to"]


def test_a_run_that_is_told_to_end_leaves_its_page(tmp_path: Path) -> None:
    """SIGTERM in the middle of a step, from outside."""
    code = f"""
import sys
sys.path.insert(0, {str(BENCH)!r})
import gpu, gpu_parts, gpu_process
sleeps = gpu_process.Step("sleeps", (sys.executable, "-c", "import time; time.sleep(600)"), 600, waits=False)
gpu_parts.all_parts = lambda pretend, processes: [gpu_process.Part("long", "long", (sleeps,), 600)]
sys.exit(gpu.main(["--pretend", "--out", {str(tmp_path)!r}]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    time.sleep(1.5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    page = (tmp_path / "pretend.md").read_text()
    assert "- long/sleeps: killed: the run was told to end" in page and "**Not finished**" in page


@pytest.mark.slow
def test_the_script_pretends_real_steps(tmp_path: Path) -> None:
    """The command line, a check in Triton's interpreter, a case of the table; nothing is claimed."""
    only = ["machine", "checks/groups/float32", "cuda/groups", "ops/grpo_loss"]
    command = [sys.executable, str(BENCH / "gpu.py"), "--pretend", "--out", str(tmp_path), "--only", *only]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "pretend.json").read_text())
    assert {name: s["status"] for name, s in found["steps"].items()} == {
        "machine/machine": "ok",
        "checks/groups/float32": "ok",
        "cuda/groups": "skipped",
        "ops/grpo_loss": "ok",
    }
    assert found["pretend"] and {line["met"] for line in found["goals"]} == {None}
    providers = {row["provider"] for row in found["cases"]["grpo_loss"]["rows"]}
    assert {"floor", "eager"} <= providers and any(name.startswith("ours") for name in providers)
    page = (tmp_path / "pretend.md").read_text()
    assert "**Pretend run**" in page and "| yes |" not in page and "cuda/groups: skipped: needs a GPU" in page


def test_every_goal_names_a_step_and_every_step_a_module() -> None:
    planned = {f"{p.name}/{s.name}" for p in gpu_parts.all_parts(False, 8) for s in p.steps}
    assert {goal.step for goal in gpu_goals.GOALS} <= planned
    for what in (s.command[2] for pretend in (False, True) for p in gpu_parts.all_parts(pretend, 2) for s in p.steps):
        assert (BENCH / f"{gpu_child.MODULES[what.partition('/')[0]]}.py").is_file(), what
    assert all(gpu_tests.file_of(name).is_file() for name in gpu_parts.TESTS)
    parts = gpu_parts.all_parts(False, 8)
    assert sum(part.least for part in parts) < 540 and len({part.name for part in parts}) == len(parts)


def test_parts_by_name() -> None:
    parts = gpu_parts.all_parts(True, 2)
    kept = gpu_parts.chosen(parts, ["profile", "ops/mixed"])
    assert [(p.name, len(p.steps)) for p in kept] == [("ops", 1), ("profile", 4)]
    with pytest.raises(ValueError, match="no part or step ops/nothing"):
        gpu_parts.chosen(parts, ["ops/nothing"])


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_gpu_installs_nothing(tmp_path: Path) -> None:
    """Without a .venv the machine's python3 serves; PYTHON names another; with one it is taken."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "ARGS", "OUT")}

    def planned(*more: str) -> str:
        command = ["make", "--no-print-directory", "-n", "gpu", *more]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert planned() == "PYTHONPATH=. python3 bench/gpu.py --out bench/results"
    assert planned("PYTHON=/opt/x/python", "ARGS=--pretend", "OUT=there") == (
        "PYTHONPATH=. /opt/x/python bench/gpu.py --out there --pretend"
    )
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").touch()
    assert planned().startswith("PYTHONPATH=. .venv/bin/python bench/gpu.py")


# Children -------------------------------------------------------------------------------------------------------------


def test_a_check_that_is_wrong_is_a_line(tmp_path: Path) -> None:
    """Values that are off, memory left unwritten, NaN, and a second call that differs."""
    truth = torch.arange(6.0)

    def problem(change: Any) -> Problem:
        calls: list[int] = []

        def call(inputs: Any, backend: str | None) -> dict[str, torch.Tensor]:
            calls.append(1)
            return {"out": inputs["x"].clone() if backend == "reference" else change(inputs["x"], len(calls))}

        return Problem("6", {"x": truth}, call)

    def unwritten(x: torch.Tensor, _: int) -> torch.Tensor:
        out = torch.empty_like(x)
        out[1:] = x[1:]
        return out

    changes = {
        "right": lambda x, _: x.clone(),
        "off": lambda x, _: x * 1.001,
        "nan": lambda x, _: x / 0 * 0,
        "unwritten": unwritten,
        "differs": lambda x, n: x * (1 + n % 2 * 1e-7),
    }
    right = {}
    for name, change in changes.items():
        report = Report(tmp_path / name)
        gpu_checks.check_values(report, "grpo_loss", problem(change), torch.float32, "cpu")
        right[name] = [line["ok"] for line in report.found["lines"]]
    unwritten_line = right.pop("unwritten")[0]  # what the second call finds in memory is chance
    assert unwritten_line is False
    assert right == {"right": [True, True], "off": [False, True], "nan": [False, False], "differs": [True, False]}


def test_an_error_in_a_child_is_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def outcome(what: str, raised: Exception | None) -> tuple[int, dict[str, Any]]:
        def work(report: Report, pretend: bool, rest: str) -> None:
            report.line(name="first", ok=True, detail="")
            if raised is not None:
                raise raised

        monkeypatch.setitem(gpu_child.MODULES, "checks", "gpu_checks")
        monkeypatch.setattr(sys.modules["gpu_checks"], "run", work)
        path = tmp_path / f"{what}.json"
        return gpu_child.run("checks/x", Report(path), True, False), json.loads(path.read_text())

    assert outcome("fine", None)[1]["status"] == "ok"
    code, found = outcome("skips", Skipped("needs a GPU"))
    assert (code, found["status"], found["why"]) == (0, "skipped", "needs a GPU")
    code, found = outcome("raises", RuntimeError("CUDA error: an illegal memory access\nand more"))
    assert (code, found["why"]) == (1, "RuntimeError: CUDA error: an illegal memory access")
    assert found["lines"][0]["name"] == "first"


@pytest.mark.parametrize(
    ("output", "clean"),
    [
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", True),
        ("========= ERROR SUMMARY: 0 errors\n", True),
        (
            "========= Error: Race reported between Write access at sample_kernel\n"
            "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n",
            False,
        ),
        ("========= Invalid __global__ read of size 4 bytes\n========= ERROR SUMMARY: 3 errors\n", False),
    ],
)
def test_what_the_sanitizer_says(output: str, clean: bool) -> None:
    assert gpu_sanitizer.verdict(output)[0] is clean


def test_a_sanitizer_that_refuses_the_machine_is_no_finding() -> None:
    ok, detail = gpu_sanitizer.verdict("========= Error: Device not supported. Please refer to the documentation\n")
    assert ok is None and "Device not supported" in detail


# Wheels ---------------------------------------------------------------------------------------------------------------


def make_wheel(folder: Path, name: str, *needs: str) -> Path:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n" + "".join(f"Requires-Dist: {n}\n" for n in needs)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/__init__.py", "VALUE = 7\n")
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_what_a_wheel_needs(tmp_path: Path) -> None:
    wheel = make_wheel(
        tmp_path,
        "thing",
        "Some.Dep_x>=2",
        'extra-only; extra == "all"',
        'old; python_version < "3.11"',
        "torch>=2",
        "pydantic-core==2.41.5",
    )
    assert gpu_wheels.needs(wheel) == [("some-dep-x", ">=2"), ("torch", ">=2"), ("pydantic-core", "==2.41.5")]
    assert {"torch", "triton", "torchvision", "transformers"} <= gpu_wheels.THERE
    assert gpu_wheels.pins()["deepspeed"].startswith("==")


@pytest.mark.slow
def test_wheels_are_installed_without_a_network_and_a_broken_one_leaves_the_others(tmp_path: Path) -> None:
    folder = tmp_path / "wheels"
    folder.mkdir()
    make_wheel(folder, "syncr1_test_wheel", "a-package-that-is-nowhere")
    (folder / "broken-1.0-py3-none-any.whl").write_bytes(b"not a wheel")
    target = gpu_wheels.install(folder, tmp_path / "site")
    assert (target / "syncr1_test_wheel" / "__init__.py").read_text() == "VALUE = 7\n"


def test_numbers_and_cells_of_the_page() -> None:
    assert [gpu_page.seconds_text(s) for s in (None, 2.0, 0.0015, 3.2e-5)] == ["", "2 s", "1.5 ms", "32 us"]
    assert gpu_page.cell("a|b\nc") == "a\\|b c" and gpu_page.number(0.123456) == "0.123"
    assert gpu.file_name("NVIDIA H200") == "nvidia-h200" and gpu.file_name("?") == "gpu"
