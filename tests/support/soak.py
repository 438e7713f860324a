"""A long night: ranks killed at random moments, full disks, slow rewards; the end must be that of a quiet one.

python tests/support/soak.py FOLDER --zero_stage 2 --steps 3000 --every 60
python tests/support/soak.py FOLDER --zero_stage 0 --steps 100000 --kills 30 --kinds killed --every 20 --draw

The second is not for comparing: a rank is killed at a random moment, and when the run goes on again, the next one.
The first trains the same twice, undisturbed and disturbed, and compares metrics and weights to the last bit; it tells
how the undisturbed one's memory and open files grow from step 300 on.  One line of JSON at the end; everything that the
runs said is in FOLDER.  It is CoRL's first stage on a text model of 30,000 weights, whose steps are the cheapest that
there are; with `--draw`, Sync-R1 on the tiny Janus.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from launched import Launched, cpu_seconds, forbid_writing, memory, metrics_of, slope
from made import made_once, short_base, world_folder
from text_models import policy as text_policy
from warm import ROOT

from syncr1.engine.errors import EXIT_BAD_INPUT, EXIT_PREEMPTED

KINDS = {"killed": 12, "disk full": 1, "reward slow": 2, "asked to end": 1}
"""What happens, and how often of 16."""
WARM = 300
"""Steps after which memory is looked at."""
SLOW = "slow_seconds"
"""A file beside the reward, with the number of seconds that it takes then."""
REWARD = f'''
import time
from pathlib import Path

def short(*, completions, **_):
    slow = Path(__file__).with_name("{SLOW}")
    if slow.exists():
        time.sleep(float(slow.read_text() or 0))
    return [sum(map(ord, text)) * 7919 % 101 / 100 for text in completions]  # nothing that is ever learnt to the end
'''
PLAIN_RESTARTS = 1000
"""torchrun counts over the whole run."""
STUCK = 600.0
"""Seconds without a step after which the run is said to hang."""


@dataclass
class Figures:
    """What a soak saw."""

    zero_stage: int
    steps: int = 0
    kills: int = 0
    restart_seconds: list[float] = field(default_factory=list)
    """From a kill to the end of the next step; of several kills before that step, from the last."""
    restart_cpu_seconds: list[float] = field(default_factory=list)
    """Of a core, that the busier of the new ranks had used by then: what a restart takes where each rank has a core."""
    refusals: int = 0
    """Ends with 2, after a full disk; the user starts again."""
    asked: int = 0
    """Ends with 75."""
    slow: int = 0
    steps_redone: int = 0
    minutes: float = 0.0
    wrong: list[str] = field(default_factory=list)
    rss_kib_a_step: list[float] = field(default_factory=list)
    """Per rank of the undisturbed run, from step 300 on."""
    files_grown: list[int] = field(default_factory=list)


def flags_of(folder: Path, asked: argparse.Namespace) -> list[str]:
    """The cheapest step there is, and a checkpoint every ten; `folder` gets data and a reward."""
    (folder / "reward.py").write_text(REWARD)
    rows = [{"prompt": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(64)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if asked.draw:
        task = ["--model", str(short_base()), "--data", str(world_folder()), "--anchor_fraction", "0"]
    else:
        qwen = made_once(folder, "qwen", lambda path: text_policy("qwen2", max_position_embeddings=512).save(path))
        task = ["--model", str(qwen), "--data", str(folder / "data.jsonl"), "--learning_rate", "1e-3"]
        task += ["--reward_funcs", f"{folder / 'reward.py'}:short"]
    recipe = str(ROOT / "recipes" / ("sync_r1.py" if asked.draw else "corl.py"))
    if asked.plain:
        places = ["--standalone", f"--nproc-per-node={asked.ranks}", f"--max-restarts={PLAIN_RESTARTS}"]
        start, end = ["-m", "torch.distributed.run", *places, recipe], []
    else:
        start, end = [recipe], ["--ranks_per_node", str(asked.ranks), "--max_restarts", "20"]
    return [
        *(*start, *task, "--seed", "3"),
        *("--zero_stage", str(asked.zero_stage), "--prompts_per_step", "2", "--num_generations", "2"),
        *("--max_completion_length", "4", "--max_steps", str(asked.steps), "--checkpointing_steps", "10"),
        *("--eval_samples", "0", "--sample_steps", "0", "--logging_steps", "50", *end),
    ]


def undisturbed(folder: Path, flags: list[str], figures: Figures) -> None:
    """The run to compare with, whose memory is looked at."""
    launched = Launched(folder / "quiet", folder / "quiet.log", flags)
    sizes: dict[int, list[tuple[int, int]]] = {}
    files: dict[int, list[int]] = {}
    try:
        while launched.poll() is None:
            time.sleep(2)
            step = launched.steps()[1]
            for rank, pid in enumerate(launched.ranks()):
                seen = memory(pid)
                if seen is not None and WARM <= step < figures.steps:
                    sizes.setdefault(rank, []).append((step, seen[0]))
                    files.setdefault(rank, []).append(seen[1])
        if launched.poll() != 0:
            figures.wrong.append(f"the undisturbed run ended with {launched.poll()}")
    finally:
        launched.end()
    figures.rss_kib_a_step = [round(slope(points), 3) for _, points in sorted(sizes.items())]
    # The fewest of the first and of the last tenth: a file that is open while it is written is no leak.
    tenths = [(counts[: len(counts) // 10 + 1], counts[-len(counts) // 10 :]) for _, counts in sorted(files.items())]
    figures.files_grown = [min(last) - min(first) for first, last in tenths]


class Night:
    """The disturbed run."""

    def __init__(self, folder: Path, flags: list[str], asked: argparse.Namespace, figures: Figures) -> None:
        self.folder, self.flags, self.figures = folder, flags, figures
        self.kinds = {kind: KINDS[kind] for kind in asked.kinds}
        self.chance, self.every, self.most = random.Random(asked.seed), asked.every, asked.kills
        self.run = folder / "loud"
        self.launched = self._start()
        self.file, self.seen, self.moved = 0, 0, time.monotonic()
        self.struck: float | None = None

    def _start(self, *more: str) -> Launched:
        return Launched(self.run, self.folder / "loud.log", [*self.flags, *more])

    def last(self) -> None:
        """Until the run has come to its end."""
        next_one = math.inf
        try:
            while True:
                time.sleep(0.1)
                self._look()
                if next_one == math.inf and self.seen:
                    next_one = time.monotonic() + self.chance.uniform(0, self.every)
                code = self.launched.poll()
                if code == 0 or self.figures.wrong:
                    return
                if code is not None:
                    self._again(code)
                if self.most and self.struck is not None:  # one after the other
                    next_one = time.monotonic() + self.chance.uniform(0, self.every)
                elif self.most and self.figures.kills >= self.most:
                    return
                elif time.monotonic() >= next_one:
                    self._happen()
                    next_one = time.monotonic() + self.chance.gammavariate(2, self.every / 2)
        finally:
            self.launched.end()

    def _look(self) -> None:
        file, steps = self.launched.steps()
        if file != self.file:
            self.figures.steps_redone += max(0, self.seen - steps) if self.file else 0
            self.file, self.seen = file, steps
        elif steps > self.seen:
            self.seen, self.moved = steps, time.monotonic()
            if self.struck is not None:
                self.figures.restart_seconds.append(round(time.monotonic() - self.struck, 1))
                self.figures.restart_cpu_seconds.append(max(map(cpu_seconds, self.launched.ranks()), default=0.0))
                self.struck = None
        if time.monotonic() - self.moved > STUCK:
            self.figures.wrong.append(f"no step for {STUCK:g} s after step {self.seen}")

    def _again(self, code: int) -> None:
        """What the user does when the launcher has ended."""
        if code == EXIT_BAD_INPUT:
            self.figures.refusals += 1
        elif code == EXIT_PREEMPTED:
            self.figures.asked += 1
        else:
            self.figures.wrong.append(f"the launcher ended with {code} after step {self.seen}")
            return
        self.launched.end()
        self.launched = self._start("--resume_from_checkpoint", "latest")

    def _happen(self) -> None:
        kind = self.chance.choices([*self.kinds], [*self.kinds.values()])[0]
        ranks, slow = self.launched.ranks(), self.folder / SLOW
        slow.unlink(missing_ok=True)  # until the next thing happens
        if kind == "killed" and ranks:
            self.struck = time.monotonic()
            self.figures.kills += 1
            _signal(self.chance.choice(ranks), signal.SIGKILL)
        elif kind == "disk full" and ranks:
            forbid_writing(self.chance.choice(ranks))
        elif kind == "reward slow":
            slow.write_text(str(round(self.chance.uniform(0.05, 0.5), 2)))
            self.figures.slow += 1
        elif kind == "asked to end":
            _signal(self.launched.process.pid, signal.SIGTERM)
        print(f"{time.strftime('%T')} step {self.seen}: {kind}; {self.figures.restart_seconds[-1:]}", flush=True)


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def compare(folder: Path, figures: Figures) -> None:
    """Metrics and weights of both runs, to the last bit."""
    quiet, loud = folder / "quiet", folder / "loud"
    one, other = metrics_of(quiet), metrics_of(loud)
    if [row["step"] for row in other] != list(range(1, figures.steps + 1)):
        figures.wrong.append(f"{len(other)} rows of metrics for {figures.steps} steps")
    differ = [row["step"] for row, twin in zip(one, other, strict=False) if row != twin]
    if differ:
        figures.wrong.append(f"metrics differ from step {differ[0]} on")
    (name,) = [path.relative_to(quiet) for path in quiet.rglob("checkpoints/last/model.safetensors")]
    if (quiet / name).read_bytes() != (loud / name).read_bytes():
        figures.wrong.append("weights differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--zero_stage", type=int, default=2, choices=(0, 1, 2, 3))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--every", type=float, default=60.0, help="seconds between two disturbances, on average")
    parser.add_argument("--kills", type=int, default=0, help="end after so many kills instead of after --steps")
    parser.add_argument("--plain", action="store_true", help="under torchrun itself instead of the recipe's launcher")
    parser.add_argument("--draw", action="store_true", help="Sync-R1 with pictures")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True)
    figures, start = Figures(asked.zero_stage, asked.steps), time.monotonic()
    flags = flags_of(asked.folder, asked)
    if not asked.kills:
        undisturbed(asked.folder, flags, figures)
    Night(asked.folder, flags, asked, figures).last()
    if not asked.kills and not figures.wrong:
        compare(asked.folder, figures)
    figures.minutes = round((time.monotonic() - start) / 60, 1)
    told = asdict(figures)
    slowest = max(figures.restart_seconds, default=0.0)
    print(json.dumps(told | {"restarts": len(figures.restart_seconds), "slowest_restart": slowest}))
    raise SystemExit(bool(figures.wrong))


if __name__ == "__main__":
    main()
