"""Prompts as the checkpoint's own processor writes them, id for id: chat template, system prompt, BOS, slots, turns."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import make_prompt, sharp_policy, world_photo
from small_emu3 import sharp_emu3
from text_models import ANSWER, BOS, END, EOS, USER, policy, tokenizer
from tokenizers.processors import TemplateProcessing
from transformers.models.janus.processing_janus import DEFAULT_SYSTEM_PROMPT

from syncr1.engine.errors import ConfigError, DataError
from syncr1.engine.pictures import PICTURE, open_picture
from syncr1.engine.policies.causal_lm import CausalLMPolicy
from syncr1.engine.policies.inputs import Inputs, checkpoint_notes
from syncr1.engine.policies.janus import JanusPolicy
from syncr1.engine.records import Prompt

TEXT = ("text",)
PUBLISHED = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|User|>: {% else %}<|Assistant|>: {% endif %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image_placeholder>\n{% else %}"
    "{{ part['text'] | trim }}{% endif %}{% endfor %}"
    "{% if m['role'] == 'user' %}{{ '\n\n' }}{% else %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>:{% endif %}"
)
"""Of the form that Janus's checkpoints have: no BOS in it, which their tokenizer adds."""
WORDS = ["who is this?", " two  spaces ", "", "line\nline", "Ünï 日本 🦊", "a <begin_of_image> b", "{{ 7 * 7 }}"]


def janus(*, template: str | None = PUBLISHED, system: bool = True, adds_bos: bool = True) -> JanusPolicy:
    """A tiny Janus whose processor is as a published one's."""
    made = sharp_policy()
    processor = made.processor
    processor.use_default_system_prompt = system
    if template is not None:
        processor.chat_template = template
    if adds_bos:
        words = processor.tokenizer
        words.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, words.bos_token_id)]
        )
    return JanusPolicy(made.model, processor)


def processed(made: Any, prompt: Prompt, **asked: Any) -> list[int]:
    """What transformers makes of the same turn: BOS is the tokenizer's matter where the template has not written it."""
    words = [{"type": "text", "text": made.escape(words)} for words in prompt.text.split(PICTURE)]
    content: list[dict[str, Any]] = [{"type": "text", "text": made.escape(prompt.text)}]
    images = {}
    if prompt.images:
        images = {"images": [open_picture(image) for image in prompt.images]}
        between = [part for word in words[1:] for part in ({"type": "image"}, word)]
        content = [words[0], *between] if between else [{"type": "image"}, *content]
    text = made.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    adds = not text.startswith(made.tokenizer.bos_token)
    # Transformers 5.12 counts 576 places whatever the model, and takes a text that is in no list apart.
    made.processor.num_image_tokens = getattr(made, "num_image_slots", 0)
    inputs = made.processor(text=[text], return_tensors="pt", add_special_tokens=adds, **images, **asked)
    return inputs["input_ids"][0].tolist()


FORMS = {
    "published": {},
    "published without a system prompt": {"system": False},
    "a template that writes BOS": {"template": None, "adds_bos": False},
    "BOS in both": {"template": None},
    "no BOS anywhere": {"adds_bos": False},
}


@pytest.mark.parametrize("form", FORMS)
def test_janus_prompts_are_the_processors(form: str, tmp_path: Path) -> None:
    """With and without a photo; the system prompt before a text, none before a drawing, whose start comes last."""
    made = janus(**FORMS[form])  # type: ignore[arg-type]
    for text in WORDS:
        for image in (None, world_photo(tmp_path, 3)):
            for segments in (TEXT, ("text", "image")):
                prompt = make_prompt(text, segments, image)
                assert made.prompt_tokens(prompt).tolist() == processed(made, prompt)
            drawn = make_prompt(text, ("image",), image)
            ids = [*made.prompt_tokens(drawn).tolist(), made.image_start]
            assert ids == processed(made, drawn, generation_mode="image")
    said = made.tokenizer.decode(made.prompt_tokens(make_prompt("x", TEXT)))
    assert (DEFAULT_SYSTEM_PROMPT.strip() in said) == FORMS[form].get("system", True)


