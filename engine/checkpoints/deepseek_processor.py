"""DeepSeek's tokenizer and processor files of Janus and transformers', both ways.

    tokenizer.json            taken as it is, but for BOS and EOS: LlamaTokenizerFast, which reads the file there, puts
                              them in front and behind by `add_bos_token` and `add_eos_token` and not by the file; here
                              the file says it. (DeepSeek's first release had that wrong, and guidance did not work.)
    VLMImageProcessor         transformers' JanusImageProcessor: size, mean, deviation, scale and least size
    sft_format                the chat template: `<|User|>: … \\n\\n<|Assistant|>:` where `<|User|>` is a token, as in
                              Janus-Pro; `User: …\\n\\nAssistant:` where it is not, as Janus-1.3B was trained
    system prompt             `use_default_system_prompt`: in front of questions, not in front of what is to be drawn

No counterpart: `mask_prompt` and `ignore_id`, which the original's own training read.

Source: janus/models/processing_vlm.py, image_processing_vlm.py, janus/utils/conversation.py of
github.com/deepseek-ai/Janus; what transformers' convert_janus_weights_to_hf.py writes.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

from transformers import GenerationConfig, JanusImageProcessor, JanusProcessor, PreTrainedTokenizerFast

from ..errors import CheckpointError

TAGS = {
    "image_tag": "<image_placeholder>",
    "image_start_tag": "<begin_of_image>",
    "image_end_tag": "<end_of_image>",
    "pad_tag": "<｜▁pad▁｜>",
}
"""VLChatProcessor's defaults."""
SFT_FORMATS = ("deepseek", "deepseek_old")
END_OF_TURN = "<｜end▁of▁sentence｜>"
GUIDANCE = 5
"""`cfg_weight` of DeepSeek's own script; transformers' converter writes it as `guidance_scale`."""
_LLAMA_ONLY = ("add_bos_token", "add_eos_token", "legacy", "sp_model_kwargs", "use_default_system_prompt", "auto_map")
_PICTURE = ("do_normalize", "image_mean", "image_std", "min_size", "rescale_factor")
_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set role = message['role'] | lower -%}"
    "{%- set answers = role == 'assistant' -%}"
    "{{- '@USER: ' if role == 'user' else '@ASSISTANT:' if answers else message['role'].capitalize() + ': ' -}}"
    "{%- set parts = message['content'] -%}"
    "{%- set opens = answers and loop.last and not add_generation_prompt"
    " and parts[0]['type'] == 'text' and parts[0]['text'] == '' -%}"
    "{{- ' ' if answers and not opens else '' -}}"
    "{%- for part in parts -%}"
    "{%- if part['type'] == 'image' -%}"
    "{{- ('' if loop.first else '\\n') + '@IMAGE' + ('' if loop.last else '\\n') -}}"
    "{%- elif part['type'] == 'text' -%}"
    "{%- set text = part['text'].lstrip() if loop.first else part['text'] -%}"
    "{%- set text = text.rstrip() if loop.last else text -%}"
    "{{- (' ' if not loop.first and parts[loop.index0 - 1]['type'] == 'text' else '') + text -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if not loop.last or add_generation_prompt -%}"
    "{{- '\\n\\n' if role == 'user' else '@END' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '@ASSISTANT:' -}}{%- endif -%}"
)


def chat_template(tokens: Mapping[str, int], image_tag: str = TAGS["image_tag"]) -> str:
    """DeepSeek's conversation format as a template of transformers'; `tokens` is the tokenizer's vocabulary."""
    user, assistant = ("<|User|>", "<|Assistant|>") if "<|User|>" in tokens else ("User", "Assistant")
    template = _TEMPLATE.replace("@USER", user).replace("@ASSISTANT", assistant)
    return template.replace("@IMAGE", image_tag).replace("@END", END_OF_TURN)


