"""Stage 1 of the evaluation: killed at every item, it goes on to the same bytes; other settings are refused."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from evaluate_cases import SETTINGS, contents, few_items, generated, policy
from torch import Tensor

from syncr1.engine.errors import EvaluationError
from syncr1.engine.evaluate.generate import generate_items, plan, select
from syncr1.engine.evaluate.store import ITEMS, Item, Store, file_name
from syncr1.engine.records import Prompt
from syncr1.engine.rollout.sampler import generate
from syncr1.engine.rollout.sampling import Sampling

NUM_TRAJECTORIES = 10


@pytest.fixture(scope="module")
def items() -> dict[str, list[Prompt]]:
    return few_items()


@pytest.fixture(scope="module")
def whole(items: dict[str, list[Prompt]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    return generated(items, tmp_path_factory.mktemp("whole") / "out")


def prompt(name: str, task: str = "qa", segments: tuple[str, ...] = ("text",)) -> Prompt:
    return Prompt(id=name, task=task, text="?", segments=segments)  # type: ignore[arg-type]


def test_every_item_is_there_once_and_in_order(items: dict[str, list[Prompt]], whole: Path) -> None:
    found = Store(whole).read()
    wanted = [key for batch in plan(items, SETTINGS) for key in batch.keys]
    assert [item.key for item in found] == wanted and len(wanted) == NUM_TRAJECTORIES
    for item in found:
        draws, asks = "image" in item.prompt.segments, "text" in item.prompt.segments
        assert (item.drawn is not None) is draws is (item.digest is not None)
        assert (item.greedy is not None) is (asks and item.member == 0) and (item.sampled is not None) is asks
        assert item.drawn is None or item.drawn == f"images/{file_name(item.key)}.png"
        assert all((whole / str(reference)).is_file() for reference in item.prompt.references)
    asked = {p.id: p for prompts in items.values() for p in prompts}
    for item in found:
        before = asked[item.prompt.id]
        assert item.shown == (before.images[0].name if before.images else None)
        assert len(item.prompt.references) == len(before.references)
        same = {"images": (), "references": ()}
        assert replace(item.prompt, **same) == replace(before, **same)  # type: ignore[arg-type]


def test_what_an_item_becomes_follows_from_seed_and_id(items: dict[str, list[Prompt]], whole: Path) -> None:
    """The engine's own rollouts of a batch, by themselves, are what lies in the folder."""
    chained = items["rea"]
    sampling = Sampling(num_generations=2, max_text_tokens=6, cfg_weight=SETTINGS.cfg_weight, seed=3407)
    stored = {item.key: item for item in Store(whole).read()}
    for rollout in generate(policy(), chained, sampling):
        item = stored[rollout.prompt.id, rollout.member]
        assert item.sampled == rollout.text
        assert rollout.image is not None
    greedy = generate(
        policy(),
        [replace(p, segments=("text",)) for p in chained],
        Sampling(num_generations=1, temperature=0.0, max_text_tokens=6),
    )
    assert [stored[p.id, 0].greedy for p in chained] == [rollout.text for rollout in greedy]
    first, second = (stored[chained[0].id, member].digest for member in (0, 1))
    assert first != second, "members are drawn apart"


# Interruptions --------------------------------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for the end of the process: nothing behind it is written."""


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int, how: str) -> None:
    """The `at`-th item is the last thing that stage 1 does: before its image, before its line, or within its line."""
    append, calls = Store.append, iter(range(10**9))

    def dying(self: Store, item: Item, image: Tensor | None) -> Item:
        if next(calls) < at:
            return append(self, item, image)
        if how != "before":
            monkeypatch.setattr(self, "close", lambda: None)
            append(self, item, image)
            assert self._file is not None
            self._file.flush()
            lines = self._path.read_bytes().splitlines(keepends=True)
            torn = lines[-1][: len(lines[-1]) // 2] if how == "within" else b""
            self._path.write_bytes(b"".join(lines[:-1]) + torn)
        raise Killed

    monkeypatch.setattr(Store, "append", dying)


@pytest.mark.parametrize("at", range(NUM_TRAJECTORIES))
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    at: int, items: dict[str, list[Prompt]], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = ("before", "between", "within")[at % 3]
    # What a run does up to there is in `whole`; so only the end of the run is generated here, by going on.
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    lines = (folder / ITEMS).read_bytes().splitlines(keepends=True)
    torn = lines[at][: len(lines[at]) * 2 // 3] if how == "within" else b""
    (folder / ITEMS).write_bytes(b"".join(lines[:at]) + torn)
    stored = Store(whole).read()
    later = [item.drawn for item in stored[at + (how != "before") :] if item.drawn]
    for name in later:
        (folder / name).unlink()
    assert [item.key for item in Store(folder).read()] == [item.key for item in stored[:at]]
    generated(items, folder)
    assert contents(folder) == contents(whole)


@pytest.mark.parametrize(("at", "how"), [(0, "before"), (4, "between"), (9, "within")])
def test_interrupted_while_it_writes(
    at: int, how: str, items: dict[str, list[Prompt]], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, at, how)
        with pytest.raises(Killed):
            generated(items, tmp_path / "out")
    assert len(Store(tmp_path / "out").read()) == at
    generated(items, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)


def test_a_killed_process(items: dict[str, list[Prompt]], whole: Path, tmp_path: Path) -> None:
    """SIGKILL after a batch; the next process goes on from what is on disk."""

    def die(done: int, total: int) -> None:
        assert total == NUM_TRAJECTORIES
        if done >= 4:
            os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        torch.set_num_threads(1)
        generate_items(policy(), items, tmp_path / "out", SETTINGS, model_name="tiny", source="world", progress=die)

    policy()
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert 4 <= len(Store(tmp_path / "out").read()) < NUM_TRAJECTORIES
    generated(items, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)


def test_two_ranks_share_the_items(items: dict[str, list[Prompt]], whole: Path, tmp_path: Path) -> None:
    """The batches are shared out, so the bytes are those of one process; rank files are joined at the end."""

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=2)
        mine: list[int] = []
        generate_items(
            policy(),
            items,
            tmp_path / "out",
            SETTINGS,
            model_name="tiny",
            source="world",
            progress=lambda done, total: mine.append(done),
        )
        torch.distributed.destroy_process_group()
        os._exit(0 if mine and mine[-1] < NUM_TRAJECTORIES else 1)

    policy()
    processes = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0], "each rank made some of the items, none made all"
    assert contents(tmp_path / "out") == contents(whole)


