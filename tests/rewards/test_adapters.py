"""Reward functions in the shapes of other codebases, called through their adapters and through `score`."""

from __future__ import annotations

import asyncio
import io
import math
from typing import Any

import syncr1.engine.compat  # noqa: F401  # TRL's import needs it where torchvision's wheel does not fit torch

import numpy as np
import pytest
import torch
from PIL import Image

from syncr1.engine.errors import RewardError
from syncr1.engine.records import Prompt, Rollout, Segment
from syncr1.engine.rewards.hooks import TrainerState
from syncr1.engine.rewards.scoring import score
from syncr1.engine.rewards.yours.adapters import (
    ADAPTERS,
    flow_grpo,
    openrlhf,
    t2i_r1,
    to_picture,
    trl,
    trl_chat,
    verl,
    verl_batch,
    verl_omni,
)
from syncr1.engine.rewards.yours.verl_rewards import Overlong

GREY = torch.full((3, 4, 6), 0.5)


def rollout(number: int, said: str | None, image: torch.Tensor | None = None, **of_prompt: Any) -> Rollout:
    segments = []
    if said is not None:
        zeros = torch.zeros(len(said))
        tokens = torch.zeros(len(said), dtype=torch.int64)
        segments.append(Segment(kind="text", tokens=tokens, logp=zeros, logp_mixed=zeros, entropy=zeros))
    kinds: Any = tuple(kind for kind, has in (("text", said is not None), ("image", image is not None)) if has)
    fields = {"id": f"p{number}", "task": "vqa", "text": "what?", "answer": "dog", "segments": kinds, **of_prompt}
    return Rollout(
        prompt=Prompt(**fields),
        member=0,
        prompt_tokens=torch.arange(2),
        prompt_image=None,
        segments=tuple(segments),
        text=said or "",
        image=image,
    )


def values(reward: Any, rollouts: list[Rollout]) -> list[float | None]:
    """Through `score`, as in a run."""
    column = score(rollouts, {"foreign": reward}).values[:, 0]
    return [None if value.isnan() else float(value) for value in column]


MIXED = [
    rollout(0, "dog"),
    rollout(1, None, GREY, answer=None, text="a dog", extra={"data_source": "coco"}),
    rollout(2, "cat", 2 * GREY, extra={"extra_info": {"split": "train", "task": "own"}, "weight": 0.25}),
]


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]) -> float:
    assert data_source == "vqa"
    return float(solution_str == ground_truth) + (0.25 if extra_info.get("split") == "train" else 0.0)


def test_verl_row_by_row() -> None:
    assert values(verl(compute_score), MIXED) == [1.0, None, 0.25]
    seen: list[dict[str, Any]] = []

    def as_dict(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]) -> dict[str, Any]:
        seen.append({"source": data_source, "solution": solution_str, **extra_info})
        return {"score": np.float32(0.5), "acc": True}

    assert values(verl(as_dict), MIXED) == [0.5, None, 0.5]
    assert seen[0]["source"] == "vqa" and seen[0]["solution"] == "dog" and seen[0]["id"] == "p0"
    assert seen[1]["task"] == "own" and seen[1]["weight"] == 0.25 and seen[1]["images"] is MIXED[2].image
    assert values(verl(as_dict), [rollout(0, "dog", extra={"data_source": "coco"})]) == [0.5]
    assert seen[-1]["source"] == "coco"
    assert values(verl(lambda **_: {"reward": 2}), MIXED[:1]) == [2.0]


def test_verl_coroutines_run_side_by_side() -> None:
    running: list[int] = []

    async def slow(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]) -> float:
        running.append(len(running))
        await asyncio.sleep(0.01)
        return float(len(running))

    assert values(verl(slow), MIXED) == [2.0, None, 2.0], "both had begun before either ended"


def test_verl_batch() -> None:
    def compute(
        data_sources: list[str], solution_strs: list[str], ground_truths: list[str], extra_infos: list[dict[str, Any]]
    ) -> list[Any]:
        rows = zip(data_sources, solution_strs, ground_truths, extra_infos, strict=True)
        return [{"score": compute_score(*row)} for row in rows]

    assert values(verl_batch(compute), MIXED) == [1.0, None, 0.25]
    assert values(verl_batch(compute), MIXED[1:2]) == [None]


