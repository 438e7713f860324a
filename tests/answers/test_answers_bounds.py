"""Nothing that a policy writes takes long, raises, or runs: fuzzed answers, monsters, threads; campaigns have more."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from answer_fuzz import OPTIONS, fuzzed, timed
from helpers import ROOT

from syncr1.engine.answers.formula import NotAFormulaError, plain_formula, read_formula
from syncr1.engine.answers.formula_values import exact, latex
from syncr1.engine.answers.letters import chosen_letter
from syncr1.engine.answers.same import same_answer

MONSTERS = (
    r"9^{9^{9^{9}}}",
    "9^" * 90 + "9",
    "100!!!!!!",
    "(" * 100_000,
    "[" * 90 + "2" + "]" * 90,
    r"\boxed{" * 20_000,
    "$" * 100_001,
    "a" + "\u0301" * 50_000,
    "9" * 100_000,
    "三" * 100_000,
    "A " * 50_000,
    "Answer: " * 20_000,
    r"(x+y+z)^{4000}",
    r"\frac" * 60,
    "1," * 90 + "1",
    "1e999999",
    "__import__('os').system('true')",
    r"\input{/etc/passwd}",
)


def test_fuzzed_answers_raise_nothing() -> None:
    assert len(timed(fuzzed(400, seed=17))) == 400


@pytest.mark.parametrize("said", MONSTERS, ids=range(len(MONSTERS)))
def test_a_monster_is_wrong_and_cheap(said: str) -> None:
    start = time.thread_time()
    assert not same_answer(said, "1") and not same_answer("1", said) and chosen_letter(said, OPTIONS) is None
    assert time.thread_time() - start < 2.0, "seconds; measured: .6 at most, of texts of 100,000 characters"


def test_equal_monsters_are_equal_by_their_text_alone() -> None:
    assert same_answer(r"9^{9^{9^{9}}}", r"9^{9^{9^{9}}}")
    assert not same_answer(r"9^{9^{9^{9}}}", r"9^{9^{9^{9}}} + 0")


def test_what_the_library_reads_is_written_here() -> None:
    """Names that latex2sympy or sympy would act upon are no formulas; the others come out as letters and operations."""
    for text in (
        r"\begin{matrix}1\end{matrix}",
        r"\int x",
        "x__class__",
        "lambda: 1",
        r"\text{x}",
        "f'(x)",
        "x;y",
        "2 3",
    ):
        with pytest.raises(NotAFormulaError):
            read_formula(plain_formula(text))
    assert latex(read_formula(plain_formula(r"2x^2 - \dfrac{1}{3}"))) == r"((2\cdot (x)^{2})+(-\frac{1}{3}))"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-2^2", "-4"),
        ("2^3^2", "512"),
        ("2/3/4", "1/6"),
        ("2-3-4", "-5"),
        ("-1 1/2", "-3/2"),
        ("3(2+1)", "9"),
        ("4^{1/2}", "2"),
    ],
)
def test_operations_bind_as_on_paper(text: str, value: str) -> None:
    assert str(exact(read_formula(text))) == value


def test_threads_get_the_same_verdicts() -> None:
    """Rewards run in threads, where a time limit by signals would raise."""
    pairs = [(r"\sqrt{8}", r"2\sqrt{2}", True), (r"\sqrt{12}", r"2\sqrt{3}", True), (r"\sqrt{8}", r"3\sqrt{2}", False)]
    wrong: list[tuple[str, str]] = []

    def compare() -> None:
        wrong.extend((said, right) for said, right, same in pairs if same_answer(said, right) is not same)

    threads = [threading.Thread(target=compare) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_sympy_is_loaded_by_roots_alone() -> None:
    code = """import sys
from syncr1.engine.answers.same import same_answer
from syncr1.engine.answers.letters import chosen_letter
assert same_answer("3 cm", "30 mm") and same_answer("(x+1)^2", "x^2+2x+1")
assert chosen_letter("**B**", ("1/2", ".3")) == "B"
assert not {"sympy", "math_verify", "torch"} & set(sys.modules), "most runs never ask"
"""
    paths = [str(ROOT), *(path for path in sys.path if path and Path(path).is_dir())]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={"PYTHONPATH": ":".join(paths)}, timeout=60)
