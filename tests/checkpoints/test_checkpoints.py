"""Checkpoints in and out: nothing of them is run, dtypes and files are kept, the same weights give the same numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import PlainJanus, make_prompt, same_bits, sharp_policy, world_photo
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, GenerationConfig, JanusForConditionalGeneration

from syncr1.engine.checkpoints.merge import merge_checkpoints
from syncr1.engine.checkpoints.safetensors_stream import MappedCheckpoint
from syncr1.engine.errors import CheckpointError, ConfigError
from syncr1.engine.policies.janus import JanusPolicy

MARKER = "code_of_the_checkpoint_ran"


@pytest.fixture(scope="module")
def policy() -> JanusPolicy:
    return sharp_policy()


@pytest.fixture
def saved(policy: JanusPolicy, tmp_path: Path) -> Path:
    policy.save(tmp_path / "saved")
    return tmp_path / "saved"


@torch.no_grad()
def numbers(policy: JanusPolicy, folder: Path) -> dict[str, Tensor]:
    """Every part of the model has a say: vision tower, aligner, language model, both heads, image decoder."""
    plain = PlainJanus(policy)
    hidden = plain.hidden(plain.prompt(make_prompt("who is <bobo>?", image=world_photo(folder, 3))))
    picture = policy.draw(torch.arange(policy.num_image_tokens)[None])
    return {"text": plain.text_logits(hidden), "image": plain.image_logits(hidden), "picture": picture}


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def without_dtypes(config: Any) -> Any:
    """A config's parts say their dtype only after they were loaded with one."""
    if not isinstance(config, dict):
        return config
    return {name: without_dtypes(value) for name, value in config.items() if name != "dtype"}


def test_the_same_numbers_after_saving_and_loading(policy: JanusPolicy, saved: Path, tmp_path: Path) -> None:
    """Bitwise, twice: nothing drifts by going through disk."""
    before = numbers(policy, tmp_path)
    loaded = JanusPolicy.from_pretrained(saved).eval()
    assert same_bits(numbers(loaded, tmp_path), before)
    loaded.save(tmp_path / "again")
    assert same_bits(numbers(JanusPolicy.from_pretrained(tmp_path / "again").eval(), tmp_path), before)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()
    loaded.model.lm_head.weight.data[100] += 1
    assert not torch.equal(numbers(loaded, tmp_path)["text"], before["text"]), "the comparison sees a difference"


def test_bfloat16_in_and_out(policy: JanusPolicy, saved: Path, tmp_path: Path) -> None:
    half = JanusPolicy.from_pretrained(saved, dtype=torch.bfloat16).eval()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    half.save(tmp_path / "half")
    on_disk = {info.dtype for info in MappedCheckpoint(tmp_path / "half").tensors.values()}
    assert (
        on_disk == {torch.bfloat16}
        and json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    )
    again = JanusPolicy.from_pretrained(tmp_path / "half", dtype=torch.bfloat16).eval()
    assert same_bits(numbers(again, tmp_path), numbers(half, tmp_path))
    wide = JanusPolicy.from_pretrained(tmp_path / "half")
    for (name, a), (_, b) in zip(half.named_parameters(), wide.named_parameters(), strict=True):
        assert b.dtype == torch.float32 and torch.equal(a.float(), b), name


def test_shards_load(policy: JanusPolicy, saved: Path, tmp_path: Path) -> None:
    """As large checkpoints come; a shard that is missing is an error, not a part drawn at random."""
    policy.model.save_pretrained(tmp_path / "shards", max_shard_size="1MB")
    policy.processor.save_pretrained(tmp_path / "shards")
    shards = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    assert len(shards) > 3 and not (tmp_path / "shards" / "model.safetensors").exists()
    loaded = JanusPolicy.from_pretrained(tmp_path / "shards").eval()
    assert same_bits(numbers(loaded, tmp_path), numbers(policy, tmp_path))
    loaded.save(tmp_path / "whole")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert same_bits(whole, load_file(saved / "model.safetensors"))
    shards[1].unlink()
    with pytest.raises(ConfigError, match="safetensors"):
        JanusPolicy.from_pretrained(tmp_path / "shards")


def test_generation_settings_and_processor_are_kept(saved: Path, tmp_path: Path) -> None:
    """What other tools need to use the model: its own generation (the image start among it), template, image sizes."""
    edit(saved / "generation_config.json", lambda c: c.update(temperature=0.7, do_sample=True))
    JanusPolicy.from_pretrained(saved).save(tmp_path / "again")
    first, second = (GenerationConfig.from_pretrained(folder) for folder in (saved, tmp_path / "again"))
    assert first.temperature == 0.7 and first.to_diff_dict() == second.to_diff_dict()
    assert second.generation_kwargs == first.generation_kwargs and "boi_token_id" in second.generation_kwargs
    old, new = (AutoProcessor.from_pretrained(folder) for folder in (saved, tmp_path / "again"))
    assert old.chat_template == new.chat_template and old.num_image_tokens == new.num_image_tokens
    assert old.image_processor.to_dict() == new.image_processor.to_dict()
    assert old.tokenizer.get_vocab() == new.tokenizer.get_vocab() and old.tokenizer.boi_token == new.tokenizer.boi_token
    configs = [json.loads((folder / "config.json").read_text()) for folder in (saved, tmp_path / "again")]
    assert without_dtypes(configs[0]) == without_dtypes(configs[1])