@pytest.mark.parametrize("wrap", [lambda r: r, list, lambda r: {"rewards": r, "scores": r, "extra_logs": {}}])
def test_openrlhf(wrap: Any) -> None:
    def reward_func(queries: list[str], prompts: list[str], labels: list[str], **_: Any) -> Any:
        assert queries == ["what?dog", "what?cat"] and prompts == ["what?"] * 2
        responses = [query[len(prompt) :] for query, prompt in zip(queries, prompts, strict=True)]
        return wrap(torch.tensor([float(a == b) for a, b in zip(responses, labels, strict=True)]))

    assert values(openrlhf(reward_func), MIXED) == [1.0, None, 0.0]
    assert values(openrlhf(reward_func), MIXED[1:2]) == [None]


@pytest.mark.parametrize("wrap", [float, torch.tensor, lambda r: [r], lambda r: {"rewards": torch.tensor([r])}])
def test_openrlhf_functions_for_one_row_are_called_row_by_row(wrap: Any) -> None:
    """As OpenRLHF calls them since it became asynchronous."""
    calls: list[list[str]] = []

    def of_one(queries: list[str], prompts: list[str], labels: list[str]) -> Any:
        calls.append(queries)
        return wrap(float(queries[0].endswith(labels[0])))

    assert values(openrlhf(of_one), MIXED) == [1.0, None, 0.0]
    assert calls == [["what?dog", "what?cat"], ["what?dog"], ["what?cat"]]
    assert values(openrlhf(of_one), MIXED[:1]) == [1.0]


@pytest.mark.parametrize(
    ("adapter", "result", "said"),
    [
        (verl, {"acc": 1.0}, "expected a dict with 'score', got one with acc; add the score"),
        (verl_batch, [{"acc": 1.0}], "expected a dict with 'score', got one with acc"),
        (openrlhf, {"scores": [1.0]}, "expected a dict with 'rewards', got one with scores"),
        (flow_grpo, ({"ocr": [1.0]}, {}), "expected a dict with 'avg', got one with ocr"),
    ],
)
def test_a_dict_without_the_score_is_a_broken_contract_not_none(adapter: Any, result: Any, said: str) -> None:
    with pytest.raises(RewardError, match=said):
        values(adapter(lambda *_, **__: result), [rollout(0, "dog", GREY)])


def logged(reward: Any, rollouts: list[Rollout]) -> tuple[dict[str, list[float]], dict[str, list[Any]]]:
    table = score(rollouts, {"foreign": reward})
    assert not table.errors
    return dict(table.metrics), dict(table.extras)


def test_what_functions_say_beside_their_scores_is_logged_as_theirs_is() -> None:
    def told(data_source: str, solution_str: str, **_: Any) -> dict[str, Any]:
        return {"score": 1.0, "acc": solution_str == "dog", "pred": solution_str}

    assert logged(verl(told), MIXED) == ({}, {"acc": [True, None, False], "pred": ["dog", None, "cat"]})
    batch = verl_batch(lambda solution_strs, **_: [told("", text) for text in solution_strs])
    assert logged(batch, MIXED) == ({}, {"acc": [True, None, False], "pred": ["dog", None, "cat"]})
    extra = {"math_accuracy": torch.tensor(0.5), "dummy": torch.tensor([1.0, 0.0]), "note": "text"}
    both = openrlhf(lambda queries, *_: {"rewards": torch.ones(len(queries)), "extra_logs": extra})
    assert logged(both, MIXED) == ({"math_accuracy": [0.5], "dummy": [0.5]}, {})

    def multi(images: torch.Tensor, prompts: list[str], metadata: Any, only_strict: bool) -> Any:
        assert only_strict is True, "as in training"
        scores = [0.25] * len(images)
        return {"avg": scores, "ocr": np.array(scores) * 2, "counting_accuracy": [-10.0] * len(images)}, {}

    assert logged(flow_grpo(multi), MIXED) == ({"reward_avg": [0.25], "reward_ocr": [0.5]}, {})


def test_verl_s_own_data_and_what_its_managers_add() -> None:
    seen: list[dict[str, Any]] = []

    def compute(data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any]) -> float:
        seen.append({"truth": ground_truth, **extra_info})
        return 1.0

    data = {"reward_model": {"style": "rule", "ground_truth": ["a", "b"]}, "extra_info": {"index": 3}}
    assert values(verl(compute), [rollout(0, "dog", answer=None, extra=data)]) == [1.0]
    assert seen[0]["truth"] == ["a", "b"] and seen[0]["index"] == 3 and seen[0]["images"] is None
    assert seen[0]["num_turns"] is None and seen[0]["rollout_reward_scores"] == {} and "log_extra" not in seen[0]


