"""model_card.py: a card that the hub can read, whose code runs, and that gives nothing away."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import yaml
from helpers import same_bits, sharp_policy
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from syncr1.engine.checkpoints.model_card import REDACTED, checkpoint_label, redact, write_model_card
from syncr1.engine.methods.sync_r1_config import SyncR1Config

HOME = "/" + "home/jane"  # in two, as no file of the repository may name a home
SCORES = {"rea": {"sampled": 0.25, "greedy": 0.5}, "summary": {"image": {"cnn": float("nan")}, "text": 0.75}}


def front_matter(card: Path) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n---\n\n# ", card.read_text(), re.DOTALL)
    assert found
    return yaml.safe_load(found[1])


def test_front_matter_is_what_the_hub_reads(tmp_path: Path) -> None:
    card = write_model_card(
        tmp_path, base_model="deepseek-community/Janus-Pro-1B", method="CoRL", data="mm-vl/x2x_rft_22k", license="mit"
    )
    read = ModelCard.load(card).data
    assert read.library_name == "transformers" and read.pipeline_tag == "any-to-any" and read.license == "mit"
    assert read.base_model == "deepseek-community/Janus-Pro-1B" and read.datasets == ["mm-vl/x2x_rft_22k"]
    assert "reinforcement-learning" in read.tags
    assert front_matter(card)["base_model_relation"] == "finetune"


def test_a_revision_is_said_and_is_no_part_of_the_hub_s_name(tmp_path: Path) -> None:
    card = write_model_card(tmp_path, base_model="a/base@refs/pr/1", method="CoRL", adapter=True)
    assert front_matter(card)["base_model"] == "a/base" and "from `a/base@refs/pr/1`" in card.read_text()
    assert 'from_pretrained("a/base", revision="refs/pr/1"' in card.read_text()


def test_only_names_that_the_hub_has_are_in_the_front_matter(tmp_path: Path) -> None:
    """A folder as `base_model`, or a guessed licence, would be wrong on the hub's page."""
    for base in (None, tmp_path / "w0", str(tmp_path / "w0"), "runs with spaces/x"):
        matter = front_matter(write_model_card(tmp_path, base_model=base, method="Sync-R1", data="the rendered world"))
        assert not {"base_model", "base_model_relation", "license", "datasets"} & matter.keys()


def test_a_merge_and_an_adapter_say_so(tmp_path: Path) -> None:
    card = write_model_card(tmp_path, base_model="a/base", method="gaussian merge", merged_from=["a/mc", "a/oe"])
    matter = front_matter(card)
    assert matter["base_model"] == ["a/mc", "a/oe"] and matter["base_model_relation"] == "merge"
    assert "merge" in matter["tags"] and "grpo" not in matter["tags"]
    assert "merge (gaussian merge) of `a/mc`, `a/oe`, relative to their common base `a/base`" in card.read_text()
    card = write_model_card(tmp_path, base_model="a/base", method="CoRL", adapter=True)
    matter = front_matter(card)
    assert matter["library_name"] == "peft" and matter["base_model_relation"] == "adapter"
    assert "PeftModel.from_pretrained(model, " in card.read_text()
    assert "convert.py" not in card.read_text()


def test_an_adapter_on_deepseeks_layout_says_how_its_base_is_converted(tmp_path: Path) -> None:
    (tmp_path / "janus-pro").mkdir()
    (tmp_path / "janus-pro" / "config.json").write_text('{"model_type": "multi_modality"}')
    card = write_model_card(tmp_path, base_model=tmp_path / "janus-pro", method="CoRL", adapter=True)
    assert "# transformers cannot read this base; first: python recipes/convert.py --model janus-pro " in code_of(card)
    assert 'JanusForConditionalGeneration.from_pretrained("janus", dtype="auto"' in code_of(card)


def code_of(card: Path) -> str:
    (block,) = re.findall(r"^```python\n(.*?)^```", card.read_text(), re.MULTILINE | re.DOTALL)
    return block