def test_a_merge_of_policies_is_a_policy(policy: JanusPolicy, saved: Path, tmp_path: Path) -> None:
    """CoRL's last step on whole models: the result loads here and in transformers, shards or not."""
    for seed, name in enumerate(("mc", "oe")):
        trained = JanusPolicy.from_pretrained(saved)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in trained.decoder().parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
        trained.save(tmp_path / name)
    models = [tmp_path / "mc", tmp_path / "oe"]
    report = merge_checkpoints(saved, models, tmp_path / "merged", max_shard_bytes=1_000_000)
    assert report.not_in_base == () and min(report.unmoved) > 100, "heads and image parts were not trained"
    loaded = JanusPolicy.from_pretrained(tmp_path / "merged").eval()
    policies = [policy, *(JanusPolicy.from_pretrained(folder).eval() for folder in models)]
    states = [p.model.state_dict() for p in (loaded, *policies)]
    for name, value in states[0].items():
        base, one = (state[name] for state in states[1:3])
        if torch.equal(one, base):
            assert torch.equal(value, base), name
        elif value.numel() > 1000:
            # What two independent normal changes leave: inside the band their mean, the rest in full; a mean has 0.71.
            assert float((value - base).norm() / (one - base).norm()) == pytest.approx(0.94, abs=0.04), name
    assert same_bits(
        {"picture": loaded.draw(torch.zeros(1, 16, dtype=torch.long))},
        {"picture": policy.draw(torch.zeros(1, 16, dtype=torch.long))},
    )
    hf = JanusForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert torch.equal(hf.lm_head.weight, policy.model.lm_head.weight)


# Checkpoints from strangers -------------------------------------------------------------------------------------------


def test_pickled_weights_are_refused(policy: JanusPolicy, saved: Path, tmp_path: Path) -> None:
    """`pytorch_model.bin` alone is not opened: unpickling would run what is in it."""

    class Runs:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
            return open, (str(tmp_path / MARKER), "w")

    (saved / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "training_args.bin"):
        torch.save({"lm_head.weight": Runs()}, saved / name)
    with pytest.raises(ConfigError, match="safetensors"):
        JanusPolicy.from_pretrained(saved)
    with pytest.raises(CheckpointError, match="pickled"):
        MappedCheckpoint(saved)
    assert not (tmp_path / MARKER).exists()
    torch.load(saved / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / MARKER).exists(), "the trap works"


@pytest.fixture
def hostile(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose every file asks for its own code to be run, before a user who says yes to any question."""
    code = f"from pathlib import Path\nPath({str(tmp_path / MARKER)!r}).touch()\n" + "".join(
        f"\nclass {name}:\n    pass\n" for name in ("Config", "Model", "Processor", "Tokenizer", "Pictures")
    )
    (saved / "evil.py").write_text(code)
    auto_map = {
        "AutoConfig": "evil.Config",
        "AutoModel": "evil.Model",
        "AutoModelForCausalLM": "evil.Model",
        "AutoProcessor": "evil.Processor",
        "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"],
        "AutoImageProcessor": "evil.Pictures",
    }
    for path in saved.glob("*.json"):
        if path.name != "tokenizer.json":
            edit(path, lambda c: c.update(auto_map=auto_map, trust_remote_code=True))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return saved


def test_code_in_a_checkpoint_is_not_run(hostile: Path, policy: JanusPolicy, tmp_path: Path) -> None:
    """`auto_map` and `trust_remote_code` in the files change nothing: transformers' own classes read the model."""
    loaded = JanusPolicy.from_pretrained(hostile).eval()
    assert not (tmp_path / MARKER).exists()
    assert same_bits(numbers(loaded, tmp_path), numbers(policy, tmp_path))
    loaded.save(tmp_path / "again")
    merge_checkpoints(hostile, [hostile, tmp_path / "again"], tmp_path / "merged", "mean")
    JanusPolicy.from_pretrained(tmp_path / "merged")
    assert not (tmp_path / MARKER).exists()
    assert not list((tmp_path / "again").glob("*.py")) and not list((tmp_path / "merged").glob("*.py"))


UNKNOWN: dict[str, dict[str, dict[str, Any]]] = {
    "model": {"config.json": {"model_type": "evil"}},
    "processor": {"processor_config.json": {"processor_class": "Processor"}},
    "everything": {
        "config.json": {"model_type": "evil", "architectures": ["Model"]},
        "processor_config.json": {"processor_class": "Processor", "image_processor_type": "Pictures"},
        "tokenizer_config.json": {"tokenizer_class": "Tokenizer", "processor_class": "Processor"},
    },
}


@pytest.mark.parametrize("changes", UNKNOWN.values(), ids=UNKNOWN)
def test_classes_that_only_the_checkpoint_has(
    hostile: Path, tmp_path: Path, changes: dict[str, dict[str, Any]]
) -> None:
    """transformers would ask whether to run them (and take the `y` that it gets); here it may fail, but never runs."""
    for name, values in changes.items():
        edit(hostile / name, lambda c, values=values: c.update(values))
    with suppress(ValueError, OSError):
        JanusPolicy.from_pretrained(hostile)
    assert not (tmp_path / MARKER).exists()


def test_the_trap_for_code_works(hostile: Path, tmp_path: Path) -> None:
    """With remote code allowed, the same folder does run it: the tests above would see it."""
    edit(hostile / "config.json", lambda c: c.update(model_type="evil"))
    with pytest.raises(Exception):  # noqa: B017  (whatever transformers makes of the empty class)
        AutoConfig.from_pretrained(hostile, trust_remote_code=True)
    assert (tmp_path / MARKER).exists()