@pytest.mark.parametrize(
    ("length", "lost"), [(0, 0.0), (4, 0.0), (6, 0.0), (7, -0.25), (8, -0.5), (10, -1.0), (12, -1.5)]
)
def test_verl_s_dapo_manager_takes_from_long_texts(length: int, lost: float) -> None:
    """10 - 4 = 6 tokens are free, and the four behind them cost a quarter each."""
    reward = verl(lambda **_: 1.0, overlong=Overlong(max_resp_len=10, len=4, penalty_factor=1.0))
    table = score([rollout(0, "x" * length)], {"dapo": reward})
    assert table.values[0, 0] == 1.0 + lost and table.extras == {"overlong_reward": [lost], "overlong": [lost < 0]}
    with pytest.raises(ValueError, match="expected 0 < len <= max_resp_len, got 12 and 10"):
        Overlong(max_resp_len=10, len=12)


def test_verl_omni_s_functions_see_bytes() -> None:
    def compute_score(solution_image: torch.Tensor, ground_truth: str) -> dict[str, Any]:
        assert solution_image.dtype == torch.uint8 and solution_image.shape == (3, 4, 6)
        return {"score": float(solution_image.float().mean()), "truth": ground_truth}

    table = score(MIXED, {"omni": verl_omni(compute_score)})
    assert table.values[1:, 0].tolist() == [128.0, 255.0] and table.values[0].isnan().all()
    assert table.extras == {"truth": [None, "a dog", "what?"]}, "what is to be drawn, where the data have no truth"

    async def later(
        data_source: str, solution_image: torch.Tensor, ground_truth: str, extra_info: Any, **_: Any
    ) -> int:
        await asyncio.sleep(0)
        return len(ground_truth)

    assert values(verl_omni(later), MIXED) == [None, 5.0, 5.0]