def test_a_system_prompt_stands_once(tmp_path: Path) -> None:
    """The drawing turn and the follow-up turn are what the template adds behind an answer that has ended."""
    made, plain = janus(), janus(system=False)
    request = make_prompt("x", ("text", "image", "text"), follow_up="what is its colour?")
    turn = made.tokenizer("<|User|>: draw it\n\n<|Assistant|>:", add_special_tokens=False).input_ids
    assert made.drawing_tokens(request, "draw it").tolist() == [*turn, made.image_start]
    eoi, eos = made.tokenizer.eoi_token_id, made.tokenizer.eos_token_id
    shown = made.tokenizer.image_token * made.num_image_slots
    asked = f"<|User|>: <begin_of_image>{shown}<end_of_image>\nwhat is its colour?\n\n<|Assistant|>:"
    later = made.tokenizer(asked, add_special_tokens=False).input_ids
    assert made.follow_up_tokens(request).tolist() == [eoi, eos, *later]
    assert torch.equal(made.follow_up_tokens(request), plain.follow_up_tokens(request))


@pytest.mark.parametrize("end", ["<eos>", "<eos>\n", " <eos>", ""])
def test_a_preamble_of_the_template_stands_once(end: str) -> None:
    """A template may write one itself; where an answer's end is not written either, nothing else is lost."""
    template = f"BE KIND. {PUBLISHED.replace('<eos>', end)}"
    made = janus(template=template, system=False)
    first, later = (
        made.tokenizer.decode(ids)
        for ids in (
            made.prompt_tokens(make_prompt("draw it", TEXT)),
            made.drawing_tokens(make_prompt("x"), "draw it"),
        )
    )
    assert "BE KIND" in first and "BE KIND" not in later and "draw it" in later and "<eos>" not in later
    assert later.count("<|User|>") == 1 and "<|Assistant|>:" in later


@pytest.mark.parametrize("form", FORMS)
def test_a_drawing_beside_no_words_has_the_lengths_and_ids_of_transformers(form: str) -> None:
    """`pads`: every token but BOS and the start, of the generation configuration where the tokenizer has others."""
    made = janus(**FORMS[form])  # type: ignore[arg-type]
    generation = made.model.generation_config
    generation.pad_token_id = 7
    ids = torch.tensor([*made.prompt_tokens(make_prompt("draw it", ("image",))).tolist(), made.image_start])
    kept = (ids == generation.bos_token_id) | (ids == generation.generation_kwargs["boi_token_id"])
    assert torch.equal(made.unconditional_tokens(len(ids)), torch.where(kept, ids, 7))
    generation.pad_token_id = made.tokenizer.pad_token = None
    ends = sorted(made.end_tokens)
    first = ids[0] if form != "no BOS anywhere" else ends[0]
    assert made.unconditional_tokens(5).tolist() == [first, *[ends[0]] * 3, made.image_start]


def test_two_pictures_stand_in_place(tmp_path: Path) -> None:
    """Of Janus and Emu3, as their processors have the same parts."""
    photos = (world_photo(tmp_path, 3), world_photo(tmp_path, 4))
    emu3 = sharp_emu3()
    emu3.processor.chat_template = EMU3_TEMPLATE
    for made in (janus(), emu3):
        for text in ("is <image> left of <image> or not", "how is <image> unlike <image>and what of it?"):
            prompt = replace(make_prompt(text, TEXT), images=photos)
            ids, ours = processed(made, prompt), made.prompt_tokens(prompt)
            start = made.tokenizer.bos_token_id
            assert [i for i in ours.tolist() if i != start] == [i for i in ids if i != start]
            seen = made.see(made.load_images(photos))
            assert int(made.image_slots(ours).sum()) == seen.shape[0] * seen.shape[1]
        for text, count in (("<image> alone", 1), ("none", 0), ("<image><image><image>", 3)):
            with pytest.raises(DataError, match=f"as many signs <image> in the text as pictures, got {count} and 2"):
                made.prompt_tokens(replace(make_prompt(text, TEXT), images=photos))


