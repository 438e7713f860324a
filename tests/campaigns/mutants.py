"""Does the suite see a mistake?  Breaks lines chosen at random, one at a time, and runs the tests that reach each.

python tests/campaigns/mutants.py --coverage_file build/coverage --count 30 --json build/mutants.json

The coverage file holds which test ran which line (`make coverage` makes one).  The tree is copied first and broken in
the copy alone.  `--lines FILE` breaks the lines of an earlier `--json FILE`, found by their text, so that two versions
of the tree are asked the same; `--root` names the other tree.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, zip_longest
from pathlib import Path

from coverage import CoverageData

ROOT = Path(__file__).resolve().parents[2]
FILES = ("kernels/reference/*.py", "kernels/plan*.py", "engine/learn/*.py", "engine/rollout/*.py")
OPPOSITES: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
ALONE = """import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "").lower()]
sys.path[:] = [entry for entry in sys.path if "__editable__" not in entry]
"""
"""Of an interpreter that runs the copy: an editable install of the tree itself is none of its business."""
IDLE = 150
"""Seconds without a further test, after which a run is said to hang: no test takes so long."""


@dataclass(frozen=True)
class Mutant:
    """One line, and what stands there instead."""

    file: str
    line: int
    """From 1."""
    text: str
    broken: str
    """Both without indentation."""
    first: int
    last: int
    """The lines of the statement, any of which the coverage may name."""


# Breaking lines -------------------------------------------------------------------------------------------------------


def changed(node: ast.AST) -> Iterator[ast.AST]:
    """What a slip could have written in place of an expression or a `return`."""
    new = copy.deepcopy(node)
    match new:
        case ast.Compare(ops=[op, *_]) if type(op) in OPPOSITES:
            new.ops[0] = OPPOSITES[type(op)]()  # type: ignore[call-overload]
            yield new
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op) if type(op) in OPPOSITES:
            new.op = OPPOSITES[type(op)]()  # type: ignore[assignment]
            yield new
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield operand
        case ast.Constant(value=bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(value=int() | float() as value):
            yield ast.Constant(value + 1)
            yield ast.Constant(value - 1)
        case ast.IfExp():
            new.body, new.orelse = new.orelse, new.body
            yield new
        case ast.Call(func=function, args=[a, b, *rest]) if ast.unparse(function) not in ("min", "max"):
            new.args = [b, a, *rest]
            yield new
        case ast.Return(value=ast.expr() as value) if not (isinstance(value, ast.Constant) and value.value is None):
            yield ast.Return(ast.Constant(None))


def statements(tree: ast.Module) -> Iterator[tuple[ast.stmt, int]]:
    """Those of function bodies, with their last line, of a compound one its header's."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            inside = (node for child in function.body for node in ast.walk(child) if isinstance(node, ast.stmt))
            for node in inside:
                if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Raise):
                    continue  # what an error says is no arithmetic
                body = getattr(node, "body", None)
                yield node, body[0].lineno - 1 if body else node.end_lineno or node.lineno


def expressions(node: ast.AST) -> Iterator[ast.AST]:
    """A statement and what it is made of, without types and the statements within."""
    yield node
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and name != "annotation" and not isinstance(child, ast.stmt | ast.JoinedStr):
                yield from expressions(child)


def mutants_of(root: Path, file: str) -> dict[int, list[Mutant]]:
    """By line: every way to break it that is still Python."""
    source = (root / file).read_text()
    lines, found = source.splitlines(), defaultdict[int, list[Mutant]](list)
    for statement, last in statements(ast.parse(source)):
        for node in expressions(statement):
            start, end = getattr(node, "lineno", 0), getattr(node, "end_lineno", 0)
            if not start or start != end or start > last:
                continue
            raw = lines[start - 1].encode()
            for new in changed(node):
                broken = raw[: node.col_offset].decode() + ast.unparse(new) + raw[node.end_col_offset :].decode()  # type: ignore[attr-defined]
                one = Mutant(file, start, lines[start - 1].strip(), broken.strip(), statement.lineno, last)
                if one.broken != one.text and one not in found[start] and parses(with_line(source, one)):
                    found[start].append(one)
    return found