@pytest.mark.slow
def test_its_code_loads_the_model_as_it_is_printed(tmp_path: Path) -> None:
    """In an interpreter of its own: nothing that the card does not import is there, `engine/compat.py` least of all."""
    policy = sharp_policy()
    policy.save(tmp_path / "my model")
    card = write_model_card(tmp_path / "my model", base_model=None, method="Sync-R1", config=SyncR1Config())
    shown = "\nprint(type(model).__name__, type(processor).__name__, model.lm_head.weight.double().sum().item())"
    done = subprocess.run(
        [sys.executable, "-c", code_of(card) + shown], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"`make setup` mends a torchvision that does not fit its torch\n{done.stderr}"
    weight = policy.model.lm_head.weight.double().sum().item()
    assert done.stdout.split() == [type(policy.model).__name__, type(policy.processor).__name__, str(weight)]


def test_an_adapters_code_loads_it_onto_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base's class, then peft: the logits are the adapted policy's."""
    peft = pytest.importorskip("peft")
    policy = sharp_policy()
    policy.save(tmp_path / "base")
    tuned = peft.get_peft_model(policy.model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    card = write_model_card(tmp_path / "adapter", base_model=tmp_path / "base", method="CoRL", adapter=True)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(compile(code_of(card), "README.md", "exec"), scope)
    assert type(scope["processor"]) is type(policy.processor)
    mine, theirs = tuned.state_dict(), scope["model"].state_dict()
    assert same_bits(mine, theirs)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"architectures": []}', '{"architectures": ["x; import os"]}'])
def test_code_without_a_known_class(tmp_path: Path, content: str) -> None:
    """What stands in a config.json is not trusted to be a class."""
    (tmp_path / "config.json").write_text(content)
    assert "= AutoModelForMultimodalLM.from_pretrained" in code_of(
        write_model_card(tmp_path, base_model=None, method="x")
    )


def test_scores_before_and_after(tmp_path: Path) -> None:
    text = write_model_card(tmp_path, base_model=None, method="x", before={"rea": {"sampled": 0.125}}, after=SCORES)
    rows = [line for line in text.read_text().splitlines() if line.startswith("| ")]
    assert "| Infer what an indirect request means | sampled answer |  | – | 12.5 % | 25.0 % | +12.5 |  |" in rows
    assert "| Infer what an indirect request means | most likely answer |  | – | – | 50.0 % | – |  |" in rows
    assert "not evaluated" not in text.read_text() and "- most likely answer: the answer" in text.read_text()
    text = write_model_card(tmp_path, base_model=None, method="x")
    assert "not evaluated" in text.read_text() and "## Scores" not in text.read_text()


@dataclass(frozen=True)
class Planted:
    """Settings that somebody pasted secrets into."""

    output_dir: Path = Path(f"{HOME}/runs/first")
    data: str = "/data/jane doe/photos"
    note: str = "see /mnt/jane/notes.txt, file:///srv/jane/x.png and ~/jane/y; 50 / 2 and a/b and <think>/</think>"
    windows: str = r"C:\Users\jane\model"
    api_key: str = "short"
    judge: str = "https://jane:hunter2secret@host.example/v1?api_key=abc&n=3"
    tracker: str = "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH"
    nested: dict[str, Any] = field(default_factory=lambda: {"token": "also short", "path": Path("/opt/jane/z"), "k": 3})
    names: tuple[str, ...] = ("0a1b2c3d4e5f60718293a4b5c6d7e8f9.QwErTyUiOp12", "plain")
    long: str = "x" * 195 + " sk-proj-0123456789abcdef0123"
    table: str = "a|b `c`\n<script>"
    rate: float = 1e-6


def test_nothing_of_the_machine_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row: values of named variables, things that look like tokens, things that are named like secrets."""
    planted = {
        "HF_TOKEN": "planted-hf-value",
        "WANDB_API_KEY": "planted-wandb-value",
        "ZAI_API_KEY": "planted zai value",
    }
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVELY")
    folder = tmp_path / "planted-hf-value"
    folder.mkdir()
    text = write_model_card(
        folder,
        base_model=f"{HOME}/w0",
        method="x planted-wandb-value PASSIVELY",
        config=Planted(),
        data=f"{HOME}/planted-zai value",
        after={"planted-hf-value": {"m": 0.5}},
        merged_from=[f"{HOME}/mc/checkpoints/last", Path(f"{HOME}/oe")],
    ).read_text()
    for leak in (
        *planted.values(),
        "jane",
        "/home",
        "/mnt",
        "/srv",
        "/opt",
        "Users",
        str(tmp_path),
        "short",
        "hunter2",
        "api_key=abc",
        "abcdefghijkl",
        "0a1b2c3d",
        "QwErTy",
        "sk-proj",
        "012345",
        "<script>",
    ):
        assert leak not in text.replace("`a\\|b 'c' <script>`", ""), leak
    for kept in (
        "`first`",
        "`photos`",
        "notes.txt",
        "50 / 2 and a/b and <think>/</think>",
        "plain",
        "1e-06",
        "k: 3",
        "mc/checkpoints/last",
        "PASSIVELY",
        "host.example/v1",
        "&n=3",
        "| windows | `model` |",
    ):
        assert kept in text, kept
    assert text.count(REDACTED) >= 9


def test_a_setting_cannot_break_the_table(tmp_path: Path) -> None:
    text = write_model_card(tmp_path, base_model=None, method="x", config=Planted()).read_text()
    assert r"| table | `a\|b 'c' <script>` |" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows) and len(rows) == 13


def test_ordinary_words_are_kept() -> None:
    for text in (
        "deepseek-community/Janus-Pro-1B and mm-vl/x2x_rft_22k",
        "JanusForConditionalGeneration importance_sampling_level token",
        "skip-this-and-that-one pk risk-adjusted-0 1234567890 0.00012345678901234567890",
        "unchanged [redacted] max_completion_length: 16",
    ):
        assert redact(text) == text


@given(st.text(max_size=60), st.sampled_from(["hf_" + "aB" * 17, "sk-ant-api03-" + "x1_-" * 8, "AKIA" + "Q7" * 8]))
def test_a_token_is_found_anywhere(around: str, token: str) -> None:
    assert token not in redact(f"{around} {token} {around}") and token not in redact(f'key="{token}",{around}')


def test_redacting_a_long_text_is_fast() -> None:
    """No pattern may backtrack: a card can hold a whole prompt file."""
    for text in ("a1" * 100_000, "sk-" + "a" * 200_000, "://" + "a" * 200_000, "?" * 200_000, "eyJ" * 60_000):
        started = time.thread_time()
        assert len(redact(text)) <= len(text) + 20
        assert time.thread_time() - started < 5  # a quadratic pattern takes minutes


def test_labels() -> None:
    assert checkpoint_label("/a/b/mc/checkpoints/last/") == "mc/checkpoints/last"
    assert checkpoint_label("/a/b/w0") == "w0" and checkpoint_label("runs/x") == "x"


def test_a_card_that_is_there_is_replaced(tmp_path: Path) -> None:
    for method in ("first", "second"):
        write_model_card(tmp_path, base_model=None, method=method)
    assert "second" in (tmp_path / "README.md").read_text() and [p.name for p in tmp_path.iterdir()] == ["README.md"]
