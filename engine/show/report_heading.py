"""The head of the page: what run this is, how it stands, and what it takes to repeat it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from .markup import facts, words
from .outcome import Outcome, outcome_of
from .pulse import duration
from .report_cost import total_seconds
from .run_files import Run, number_of, table_of, texts_of

TINY = {
    "Sync-R1": "the tiny base (a Janus of a million parameters)",
    "CoRL": "the tiny base (a Janus of two million parameters)",
}
SHOW_O = "the tiny base (a Show-o of a million parameters)"
WORLD = {
    "Sync-R1": "the rendered world (pictures of twelve concepts, creatures with names; made by the run)",
    "CoRL": "the rendered world (captions and questions about its pictures; made by the run)",
}
DIGITS = "the world of handwritten digits (1,797 pictures by 13 people; questions and sums made by the run)"
VERSIONS = ("syncr1", "torch", "transformers", "deepspeed", "triton")


def method_of(run: Run) -> str:
    """The method in words, as its settings tell it."""
    if "strategy" in run.settings and "merge_method" in run.settings:
        return "CoRL"
    return "Sync-R1" if "identity_weight" in run.settings else "a method of its own"


def model_of(run: Run) -> str:
    """The model that training began with."""
    model = run.settings.get("model")
    if not model and run.settings.get("policy") == "show_o":
        return SHOW_O
    return str(model) if model else TINY.get(method_of(run), "the tiny base")


def data_of(run: Run) -> str:
    data = run.settings.get("data")
    if not data and run.settings.get("world") == "digits":
        return DIGITS
    return str(data) if data else WORLD.get(method_of(run), "the rendered world")


def heading(run: Run) -> str:
    """Title, state and facts."""
    return f"<h1>{words(method_of(run))}: {words(run.name)}</h1>{state(outcome_of(run))}{facts(facts_of(run))}"


def state(outcome: Outcome) -> str:
    return f'<p class="state {outcome.kind}"><span aria-hidden="true">{outcome.sign}</span> {words(outcome.words)}</p>'


def facts_of(run: Run) -> list[tuple[str, str]]:
    """Names and values of the header; "" where the folder does not say."""
    environment = run.environment
    versions = table_of(environment, "packages")
    ranks = number_of(environment, "ranks") or 1
    machine = str(environment.get("device") or "")
    took = total_seconds(run)
    shown = [f"{name} {versions[name]}" for name in VERSIONS if versions.get(name)]
    return [
        ("Method", method_of(run)),
        ("Model", model_of(run)),
        ("Data", data_of(run)),
        ("Code", commit_of(environment)),
        ("Command", " ".join(map(quoted, texts_of(environment.get("command"))))),
        ("Machine", f"{machine}, {ranks:.0f} ranks" if ranks > 1 else machine),
        (
            "System",
            ", ".join(
                part
                for part in (
                    f"Python {environment['python']}" if environment.get("python") else "",
                    str(environment.get("platform") or ""),
                )
                if part
            ),
        ),
        ("Versions", ", ".join(shown)),
        ("Started", moment(environment.get("started") if not run.status else run.status.get("started"))),
        ("Finished", moment(run.status.get("finished"))),
        ("Took", duration(took) if took else ""),
        ("Seed", str(run.settings.get("seed", ""))),
    ]


def commit_of(environment: Mapping[str, Any]) -> str:
    """The commit, short, and whether files differed from it."""
    commit = environment.get("commit")
    if not isinstance(commit, str) or not commit:
        version = table_of(environment, "packages").get("syncr1")
        return f"syncr1 {version}, installed, not a git checkout" if version else ""
    name, changed, _ = commit.partition("-dirty")
    return f"commit {name[:12]}{', with changes that are not committed' if changed else ''}"


def quoted(argument: str) -> str:
    """An argument as a shell takes it."""
    plain = argument and all(letter.isalnum() or letter in "-_./=:,+@%" for letter in argument)
    return argument if plain else "'" + argument.replace("'", "'\\''") + "'"


def moment(value: Any) -> str:
    """`2026-01-31 23:59:59 +0000`; as it is where it is no time."""
    if not value:
        return ""
    try:
        return datetime.strptime(str(value), "%Y-%m-%dT%H:%M:%S%z").strftime("%Y-%m-%d %H:%M:%S %z")
    except ValueError:
        return str(value)[:40]