def incompressibility(
    images: Any, prompts: list[str], metadata: list[dict[str, Any]]
) -> tuple[np.ndarray, dict[str, Any]]:
    """As flow_grpo's `jpeg_incompressibility`: a tensor [n, 3, H, W] in [0, 1] becomes NHWC bytes."""
    assert isinstance(images, torch.Tensor) and images.ndim == 4 and images.dtype == torch.float32
    arrays = (images * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy().transpose(0, 2, 3, 1)
    buffers = [io.BytesIO() for _ in arrays]
    for array, buffer in zip(arrays, buffers, strict=True):
        Image.fromarray(array).save(buffer, format="JPEG", quality=95)
    assert len(prompts) == len(metadata) == len(arrays)
    return np.array([buffer.tell() / 1000 for buffer in buffers]), {}


def test_flow_grpo() -> None:
    noise = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    rollouts = [rollout(0, None, noise), rollout(1, "text only"), rollout(2, None, GREY), rollout(3, None, 0 * noise)]
    first, second, third, fourth = values(flow_grpo(incompressibility), rollouts)
    assert second is None and first is not None and third is not None and fourth is not None and first > fourth > 0
    seen: list[dict[str, Any]] = []

    def multi(images: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> tuple[dict[str, Any], Any]:
        seen.extend(metadata)
        return {"avg": [float(image.mean()) for image in images], "ocr": [9.0] * len(images)}, {}

    data = [rollout(0, None, GREY, extra={"metadata": {"tag": "count"}, "tag": "no", "include": [1]})]
    assert values(flow_grpo(multi), data) == [0.5]
    assert seen[0]["tag"] == "count" and seen[0]["include"] == [1]


class BrightEnough:
    """As T2I-R1's `HPSv2`: loaded late, PIL images, columns of the data by name."""

    loads = 0

    @property
    def __name__(self) -> str:
        return "BrightEnough"

    def load_to_device(self, device: torch.device) -> None:
        self.loads += 1
        self.device = device

    def __call__(self, prompts: list[str], images: list[Image.Image], **columns: Any) -> list[Any]:
        assert self.device.type in ("cpu", "cuda") and len(columns["nouns"]) == len(prompts)
        assert not {"completions", "images"} & set(columns)
        return [np.float16(np.asarray(image).mean() / 255) for image in images]


def test_t2i_r1() -> None:
    function = BrightEnough()
    reward = t2i_r1(function)
    rollouts = [rollout(0, None, 2 * GREY, extra={"nouns": ["dog"]}), rollout(1, "text", extra={"nouns": []})]
    assert reward.__name__ == "BrightEnough"
    assert values(reward, rollouts) == values(reward, rollouts) == [1.0, None]
    assert values(reward, rollouts[1:]) == [None]
    assert function.loads == 1


def test_trl_shows_an_image_as_completion() -> None:
    def reward_func(prompts: list[str], completions: list[Any], solution: list[str], **columns: Any) -> list[float]:
        assert prompts == ["what?", "a dog", "what?"] and solution == ["dog", None, "dog"]
        assert [type(image) for image in columns["images"]] == [type(None), Image.Image, Image.Image]
        return [float(len(c)) if isinstance(c, str) else float(c.width) for c in completions]

    assert values(trl(reward_func), MIXED) == [3.0, 6.0, 3.0]

    async def later(**columns: Any) -> torch.Tensor:
        await asyncio.sleep(0)
        return torch.tensor([1.0, 2.0, 3.0])

    assert values(trl(later), MIXED) == [1.0, 2.0, 3.0]


def test_nan_is_none_to_trl_s_trainer_and_hooks_are_its_own() -> None:
    apart = [rollout(number, "dog") for number in range(3)]
    assert values(trl(lambda **_: [1.0, float("nan"), None]), apart) == [1.0, None, None]
    assert values(trl_chat(lambda **_: torch.tensor([1.0, math.nan, 2.0])), apart) == [1.0, None, 2.0]

    def hooked(
        completions: list[Any], log_metric: Any, log_extra: Any, trainer_state: Any, **kwargs: Any
    ) -> list[float]:
        log_metric("length", np.mean([len(text) for text in completions]))
        log_extra("first", [text[0] for text in completions])
        return [float(trainer_state.global_step)] * len(completions)

    table = score(apart, {"hooked": trl(hooked)}, state=TrainerState(global_step=4, max_steps=9))
    assert table.values[:, 0].tolist() == [4.0] * 3
    assert table.metrics == {"length": [3.0]} and table.extras == {"first": ["d"] * 3}


def test_trl_s_own_reward_reads_conversations() -> None:
    rewards = pytest.importorskip("trl.rewards")
    thought = rollout(0, "<think>\nhm\n</think>\ndog")
    assert values(trl_chat(rewards.think_format_reward), [thought, MIXED[0]]) == [1.0, 0.0]


@pytest.mark.parametrize("adapter", list(ADAPTERS.values()))
@pytest.mark.parametrize("result", [["1.0"], [1.0] * 9, "1", [[1.0]], [torch.ones(2)], object()])
def test_wrong_results_name_the_function(adapter: Any, result: Any) -> None:
    def theirs(*_: Any, **__: Any) -> Any:
        return result

    with pytest.raises(RewardError, match="theirs"):
        values(adapter(theirs), [rollout(0, "dog", GREY)])


@pytest.mark.parametrize("adapter", list(ADAPTERS.values()))
def test_none_and_tensors_pass(adapter: Any) -> None:
    both = [rollout(0, "dog", GREY), rollout(1, "cat", GREY)]
    single = adapter in (verl, verl_omni)
    assert values(adapter(lambda *_, **__: 1.0 if single else torch.tensor([1.0, 1.0])), both) == [1.0, 1.0]
    missing = adapter(lambda *_, **__: None if single else [None, None])
    assert values(missing, both) == [None, None]


def test_kinds_are_known_where_the_call_tells() -> None:
    kinds = {name: getattr(adapter(lambda *_: None), "kind", None) for name, adapter in ADAPTERS.items()}
    texts, images = (
        dict.fromkeys(["verl", "verl_batch", "openrlhf"], "text"),
        dict.fromkeys(["verl_omni", "flow_grpo", "t2i_r1"], "image"),
    )
    assert kinds == texts | images | {"trl": None, "trl_chat": None}

    def theirs(**_: Any) -> list[float]:
        return []

    theirs.kind = "image"  # type: ignore[attr-defined]
    assert getattr(trl(theirs), "kind", None) == "image" and trl(theirs).__name__ == "theirs"


def test_pictures_keep_their_pixels() -> None:
    pixels = torch.arange(24).reshape(3, 2, 4) / 255
    assert np.array_equal(np.asarray(to_picture(pixels)), (pixels * 255).round().byte().permute(1, 2, 0).numpy())
    assert to_picture(torch.full((3, 1, 1), 2.0)).getpixel((0, 0)) == (255, 255, 255)
