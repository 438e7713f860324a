"""Show-o between showlab's layout and transformers': every tensor, every derived number, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_show_o as small
import torch
from hub_files import HubFiles, hub_files
from torch import Tensor

from syncr1.engine.checkpoints.convert import convert, kind_of_checkpoint
from syncr1.engine.checkpoints.deepseek_files import RECORD, config_in
from syncr1.engine.checkpoints.published import (
    kept_conversion,
    local_checkpoint,
    published_folder,
    settings_alone,
    settings_folder,
)
from syncr1.engine.checkpoints.show_o_files import is_show_o, show_o_problems, text_beside, vq_beside
from syncr1.engine.errors import CheckpointError
from syncr1.engine.methods.convert_checks import check_conversion
from syncr1.engine.methods.hub_names import Wanted, look_up
from syncr1.engine.policies.show_o_model import ShowOConfig, ShowOForUnifiedGeneration, ShowOProcessor


def loaded(folder: Path) -> Any:
    return ShowOForUnifiedGeneration.from_pretrained(folder, use_safetensors=True)


def same(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def published_tensors(folder: Path) -> dict[str, Tensor]:
    """Of a folder that a conversion back has written."""
    from safetensors.torch import load_file

    codes = load_file(folder / "magvitv2" / "pytorch_model.safetensors")
    return load_file(folder / "pytorch_model.safetensors") | {f"vqmodel.{name}": codes[name] for name in codes}


@pytest.mark.parametrize("weights", ["bin", "safetensors"])
def test_there_and_back(tmp_path: Path, weights: str) -> None:
    before = small.publish(tmp_path / "theirs", weights=weights)
    done = convert(tmp_path / "theirs", tmp_path / "ours")
    assert (done.to, done.num_tensors, done.kept, done.lost) == ("transformers", len(before), (), ())
    ours = loaded(tmp_path / "ours")
    assert same(before, ours.state_dict())
    words = ShowOProcessor.from_pretrained(tmp_path / "ours").tokenizer
    assert words.get_vocab() == small.processor().tokenizer.get_vocab()
    expected = small.small_show_o()[0].config
    for name in ("text_rows", "mask_token_id", "image_size", "soi_token_id", "mmu_token_id", "pad_token_id"):
        assert getattr(ours.config, name) == getattr(expected, name), name
    assert ours.config.text_config.qk_layernorm and ours.config.text_config.num_attention_heads == 4
    back = convert(tmp_path / "ours", tmp_path / "back")
    assert back.to == "showlab" and len(back.kept) == sum(name.startswith("vqmodel.") for name in before)
    assert same(before, published_tensors(tmp_path / "back"))
    assert config_in(tmp_path / "back") == config_in(tmp_path / "theirs")
    again = convert(tmp_path / "back", tmp_path / "again")
    assert same(before, loaded(tmp_path / "again").state_dict()) and again.lost == ()
    record = json.loads((tmp_path / "back" / RECORD).read_text())
    assert list(record["written"]) == ["pytorch_model.safetensors"]


def test_the_network_is_the_same(tmp_path: Path) -> None:
    """Not the tensors alone: heads, positions and epsilon are what they were."""
    small.publish(tmp_path / "theirs", seed=3)
    convert(tmp_path / "theirs", tmp_path / "ours")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = small.model(small.processor().tokenizer, 3)(input_ids=ids).logits
        assert torch.equal(loaded(tmp_path / "ours")(input_ids=ids).logits, before)


def test_an_enlarged_vocabulary(tmp_path: Path) -> None:
    """UniCTokens: rows for concepts before the codes; with the enlarged tokenizer they have their words."""
    before = small.publish(tmp_path / "theirs", more=17)
    done = convert(tmp_path / "theirs", tmp_path / "ours")
    config = loaded(tmp_path / "ours").config
    tokens = len(small.processor().tokenizer)
    assert config.text_rows == tokens + 17 and config.mask_token_id == tokens + 17 + small.VQ.num_codes
    assert len(done.lost) == 1 and done.lost[0].startswith("17 rows of text have no token")
    words = small.processor().tokenizer
    words.add_tokens(["<bo>", *(f"<token_{number}>" for number in range(16))])
    words.save_pretrained(tmp_path / "words")
    done = convert(tmp_path / "theirs", tmp_path / "named", text=tmp_path / "words")
    assert done.lost == ()
    named = ShowOProcessor.from_pretrained(tmp_path / "named").tokenizer
    assert named.convert_tokens_to_ids("<bo>") == tokens
    convert(tmp_path / "named", tmp_path / "back")
    assert same(before, published_tensors(tmp_path / "back"))
    told = config_in(tmp_path / "back")
    assert told["llm_vocab_size"] + told["num_new_special_tokens"] == config.text_rows, "where their code slices codes"
    assert same(before, loaded(_converted(tmp_path / "back", tmp_path / "third")).state_dict())


def _converted(folder: Path, output: Path) -> Path:
    convert(folder, output)
    return output


def test_a_picture_of_another_side(tmp_path: Path) -> None:
    small.publish(tmp_path / "theirs", num_vq_tokens=4)
    config = loaded(_converted(tmp_path / "theirs", tmp_path / "ours")).config
    assert (config.image_size, config.num_image_tokens) == (8, 4)


def test_places_of_the_tokenizers(tmp_path: Path) -> None:
    """Beside, above, named, as a file; where the configuration says that the language model is."""
    before = small.publish(tmp_path / "a" / "theirs")
    home = tmp_path / "a"
    assert vq_beside(home / "theirs") == home / "theirs" / "magvitv2"
    for name in ("magvitv2", "phi-1_5"):
        shutil.move(home / "theirs" / name, home / name)
    assert same(before, loaded(_converted(home / "theirs", tmp_path / "above")).state_dict())
    file = shutil.move(home / "magvitv2" / "pytorch_model.bin", tmp_path / "vq.bin")
    words = shutil.move(home / "phi-1_5", tmp_path / "words")
    (home / "magvitv2" / "config.json").unlink()
    assert vq_beside(home / "theirs") is None and text_beside(home / "theirs") is None
    convert(home / "theirs", tmp_path / "named", vq=Path(file), text=Path(words))
    assert same(before, loaded(tmp_path / "named").state_dict())
    told = config_in(home / "theirs") | {"llm_model_path": str(words)}
    (home / "theirs" / "config.json").write_text(json.dumps(told))
    assert text_beside(home / "theirs") == Path(words)


def test_model_takes_the_published_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNCR1_CACHE", str(tmp_path / "cache"))
    before = small.publish(tmp_path / "theirs")
    said: list[str] = []
    with settings_alone(tmp_path / "theirs", said.append) as settings:
        assert isinstance(ShowOConfig.from_pretrained(settings), ShowOConfig)
        assert len(ShowOProcessor.from_pretrained(settings).tokenizer) == len(small.processor().tokenizer)
    assert "is in showlab's layout: a run converts it once" in said[0] and not (tmp_path / "cache").exists()
    folder = local_checkpoint(tmp_path / "theirs", said.append)
    assert same(before, loaded(folder).state_dict()) and not is_show_o(folder)
    assert local_checkpoint(tmp_path / "theirs", said.append) == folder == kept_conversion(tmp_path / "theirs")
    assert "its conversion is kept in" in said[-1]
    tensors = torch.load(tmp_path / "theirs" / "magvitv2" / "pytorch_model.bin", weights_only=True)
    tensors["decoder.conv_out.bias"] += 1
    torch.save(tensors, tmp_path / "theirs" / "magvitv2" / "pytorch_model.bin")
    assert local_checkpoint(tmp_path / "theirs", said.append) != folder, "another image tokenizer"


def test_the_command_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNCR1_CACHE", str(tmp_path / "cache"))
    small.publish(tmp_path / "theirs", beside=False)
    for attempt in (
        lambda: local_checkpoint(tmp_path / "theirs", print),
        lambda: convert(tmp_path / "theirs", tmp_path),
    ):
        with pytest.raises(CheckpointError, match=r"convert.py --model .*theirs --vq showlab/magvitv2 --tokenizer"):
            attempt()
    assert not (tmp_path / "cache" / "converted").exists() or not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubFiles]:
    """A hub with the three parts."""
    small.publish(tmp_path / "theirs")
    with hub_files() as server:
        server.use(monkeypatch, tmp_path / "hub")
        server.add("org/show-o", tmp_path / "theirs")
        server.add("org/magvitv2", tmp_path / "theirs" / "magvitv2")
        server.add("org/phi", tmp_path / "theirs" / "phi-1_5")
        server.repositories["org/phi"]["model.safetensors"] = b"nobody needs this"
        yield server


def test_parts_on_the_hub(hub: HubFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Each is fetched as far as it is used; a run without the tokenizers is told what converts it."""
    monkeypatch.setenv("SYNCR1_CACHE", str(tmp_path / "cache"))
    (problem,), _ = look_up([Wanted("model", "org/show-o")])
    assert "convert.py --model org/show-o --vq showlab/magvitv2 --tokenizer microsoft/phi-1_5" in problem
    asked = {"base": None, "output": tmp_path / "ours", "to": None}
    names = {"model": "org/show-o", "vq": "org/magvitv2", "tokenizer": "org/phi"}
    check_conversion(SimpleNamespace(**names, **asked))
    with pytest.raises(SystemExit):
        check_conversion(SimpleNamespace(**names | {"tokenizer": None}, **asked))
    assert "text tokenizer" in capsys.readouterr().err
    model, vq = (published_folder(names[part], print) for part in ("model", "vq"))
    convert(model, tmp_path / "ours", vq=vq, text=settings_folder("org/phi"))
    assert loaded(tmp_path / "ours").config.num_codes == small.VQ.num_codes
    assert hub.fetched.count("pytorch_model.bin") == 2 and "model.safetensors" not in hub.fetched
    check_conversion(SimpleNamespace(**names, **asked | {"output": tmp_path / "again"}))  # from the cache