EMU3_TEMPLATE = (
    "You are a helpful assistant. {% for m in messages %}{{ m['role'].upper() }}: {% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if m['role'] == 'assistant' %}<|extra_204|>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@pytest.mark.parametrize("bos", ["", "<|extra_203|>"])
def test_emu3_prompts_are_the_processors(bos: str, tmp_path: Path) -> None:
    """BOS once, whoever writes it; a preamble once; a drawing is asked for bare, with size and wrapper behind it."""
    made = sharp_emu3()
    made.processor.chat_template = bos + EMU3_TEMPLATE
    for text in ("what is the colour?", "", "a <image> b", "<|extra_203|>draw"):
        for image in (None, world_photo(tmp_path, 3)):
            prompt = make_prompt(text, TEXT, image)
            ids = processed(made, prompt)
            # Transformers 5.12 leaves BOS out of texts alone, 5.23 writes two where the template has one.
            start = made.tokenizer.bos_token_id
            while ids[0] == start:
                ids = ids[1:]
            assert made.prompt_tokens(prompt).tolist() == [start, *ids]
        drawn = make_prompt(text, ("image",))
        words = made.processor(text=made.escape(text), return_for_image_generation=True, image_area=32 * 32)
        ids = words["input_ids"][0]
        assert [*made.prompt_tokens(drawn).tolist(), made.image_start] == ids[: ids.index(made.image_start) + 1]
    later = made.tokenizer.decode(made.follow_up_tokens(make_prompt("x", ("image", "text"), follow_up="where?")))
    assert later.endswith("<|extra_204|>USER: where? ASSISTANT:") and "helpful" not in later


DATED = (
    "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "Today is {{ date_string }}.{% for m in messages %}{{ '<|user|>' if m['role'] == 'user' else '<|answer|>' }}"
    "{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|answer|>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)
ARGUED = "{% if mood is not defined %}{{ raise_exception('mood is missing') }}{% endif %}" + DATED


@pytest.mark.parametrize("template", [DATED, ARGUED])
def test_arguments_reach_the_template(template: str) -> None:
    """As transformers passes them; one that is missing is named, with the flag that gives it."""
    given = ("date_string=26 Jul 2024", "enable_thinking=false", "mood=calm")
    made = Inputs(chat_template_kwargs=given).given_to(policy(template=template))
    turns = [{"role": "user", "content": "red?"}]
    arguments = {"date_string": "26 Jul 2024", "enable_thinking": False, "mood": "calm"}
    expected = made.tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=True, **arguments
    ).input_ids
    assert made.prompt_tokens(make_prompt("red?", TEXT)).tolist() == expected
    assert "Today is 26 Jul 2024." in made.tokenizer.decode(expected)
    assert made.text_tokens("x")[-1] == made.tokenizer.convert_tokens_to_ids(END)
    bare = policy(template=template)
    if template == ARGUED:
        with pytest.raises(ConfigError, match=r"chat template fails .*mood is missing.*--chat_template_kwargs NAME=V"):
            bare.prompt_tokens(make_prompt("red?", TEXT))
    assert any("today's date" in note for note in checkpoint_notes(bare))
    told = checkpoint_notes(made)
    assert [note.partition(":")[0] for note in told] == ["its chat template reads no mood"] * (template != ARGUED)


def test_an_argument_that_the_template_does_not_read_is_told() -> None:
    made = Inputs(chat_template_kwargs=("enable_thinking=false", "think=true")).given_to(policy())
    (note,) = checkpoint_notes(made)
    assert note.startswith("its chat template reads no enable_thinking, think:")


def test_without_a_template_the_tokenizer_decides() -> None:
    """Of BOS and whatever else it adds; a text model without either still has a first token."""
    made = policy(template=None)
    assert made.prompt_tokens(make_prompt("red", TEXT)).tolist() == made.tokenizer("red").input_ids
    words = tokenizer(template=None)
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, 1), (EOS, 2)]
    )
    adding = CausalLMPolicy(copy.deepcopy(made.model), words)
    ids = adding.prompt_tokens(make_prompt("red", TEXT)).tolist()
    assert ids == words("red").input_ids and ids[0] == 1 and ids[-1] == 2
    assert {USER, ANSWER} <= set(made.tokenizer.get_vocab())


def test_what_a_checkpoint_samples_with_is_told() -> None:
    """And not taken."""
    made = policy()
    assert checkpoint_notes(made) == []
    generation = made.model.generation_config
    generation.temperature, generation.top_p, generation.top_k = 0.6, 0.95, 20
    (note,) = checkpoint_notes(made)
    assert note == (
        "its generation_config.json samples with temperature 0.6, top_k 20, top_p 0.95; this run with its own settings"
    )