def test_a_complete_run_generates_nothing_more(
    items: dict[str, list[Prompt]], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole, tmp_path / "out")
    monkeypatch.setattr(Store, "append", lambda *_: pytest.fail("an item was made again"))
    generated(items, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "sampling.seed: 3407 then, 1 now"),
        ({"cfg_weight": 5.0}, "sampling.cfg_weight: 1.5 then, 5.0 now"),
        ({"batch_size": 3}, "sampling.batch_size: 2 then, 3 now"),
    ],
)
def test_changed_settings_are_refused(
    change: dict[str, int], said: str, items: dict[str, list[Prompt]], whole: Path
) -> None:
    before = contents(whole)
    with pytest.raises(EvaluationError, match=said):
        generated(items, whole, replace(SETTINGS, **change))  # type: ignore[arg-type]
    assert contents(whole) == before


def test_other_weights_or_items_are_refused(items: dict[str, list[Prompt]], whole: Path) -> None:
    with pytest.raises(EvaluationError, match=r"model.fingerprint: tiny \(.*\) then, other \(.*\) now"):
        generate_items(policy(1), items, whole, SETTINGS, model_name="other", source="world")
    fewer = {**items, "rea": items["rea"][:1]}
    with pytest.raises(EvaluationError, match=r"data.items.rea: 2 then, 1 now"):
        generated(fewer, whole)
    reworded = {**items, "rea": [replace(items["rea"][0], text="another"), items["rea"][1]]}
    with pytest.raises(EvaluationError, match=r"data.fingerprint: world"):
        generated(reworded, whole)


# Plans ----------------------------------------------------------------------------------------------------------------


def test_batches_are_of_one_task_and_one_kind() -> None:
    mixed = {"a": [prompt("1"), prompt("2", segments=("image",)), prompt("3"), prompt("4")], "b": [prompt("5", "b")]}
    batches = plan(mixed, replace(SETTINGS, batch_size=2, images_per_prompt=3))
    assert [[p.id for p in batch.prompts] for batch in batches] == [["1", "3"], ["4"], ["2"], ["5"]]
    assert [batch.members for batch in batches] == [1, 1, 3, 1]
    with pytest.raises(EvaluationError, match="'1'"):
        plan({"a": [prompt("1")], "b": [prompt("1")]}, SETTINGS)
    with pytest.raises(EvaluationError, match="no item"):
        plan({"a": []}, SETTINGS)


def test_select_keeps_tasks_and_a_fixed_choice() -> None:
    items = {"a": [prompt(str(i)) for i in range(20)], "b": [prompt("x")]}
    assert select(items) == items and list(select(items, ("b",))) == ["b"]
    assert select(items, (), 5) == select(items, (), 5) and len(select(items, (), 5)["a"]) == 5
    with pytest.raises(EvaluationError, match="no c; it has a, b"):
        select(items, ("c",))


def test_texts_may_be_greedy_or_sampled_alone(items: dict[str, list[Prompt]], tmp_path: Path) -> None:
    asked = {"rec": items["rec"], "qa": items["qa"]}
    greedy = Store(generated(asked, tmp_path / "greedy", replace(SETTINGS, sampled_texts=False))).read()
    assert all(item.greedy is not None and item.sampled is None for item in greedy)
    sampled = Store(generated(asked, tmp_path / "sampled", replace(SETTINGS, greedy_texts=False))).read()
    assert all(item.greedy is None and item.sampled is not None for item in sampled)