def broken(folder: Path, part: str, change: Any) -> None:
    """Changes a dictionary of tensors in place."""
    path = folder / part / "pytorch_model.bin"
    tensors = torch.load(path, weights_only=True)
    change(tensors)
    torch.save(tensors, path)


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("", lambda held: held.pop("showo.lm_head.bias"), "1 missing"),
        ("", lambda held: held.update({"showo.other": torch.zeros(2)}), "1 unknown"),
        ("", lambda held: held.update({"showo.lm_head.bias": torch.zeros(3)}), "1 of another shape"),
        ("", lambda held: held.pop("showo.model.embed_tokens.weight"), "none called"),
        ("", lambda held: held.update({"showo.lm_head.weight": held["showo.lm_head.weight"].char()}), "quantised"),
        ("magvitv2", lambda held: held.pop("encoder.conv_in.weight"), "expected MAGVITv2"),
        ("magvitv2", lambda held: held.pop("decoder.mid.attn_1.q.bias"), "1 missing"),
    ],
)
def test_tensors_that_are_not_the_models(tmp_path: Path, part: str, change: Any, said: str) -> None:
    small.publish(tmp_path / "theirs")
    broken(tmp_path / "theirs", part, change)
    with pytest.raises(CheckpointError, match=said):
        convert(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"codebook_size": 64}, "expected codebook_size 32, .* got 64"),
        ({"num_vq_tokens": 15}, "make a square, got 32 and 15"),
        ({"llm_vocab_size": 90, "num_new_special_tokens": 10}, None),
        ({"w_clip_vit": True}, "sees through CLIP's tower"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, config: dict[str, Any], said: str | None) -> None:
    small.publish(tmp_path / "theirs", **config)
    if said is None:  # as many tokens as rows: the tokenizer is right, whatever that number says
        convert(tmp_path / "theirs", tmp_path / "ours")
        return
    with pytest.raises(CheckpointError, match=said):
        convert(tmp_path / "theirs", tmp_path / "ours")


