"""sync_r1_parts.py: rewards from a user's own CLIP and judge, in place of what is embedded."""

from __future__ import annotations

import json
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import sharp_policy
from judge_server import JudgeServer, reds
from PIL import Image
from skimage import data
from small_models import saved, small_clip

from syncr1.engine.errors import ConfigError
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.methods.sync_r1_parts import build_reward_set
from syncr1.engine.records import Prompt, Rollout
from syncr1.engine.rewards.builtin.clip import ClipScorer
from syncr1.engine.rewards.preview_scorer import build_preview
from syncr1.engine.rewards.scoring import score


def drawing(prompt: Prompt, member: int, red: float) -> Rollout:
    image = torch.zeros(3, 32, 32)
    image[0] = red
    return Rollout(
        prompt=prompt, member=member, prompt_tokens=torch.zeros(0), prompt_image=None, segments=(), image=image
    )


def test_clip_and_a_remote_judge_take_their_places(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    photo, clip, server = tmp_path / "cat.png", saved(small_clip, tmp_path_factory), JudgeServer()
    Image.fromarray(data.cat()).save(photo)
    server.answer = lambda content, _: (200, json.dumps(reds(content)[1:]))  # the photo comes first
    prompt = Prompt(id="a", task="pure_gen", text="draw it", segments=("image",), target="it", references=(photo,))
    config = SyncR1Config(clip=str(clip), judge_url=server.url, judge_model="judge-1")
    rewards = build_reward_set(config, sharp_policy(), [prompt])
    rollouts = [drawing(prompt, member, red) for member, red in enumerate((0.0, 0.4, 1.0))]
    table = score(rollouts, rewards.functions)
    assert rewards.names == ("identity", "judge", "text") and not any(table.failures.values())
    torch.testing.assert_close(table.values[:, 1], torch.tensor([0.0, 0.4, 1.0]), atol=0.01, rtol=0)
    cosines = ClipScorer.from_pretrained(clip).clip_i([r.image for r in rollouts if r.image is not None], [[photo]] * 3)
    expected = [max(0.0, 2 * ((cosine or 0.0) - 0.5)) for cosine in cosines]
    torch.testing.assert_close(
        table.values[:, 0], torch.tensor(expected), atol=0.02, rtol=0
    )  # photos are cropped there
    preview = build_preview(config, rewards)
    asked = len(server.calls)
    assert preview is not None
    preview.score([prompt], [""], torch.rand(1, 3, 32, 32))
    assert len(server.calls) == asked, "a preview asks no remote judge"


def test_half_a_judge_is_refused() -> None:
    with pytest.raises(ConfigError, match="judge_model"):
        SyncR1Config(judge_url="http://127.0.0.1:1/v1")
