"""Reward functions in the shapes of other codebases, called through their adapters and through `score`."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import syncr1.engine.compat  # noqa: F401  # TRL's import needs it where torchvision's wheel does not fit torch

import numpy as np
import pytest
import torch
from PIL import Image

from syncr1.engine.errors import RewardError
from syncr1.engine.records import Prompt, Rollout, Segment
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
)

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


def test_openrlhf_functions_for_one_row_are_refused_for_many() -> None:
    with pytest.raises(RewardError, match="expected 2 scores, one per row, got 1"):
        values(openrlhf(lambda *_: torch.tensor(1.0)), MIXED)
    assert values(openrlhf(lambda *_: torch.tensor(1.0)), MIXED[:1]) == [1.0]


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
    assert len(values(adapter(lambda *_, **__: 1.0 if adapter is verl else torch.tensor([1.0, 1.0])), both)) == 2
    missing = adapter(lambda *_, **__: None if adapter is verl else [None, None])
    assert values(missing, both) == [None, None]


def test_kinds_are_known_where_the_call_tells() -> None:
    kinds = {name: getattr(adapter(lambda *_: None), "kind", None) for name, adapter in ADAPTERS.items()}
    texts, images = (
        dict.fromkeys(["verl", "verl_batch", "openrlhf"], "text"),
        dict.fromkeys(["flow_grpo", "t2i_r1"], "image"),
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