def processor_to_ours(folder: Path, image_size: int, num_slots: int) -> JanusProcessor:
    """transformers' processor of a DeepSeek folder.

    Args:
        image_size: pixels that the vision tower takes.
        num_slots: places that one picture has in a prompt.

    Raises:
        CheckpointError: a file that is missing, or something in one that transformers' Janus has no place for.
    """
    picture, settings = _json(folder, "preprocessor_config.json"), _json(folder, "processor_config.json", {})
    tags = {name: str(settings.get(name, default)) for name, default in TAGS.items()}
    sft = settings.get("sft_format", "deepseek")
    if sft not in SFT_FORMATS:
        raise CheckpointError(_none(folder, "processor_config.json", f"sft_format {sft!r}", " or ".join(SFT_FORMATS)))
    if settings.get("add_special_token"):
        raise CheckpointError(_none(folder, "processor_config.json", "add_special_token true", "false"))
    if picture.get("image_size", image_size) != image_size:
        got = f"image_size {picture['image_size']}"
        raise CheckpointError(_none(folder, "preprocessor_config.json", got, f"{image_size}, the vision tower's"))
    tokenizer = _tokenizer(folder, tags)
    pictures = JanusImageProcessor(
        size={"height": image_size, "width": image_size},
        **{name: picture[name] for name in _PICTURE if name in picture},
    )
    template = chat_template(tokenizer.get_vocab(), tags["image_tag"])
    return JanusProcessor(
        pictures, tokenizer, chat_template=template, use_default_system_prompt=True, num_image_tokens=num_slots
    )


def _none(folder: Path, file: str, got: str, wanted: str) -> str:
    return f"{folder / file}: expected {wanted}, got {got}; transformers' Janus has no counterpart, correct it there"


def _json(folder: Path, name: str, absent: dict[str, Any] | None = None) -> dict[str, Any]:
    path = folder / name
    if absent is not None and not path.is_file():
        return absent
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: expected DeepSeek's file of that name, got none or no JSON; download it"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected an object of settings, got {type(found).__name__}; download it again")
    return found


