"""Which half of a task a checkpoint was trained for: by its name, or noted; said, and warned of where more is asked."""

from __future__ import annotations

import json
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
from helpers import make_prompt
from small_emu3 import sharp_emu3

from syncr1.engine.errors import ConfigError
from syncr1.engine.policies.emu3 import Emu3Policy
from syncr1.engine.records import SegmentKind
from syncr1.engine.rollout.capacity import remarks_on

DRAWS, ANSWERS, CHAIN = make_prompt("draw", ("image",)), make_prompt("what?", ("text",)), make_prompt("draw it")


@pytest.mark.parametrize(
    ("name", "half"),
    [
        ("BAAI/Emu3-Gen-hf", "image"),
        ("BAAI/Emu3-Chat-hf", "text"),
        ("/data/chat/emu3_gen", "image"),
        ("models/Emu3-Chat/", "text"),
        ("C:\\models\\emu3.gen", "image"),
        ("BAAI/Emu3-Gen-hf@v1.0", "image"),
        ("~/.cache/huggingface/hub/models--BAAI--Emu3-Chat-hf/snapshots/0c5b", "text"),
        ("BAAI/Emu3-Stage1", None),
        ("runs/gen/checkpoints/last", None),
        ("emu3-gen-chat", None),
        ("generated", None),
        ("", None),
    ],
)
def test_a_name_tells_the_half(name: str, half: SegmentKind | None) -> None:
    """Whole words of its last part alone."""
    made = sharp_emu3()
    made.model.name_or_path = name
    assert Emu3Policy(made.model, made.processor).trained_for == half


def test_it_is_noted_so_that_what_is_trained_from_it_knows(tmp_path: Path) -> None:
    sharp_emu3().save(tmp_path / "Emu3-Gen-hf")
    assert "trained_for" not in json.loads((tmp_path / "Emu3-Gen-hf" / "config.json").read_text())
    first = Emu3Policy.from_pretrained(tmp_path / "Emu3-Gen-hf")
    first.save(tmp_path / "last")
    assert json.loads((tmp_path / "last" / "config.json").read_text())["trained_for"] == "image"
    for made in (Emu3Policy.from_pretrained(tmp_path / "last"), Emu3Policy.without_weights(tmp_path / "last")):
        assert made.trained_for == "image"
    assert Emu3Policy.without_weights(tmp_path / "Emu3-Gen-hf").trained_for == "image"
    config = json.loads((tmp_path / "last" / "config.json").read_text())
    (tmp_path / "last" / "config.json").write_text(json.dumps(config | {"trained_for": "video"}))
    with pytest.raises(ConfigError, match=r"expected trained_for in config.json to be 'text' or 'image', got 'video'"):
        Emu3Policy.from_pretrained(tmp_path / "last")


def test_what_is_said() -> None:
    """Of either half: which it is, and a warning where prompts ask for the other; of neither: that it is not known."""
    made = sharp_emu3()
    made.model.config.trained_for = "image"
    gen = Emu3Policy(made.model, made.processor)
    (said,) = remarks_on(gen, [DRAWS])
    assert "trained to draw; BAAI/Emu3-Chat-hf is the one to answer in text" in said
    for asked, part in ((CHAIN, "chains of both"), (ANSWERS, "that half")):
        first, warning = remarks_on(gen, [DRAWS, asked])
        assert first == said and warning.startswith(f"warning: prompts ask for {part}")
        assert "not trained to answer in text" in warning
    made.model.config.trained_for = "text"
    chat = Emu3Policy(made.model, made.processor)
    (said,) = remarks_on(chat, [ANSWERS])
    assert "trained to answer in text; BAAI/Emu3-Gen-hf is the one to draw" in said
    assert "use BAAI/Emu3-Gen-hf" in remarks_on(chat, [DRAWS])[1]
    unknown = sharp_emu3()
    (line,) = remarks_on(unknown, [CHAIN])
    assert "does not tell which it is, and these prompts ask for both" in line and '"trained_for"' in line
    assert "ask for both" not in remarks_on(unknown, [DRAWS])[0]
