"""The token loop: nothing read back from the device, everything in place, buckets and padding without effect.

CUDA graphs need a GPU; what they rely on is tested here on a CPU, and replayed there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import all_kinds_of_prompts, sharp_policy, world_photo
from small_emu3 import all_plans, sharp_emu3
from stepping_cases import ReplayedStep, Watch, draws_what_eager_steps_draw, same_draws, sampling_of, static_engines

from syncr1.engine.policies.janus import JanusPolicy
from syncr1.engine.records import Prompt
from syncr1.engine.rollout import capacity, stepping
from syncr1.engine.rollout.sampler import RolloutEngine


@pytest.fixture(scope="module")
def policy() -> JanusPolicy:
    return sharp_policy()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[Prompt]:
    return all_kinds_of_prompts(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def static(policy: JanusPolicy, monkeypatch: pytest.MonkeyPatch) -> Callable[[], RolloutEngine]:
    return static_engines(policy, monkeypatch)


@pytest.mark.parametrize("previewed", [False, True])
def test_static_steps_draw_what_eager_steps_draw(
    policy: JanusPolicy, prompts: list[Prompt], static: Callable[[], RolloutEngine], previewed: bool
) -> None:
    """Buckets, padding, late counts and reused buffers change no token; the second call reuses all of the first's."""
    engine = static()
    for step in range(2):
        draws_what_eager_steps_draw(engine, policy, prompts, step, previewed=previewed)
        if step == 0:
            graphs, stores = set(engine.stepper._graphs), dict(engine.stepper._stores)
    tries = id(stores.pop("tries", None))  # as many as were rejected: a second call may need more
    assert {key for key in graphs if tries not in key} <= set(engine.stepper._graphs), "no graph was lost"
    assert all(engine.stepper._stores[name] is store for name, store in stores.items())


def test_nothing_is_read_back_between_steps(prompts: list[Prompt], static: Callable[[], RolloutEngine]) -> None:
    """One host synchronisation per token would cost what a graph saves."""
    static().generate(prompts, sampling_of())
    watch = ReplayedStep.watch
    assert watch.num_ops > 1000, "the watch saw the steps"
    assert watch.found == []


def test_the_watch_would_see_a_read() -> None:
    with Watch() as watch:
        x = torch.arange(3)
        x.sum().item()
        x[x > 1]
        torch.nonzero(x)
    assert {"_local_scalar_dense", "nonzero"} <= set(watch.found)


@pytest.mark.slow
def test_a_smaller_batch_reuses_a_larger_ones_buffers(
    policy: JanusPolicy, prompts: list[Prompt], static: Callable[[], RolloutEngine]
) -> None:
    engine = static()
    engine.generate(prompts, sampling_of())
    stores = dict(engine.stepper._stores)
    for chosen in (prompts[:2], prompts[3:], prompts):
        draws_what_eager_steps_draw(engine, policy, chosen, 0)
        assert engine.stepper._stores == stores


def test_a_larger_batch_gets_new_buffers_and_graphs(
    policy: JanusPolicy, prompts: list[Prompt], static: Callable[[], RolloutEngine]
) -> None:
    """A graph that holds freed addresses would read somebody else's memory."""
    engine = static()
    for chosen in (prompts[:1], prompts):
        draws_what_eager_steps_draw(engine, policy, chosen, 0)
    alive = {id(x) for x in (*engine.stepper._stores.values(), *engine.stepper._samples.values())}
    for _, _, _, samples, stored_prompts, own in engine.stepper._graphs:
        assert {samples, stored_prompts, own} <= alive


def test_what_is_held_counts_as_free_and_can_be_released(
    policy: JanusPolicy, prompts: list[Prompt], static: Callable[[], RolloutEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second step must not be refused for the memory that the first one left it."""
    engine = static()
    sampling = sampling_of()
    engine.generate(prompts, sampling)
    held = engine.stepper.held_bytes
    assert held >= engine.stats.kv_bytes
    monkeypatch.setattr(capacity, "free_bytes", lambda device: 0)
    expected = RolloutEngine(policy, cuda_graphs=False, max_bytes=held).generate(prompts, sampling)
    same_draws(engine.generate(prompts, sampling), expected)
    engine.release()
    assert engine.stepper.held_bytes == 0 and not engine.stepper._graphs
    with pytest.raises(capacity.RolloutTooLarge):
        engine.generate(prompts, sampling)


def test_buckets_waste_at_most_a_third() -> None:
    for size in range(1, 300):
        bucket = stepping.bucket_of(size)
        assert size <= bucket <= max(size + 1, size * 3 / 2)
    assert [stepping.bucket_of(n) for n in (1, 2, 3, 4, 5, 7, 9, 13, 33, 64)] == [1, 2, 3, 4, 6, 8, 12, 16, 48, 64]


def test_graphs_without_a_gpu_are_refused(policy: JanusPolicy) -> None:
    with pytest.raises(ValueError, match="cuda_graphs=True needs a policy on a GPU"):
        RolloutEngine(policy, cuda_graphs=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["janus", "emu3"])
def test_graphs_draw_what_eager_steps_draw(name: str, prompts: list[Prompt], tmp_path: Path) -> None:
    policy = (sharp_policy() if name == "janus" else sharp_emu3()).cuda()
    asked = prompts if name == "janus" else all_plans(world_photo(tmp_path, 3))
    engine = RolloutEngine(policy)
    assert engine.stepper.static
    for step in range(2):
        draws_what_eager_steps_draw(engine, policy, asked, step)