def parses(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def with_line(source: str, mutant: Mutant) -> str:
    lines = source.splitlines()
    line = lines[mutant.line - 1]
    lines[mutant.line - 1] = line[: len(line) - len(line.lstrip())] + mutant.broken
    return "\n".join(lines) + "\n"


def chosen(root: Path, files: Sequence[str], count: int, seed: int) -> list[Mutant]:
    """Lines at random, each broken in one of its ways."""
    chance = random.Random(seed)
    by_line = {(file, line): ways for file in files for line, ways in mutants_of(root, file).items() if ways}
    return [chance.choice(by_line[place]) for place in chance.sample(sorted(by_line), min(count, len(by_line)))]


def found_again(root: Path, files: Sequence[str], told: Sequence[dict[str, str]]) -> Iterator[Mutant | str]:
    """The same lines in this tree, in the file of the same name if it has them; their text where none has."""
    everything = {file: list(chain(*mutants_of(root, file).values())) for file in files}
    for one in told:
        name = Path(one["file"]).name
        same_name_first = sorted(everything, key=lambda file: Path(file).name != name)
        ways = chain.from_iterable(everything[file] for file in same_name_first)
        yield next((m for m in ways if (m.text, m.broken) == (one["text"], one["broken"])), one["text"])


# Running tests --------------------------------------------------------------------------------------------------------


class Tests:
    """A copy of the tree, and which of its tests reach a line."""

    def __init__(self, root: Path, coverage_file: Path, python: str, folder: Path) -> None:
        self.root, self.python, self.copy = root, python, folder / "tree"
        skipped = (".git", ".venv", "build", ".hypothesis", ".*_cache", "__pycache__", "*.egg-info")
        shutil.copytree(root, self.copy, symlinks=True, ignore=shutil.ignore_patterns(*skipped))
        (folder / "alone").mkdir()
        (folder / "alone" / "sitecustomize.py").write_text(ALONE)
        path = os.pathsep.join(map(str, (self.copy, folder / "alone")))
        self.environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
        where = self._call("-c", "import syncr1.kernels.api as api; print(api.__file__)").strip()
        if not Path(where).resolve().is_relative_to(self.copy.resolve()):
            raise SystemExit(
                f"{self.copy}: expected its own kernels to be imported, got {where}; it needs syncr1/kernels"
            )
        listed = self._call("-m", "pytest", "tests", "--collect-only", "-q", "-p", "no:cacheprovider")
        self.known = {line for line in listed.splitlines() if "::" in line}
        self.data = CoverageData(str(coverage_file))
        self.data.read()
        self.measured = {Path(name).as_posix(): name for name in self.data.measured_files()}

    def _call(self, *arguments: str) -> str:
        command = [self.python, *arguments]
        done = subprocess.run(command, cwd=self.copy, env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode:
            told = done.stdout[-3000:] + done.stderr[-3000:]
            raise SystemExit(f"{' '.join(command)} failed before anything was broken:\n{told}")
        return done.stdout

    def reaching(self, mutant: Mutant, most: int) -> list[str]:
        """Tests that run the statement, at most so many: of every file one, then of every file another."""
        name = next((n for n in self.measured if n.endswith(f"/{mutant.file}")), None)
        by_line = self.data.contexts_by_lineno(self.measured[name]) if name else {}
        contexts = chain.from_iterable(by_line.get(n, []) for n in range(mutant.first, mutant.last + 1))
        tests = sorted({context.rpartition("|")[0] for context in contexts} & self.known)
        by_file = defaultdict[str, list[str]](list)
        for test in random.Random(0).sample(tests, len(tests)):
            by_file[test.partition("::")[0]].append(test)
        in_turn = chain.from_iterable(zip_longest(*by_file.values()))
        return [test for test in in_turn if test][:most]

    def verdict(self, mutant: Mutant, tests: Sequence[str], limit: float) -> tuple[str, str]:
        """`noticed`, `hangs`, `survived`, `undecided` or `unreached`; and what noticed it."""
        if not tests:
            return "unreached", ""
        file = self.copy / mutant.file
        file.write_text(with_line(file.read_text(), mutant))
        try:
            return self._run(tests, limit)
        finally:
            shutil.copyfile(self.root / mutant.file, file)

    def _run(self, tests: Sequence[str], limit: float) -> tuple[str, str]:
        command = [self.python, "-m", "pytest", "-x", "-v", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist"]
        log, start, size, moved = self.copy.with_name("log"), time.monotonic(), 0, time.monotonic()
        with log.open("w") as file:
            process = subprocess.Popen(
                [*command, *tests],
                cwd=self.copy,
                env=self.environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        told = ""
        try:
            while process.poll() is None and not told:
                time.sleep(0.2)
                now = time.monotonic()
                size, moved = (size, moved) if log.stat().st_size == size else (log.stat().st_size, now)
                told = "hangs" if now - moved > IDLE else "undecided" if now - start > limit else ""
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
        lines = log.read_text(errors="replace").splitlines()
        last = next((line for line in reversed(lines) if "::" in line), "")
        if told:
            return told, last
        return ("noticed", last) if process.returncode else ("survived", f"{len(tests)} tests")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="the tree to break (a copy of)")
    parser.add_argument("--files", nargs="+", default=FILES, help="patterns below it")
    parser.add_argument("--coverage_file", type=Path, default=ROOT / "build" / "coverage", help="with a test per line")
    parser.add_argument("--lines", type=Path, help="break the lines of this earlier --json instead of random ones")
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tests", type=int, default=400, help="that are run for a line at most")
    parser.add_argument("--limit", type=float, default=600, help="seconds for a line")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--json", type=Path, help="what became of each line")
    asked = parser.parse_args()
    root = asked.root.resolve()
    files = sorted({str(path.relative_to(root)) for pattern in asked.files for path in root.glob(pattern)})
    wanted: list[Mutant | str] = [*chosen(root, files, asked.count, asked.seed)]
    if asked.lines:
        wanted = list(found_again(root, files, json.loads(asked.lines.read_text())))
    results = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tests = Tests(root, asked.coverage_file, asked.python, Path(folder))
        for number, mutant in enumerate(wanted, 1):
            if isinstance(mutant, str):
                print(f"{number}/{len(wanted)} absent: {mutant}", flush=True)
                results.append({"text": mutant, "verdict": "absent"})
                continue
            start = time.monotonic()
            verdict, by = tests.verdict(mutant, tests.reaching(mutant, asked.tests), asked.limit)
            seconds = round(time.monotonic() - start, 1)
            results.append(asdict(mutant) | {"verdict": verdict, "by": by, "seconds": seconds})
            print(
                f"{number}/{len(wanted)} {verdict} in {seconds} s: {mutant.file}:{mutant.line}\n"
                f"    - {mutant.text}\n    + {mutant.broken}\n    {by}",
                flush=True,
            )
            if asked.json:
                asked.json.write_text(json.dumps(results, indent=1))
    counts = Counter(str(one["verdict"]) for one in results)
    print(f"noticed: {counts['noticed'] + counts['hangs']} of {len(results)} ({dict(counts)})")


if __name__ == "__main__":
    main()