def test_another_models_tokenizer(tmp_path: Path) -> None:
    """GPT-2's has Phi's words without its last ones: its control tokens would stand in other rows."""
    small.publish(tmp_path / "theirs")
    words = small.tokenizer()
    shutil.rmtree(tmp_path / "theirs" / "phi-1_5")
    content = json.loads(words.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    for character in "xyz":
        del vocabulary[character]
    content["model"]["vocab"] = {text: index for index, text in enumerate(vocabulary)}
    content["added_tokens"][0]["id"] = content["model"]["vocab"][small.EOS]
    words.save_pretrained(tmp_path / "theirs" / "phi-1_5")
    (tmp_path / "theirs" / "phi-1_5" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"expected the tokenizer of 97 tokens .* got one of 94 before"):
        convert(tmp_path / "theirs", tmp_path / "ours")
    longer = small.processor().tokenizer
    longer.add_tokens(["<one>", "<more>"])
    longer.save_pretrained(tmp_path / "longer")
    with pytest.raises(CheckpointError, match="at most 107 tokens"):
        convert(tmp_path / "theirs", tmp_path / "ours", text=tmp_path / "longer")


def test_problems_without_torch(tmp_path: Path) -> None:
    small.publish(tmp_path / "theirs")
    assert show_o_problems("model", tmp_path / "theirs") == [] and kind_of_checkpoint(tmp_path / "theirs")
    shutil.rmtree(tmp_path / "theirs" / "phi-1_5")
    (problem,) = show_o_problems("model", tmp_path / "theirs")
    assert "text tokenizer (phi-1_5/)" in problem and "image tokenizer" not in problem.partition("beside")[0]
    assert show_o_problems("model", tmp_path / "theirs", text="somewhere") == []