def _tokenizer(folder: Path, tags: Mapping[str, str]) -> PreTrainedTokenizerFast:
    content, settings = _json(folder, "tokenizer.json"), _json(folder, "tokenizer_config.json")
    special = {**_json(folder, "special_tokens_map.json", {}), **settings}
    ids = {str(token.get("content")): token.get("id") for token in content.get("added_tokens", ())}
    ids |= content.get("model", {}).get("vocab", {}) if isinstance(content.get("model"), dict) else {}
    for tag in ("image_start_tag", "image_end_tag"):
        if tags[tag] not in ids:
            raise CheckpointError(
                f"{folder / 'tokenizer.json'}: expected the token {tags[tag]}, got none; without it no image can be "
                "drawn or shown, download the file again"
            )
    bos, eos = (_text(special.get(f"{name}_token")) for name in ("bos", "eos"))
    if bos not in ids or eos not in ids:
        raise CheckpointError(
            f"{folder}: expected bos_token and eos_token of the tokenizer, got {bos}, {eos}; add them"
        )
    front = [(bos, ids[bos])] if special.get("add_bos_token", True) else []  # LlamaTokenizerFast's defaults
    behind = [(eos, ids[eos])] if special.get("add_eos_token", False) else []
    content["post_processor"] = _frame(front, behind)
    kept = {name: value for name, value in settings.items() if name not in _LLAMA_ONLY}
    kept |= {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    kept |= {"pad_token": tags["pad_tag"] if tags["pad_tag"] in ids else _text(special.get("pad_token")) or eos}
    kept |= {"padding_side": "left", "unk_token": _text(special.get("unk_token"))}
    named = {"image_token": tags["image_tag"], "boi_token": tags["image_start_tag"], "eoi_token": tags["image_end_tag"]}
    for name in ("chat_template", "processor_class"):
        kept.pop(name, None)
    with tempfile.TemporaryDirectory() as draft:
        (Path(draft) / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        (Path(draft) / "tokenizer_config.json").write_text(json.dumps(kept, ensure_ascii=False), encoding="utf-8")
        return PreTrainedTokenizerFast.from_pretrained(draft, extra_special_tokens=named)


def _text(token: Any) -> str | None:
    """A special token, which is a text or an object with one."""
    return token.get("content") if isinstance(token, Mapping) else token


def _frame(front: list[tuple[Any, Any]], behind: list[tuple[Any, Any]]) -> dict[str, Any]:
    """A post-processor that puts tokens before and behind every text."""
    pieces = {
        str(token): {"id": str(token), "ids": [number], "tokens": [str(token)]} for token, number in front + behind
    }

    def around(name: str, kind: int) -> list[dict[str, Any]]:
        before = [{"SpecialToken": {"id": str(token), "type_id": kind}} for token, _ in front]
        after = [{"SpecialToken": {"id": str(token), "type_id": kind}} for token, _ in behind]
        return [*before, {"Sequence": {"id": name, "type_id": kind}}, *after]

    single, pair = around("A", 0), [*around("A", 0), *around("B", 1)]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": pieces}


def generation_of(processor: JanusProcessor) -> GenerationConfig:
    """What transformers' converter writes, and the start of an image where its `generate` looks for it."""
    tokenizer = processor.tokenizer
    start = tokenizer.convert_tokens_to_ids(tokenizer.boi_token)
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        temperature=1.0,
        guidance_scale=GUIDANCE,
        boi_token_id=start,
        generation_kwargs={"boi_token_id": start},
    )


def processor_to_theirs(processor: JanusProcessor, folder: Path, num_slots: int) -> list[str]:
    """Writes DeepSeek's files of a processor of transformers'; returns, in words, what has no counterpart there.

    Args:
        num_slots: places that one picture has in a prompt; the processor's own count is 576 before transformers 5.14.
    """
    tokenizer, pictures = processor.tokenizer, processor.image_processor
    vocabulary, lost = tokenizer.get_vocab(), []
    size = pictures.size["height"]
    picture = {name: getattr(pictures, name) for name in _PICTURE}
    picture |= {name: list(picture[name]) for name in ("image_mean", "image_std")}
    picture |= {"image_size": size, "background_color": list(pictures.background_color)}
    picture |= {"image_processor_type": "VLMImageProcessor", "processor_class": "VLChatProcessor"}
    tags = {
        "image_tag": tokenizer.image_token,
        "image_start_tag": tokenizer.boi_token,
        "image_end_tag": tokenizer.eoi_token,
        "pad_tag": tokenizer.pad_token,
    }
    settings = {"add_special_token": False, "ignore_id": -100, "mask_prompt": True, "sft_format": SFT_FORMATS[0]}
    settings |= {"num_image_tokens": num_slots, "processor_class": "VLChatProcessor", **tags}
    if not _same_format(processor, chat_template(vocabulary, tags["image_tag"])):
        lost.append("chat template: not DeepSeek's conversation format, by which its code makes prompts")
    if not processor.use_default_system_prompt:
        lost.append("use_default_system_prompt false: DeepSeek's code puts its system prompt before every question")
    words = {"tokenizer_class": "LlamaTokenizerFast", "legacy": True, "model_max_length": tokenizer.model_max_length}
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    words |= {"add_bos_token": ids[0] == tokenizer.bos_token_id, "add_eos_token": ids[-1] == tokenizer.eos_token_id}
    words |= {f"{name}_token": getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "pad", "unk")}
    words |= {"clean_up_tokenization_spaces": False, "sp_model_kwargs": {}}
    special = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
    more = [token.content for token in special if token.content not in words.values()]
    words["additional_special_tokens"] = more
    mapped = {f"{name}_token": words[f"{name}_token"] for name in ("bos", "eos", "pad")}
    mapped["additional_special_tokens"] = more
    files = {"preprocessor_config": picture, "processor_config": settings, "tokenizer_config": words}
    for name, content in {**files, "special_tokens_map": mapped}.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    with tempfile.TemporaryDirectory() as draft:
        tokenizer.save_pretrained(draft)
        shutil.copyfile(Path(draft) / "tokenizer.json", folder / "tokenizer.json")
    return lost


def _same_format(processor: JanusProcessor, template: str) -> bool:
    """Whether two templates write the same conversations, a question about a picture and an answer among them."""
    shown = [{"type": "image"}, {"type": "text", "text": " What? "}]
    asked: list[dict[str, Any]] = [{"role": "user", "content": shown}]
    asked += [{"role": "assistant", "content": [{"type": "text", "text": "This."}]}]
    asked += [{"role": "user", "content": [{"type": "text", "text": "Draw it"}]}]
    own, theirs = (
        processor.apply_chat_template(asked, chat_template=one, add_generation_prompt=True)
        for one in (processor.chat_template, template)
    )
    return own == theirs
