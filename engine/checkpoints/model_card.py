"""The README.md of a saved model: front matter as the Hugging Face hub reads it, how to load, settings, scores.

A card is published, so it holds neither what identifies a machine nor what opens an account: paths are cut to their
last name, and what looks like a token, or is the value of an environment variable that is named like one, is left out.
Imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..policies.kinds import is_liquid_folder
from ..show.names import INTERVALS
from ..show.scores import Scores, measures_in, score_rows, show_change, show_interval, show_score
from ..whole_files import write_atomically
from .deepseek_files import is_theirs
from .hub_cache import snapshots

CARD = "README.md"
REDACTED = "[redacted]"
ANY_MODEL = "AutoModelForMultimodalLM"
TEXT_ONLY = "ForCausalLM"
"""How transformers' classes of text decoders end."""
MAX_VALUE = 200
"""Characters of a setting's value that are shown."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_SECRET_NAME = re.compile(r"(?:token|secret|passw\w*|(?:api|access|private)_?key|credentials?)$", re.IGNORECASE)
_SECRET_ENVIRONMENT = re.compile(
    r"(?:^|_)(?:(?:API)?KEY|TOKEN|PAT|SECRET|PASS(?:WORD|WD)?|CREDENTIALS?|AUTH|COOKIE)(?:_|$)", re.IGNORECASE
)
_SECRETS = re.compile(
    r"""(?<![A-Za-z0-9])(?:
        (?:hf_|api_org_)[A-Za-z0-9]{16,}
      | (?:gh[pousr]|github_pat|glpat|xox[abeprs]|sk|pk|rk|wandb_v1|nvapi|pypi|npm)[_-](?=[\w.-]*[0-9])[\w.-]{12,}
      | (?:AKIA|ASIA)[A-Z0-9]{16} | AIza[\w-]{30,} | eyJ[\w-]{8,}\.[\w.-]{8,}
      | (?=[A-Za-z]*[0-9])(?=[0-9]*[A-Za-z])[A-Za-z0-9]{32,}(?:\.[A-Za-z0-9]{8,})?
    )(?![A-Za-z0-9])
    | (?<=://)[^\s/@]+@
    | (?<=[?&])[\w-]*(?:key|token|secret|sig|signature|password)=[^&\s`]+
    | \bBearer\s+[^\s`]+""",
    re.VERBOSE | re.IGNORECASE,
)
_PATH = re.compile(r"(?:file://|(?<![\w<:/.~\\]))(?:~|[A-Za-z]:)?[/\\][\w.@+-][^\s'\",;|()\[\]]*")
_STARTS_A_PATH = re.compile(r"(?:file://|~|[A-Za-z]:)?[/\\][\w.@+-]")


def write_model_card(
    folder: str | Path,
    *,
    base_model: str | Path | None,
    method: str,
    config: Any = None,
    data: str | Path | None = None,
    before: Scores | None = None,
    after: Scores | None = None,
    merged_from: Sequence[str | Path] | None = None,
    adapter: bool = False,
    license: str | None = None,
    base_words: str = "weights drawn at random",
    title: str | None = None,
) -> Path:
    """Writes README.md into a saved model's folder, over one that is there, and returns its path.

    Args:
        folder: the model's; its config.json names the class that loads it.
        base_model: hub name or folder that training, or a merge, started from; None: what `base_words` says.
        method: what was done, in a few words: `Sync-R1`, `gaussian merge`.
        config: any dataclass of settings; shown as a table.
        data: hub name or folder of the training data, or a few words.
        before, after: scores as `engine/show/scores.py` takes them; None: not evaluated.
        merged_from: the models of a merge.
        adapter: the folder holds a peft adapter, not whole weights.
        license: a licence's identifier on the hub, where it is known; the base's usually binds.
        base_words: a base that has no name.
        title: the model's name; None: its folder's.
    """
    folder = Path(folder)
    title = title or checkpoint_label(folder)
    described = Path(base_model or folder) if adapter else folder
    model_class = _model_class(described)
    draws = not model_class.endswith(TEXT_ONLY) or is_liquid_folder(described)
    matter = _front_matter(base_model, data, merged_from, adapter, license, draws)
    sections = [
        f"# {_plain(title)}",
        _summary(base_model, method, data, merged_from, adapter, draws, base_words),
        _loading(folder, model_class, base_model, adapter),
        _score_section(before, after),
        _settings_section(config),
        _limits(before, after),
    ]
    body = "\n\n".join(section for section in sections if section)
    text = f"---\n{matter}\n---\n\n{body}\n"
    path = folder / CARD
    write_atomically(path, redact(text))
    return path


def checkpoint_label(folder: str | Path) -> str:
    """A checkpoint's name without the path to it; `run/checkpoints/last` for one in a run's folder.

    >>> checkpoint_label("/data/runs/mc/checkpoints/last"), checkpoint_label("/data/Janus-Pro-1B/")
    ('mc/checkpoints/last', 'Janus-Pro-1B')
    """
    parts = Path(os.path.abspath(folder)).parts
    keep = 3 if len(parts) > 3 and parts[-2] == "checkpoints" else 1
    return "/".join(parts[-keep:])


def redact(text: str) -> str:
    """`text` without tokens, passwords in addresses, and values of environment variables named like secrets."""
    planted = [value for name, value in os.environ.items() if _SECRET_ENVIRONMENT.search(name) and len(value) >= 8]
    for value in sorted(planted, key=len, reverse=True):
        text = text.replace(value, REDACTED)
    return _SECRETS.sub(REDACTED, text)


def model_name(model: str | Path) -> str:
    """A hub name as it is, with its revision; a folder's own name."""
    return str(model) if _repository(model) else checkpoint_label(model)


def _repository(model: str | Path | None) -> str:
    """Of a hub name, without its revision; empty for all else."""
    name = model.partition("@")[0] if isinstance(model, str) else ""
    return name if is_hub_name(name) else ""


def is_hub_name(name: str | Path | None) -> bool:
    """`organisation/name` is one, unless a folder `organisation` is here: then it is a path."""
    return isinstance(name, str) and bool(_HUB_NAME.fullmatch(name)) and not os.path.isdir(Path(name).parent)


def _front_matter(
    base_model: str | Path | None,
    data: str | Path | None,
    merged_from: Sequence[str | Path] | None,
    adapter: bool,
    license: str | None,
    draws: bool,
) -> str:
    """YAML of what the hub knows; names that it does not have (folders) would make its page fail, so they stay out.

    Scores stand in the text alone: the hub's `EvalResult` wants the hub's name of a data set, and these are of the
    run's own prompts.
    """
    from huggingface_hub import ModelCardData

    origins: Sequence[str | Path | None] = merged_from or [base_model]
    parents = [name for model in origins if (name := _repository(model))]
    relation = "merge" if merged_from else "adapter" if adapter else "finetune"
    tags = ["merge"] if merged_from else ["grpo", "reinforcement-learning"]
    matter = ModelCardData(
        library_name="peft" if adapter else "transformers",
        license=license,
        base_model=parents[0] if len(parents) == 1 else parents or None,
        base_model_relation=relation if parents else None,
        datasets=[str(data)] if is_hub_name(data) else None,
        pipeline_tag="any-to-any" if draws else "text-generation",
        tags=["syncr1", *(["multimodal", "text-to-image", "image-text-to-text"] if draws else []), *tags],
    )
    return matter.to_yaml(original_order=["library_name", "license", "base_model", "base_model_relation"])


def _summary(
    base_model: str | Path | None,
    method: str,
    data: str | Path | None,
    merged_from: Sequence[str | Path] | None,
    adapter: bool,
    draws: bool,
    base_words: str,
) -> str:
    """What it is, in one paragraph."""
    base = _plain(base_words) if base_model is None else _code(model_name(base_model))
    if merged_from:
        models = ", ".join(_code(model_name(model)) for model in merged_from)
        words = f"A merge ({_plain(method)}) of {models}, relative to their common base {base}."
    else:
        kind = "A unified multimodal model, it answers and draws" if draws else "A language model"
        words = f"{kind}; trained with {_plain(method)} from {base}."
    if adapter:
        words += " This folder holds an adapter: the base's weights are needed as well."
    if data is not None:
        shown = str(data) if is_hub_name(data) else _without_paths(str(data))
        words += f" Training data: {_code(shown)}."
    return words


def _loading(folder: Path, model_class: str, base_model: str | Path | None, adapter: bool) -> str:
    own = json.dumps(folder.absolute().name)
    name, known = model_name(base_model or "base"), _repository(base_model)
    revision = name.removeprefix(f"{known}@") if known and name != known else ""
    base = json.dumps(known or name) + (f", revision={json.dumps(revision)}" if revision else "")
    lines = [f"from transformers import AutoProcessor, {model_class}", ""]
    if model_class == "ShowOForUnifiedGeneration":  # which transformers does not have
        lines = [
            f"from transformers import AutoProcessor\nfrom syncr1.engine.policies.show_o_model import {model_class}",
            "",
        ]
    if adapter and _in_deepseeks_layout(base_model):
        base = '"janus"'
        lines.insert(
            0, f"# transformers cannot read this base; first: python recipes/convert.py --model {name} --output janus"
        )
    if adapter:
        lines[-2] = f"from peft import PeftModel\n{lines[-2]}"
        lines += [f'model = {model_class}.from_pretrained({base}, dtype="auto", use_safetensors=True)']
        lines += [f"model = PeftModel.from_pretrained(model, {own})"]
    else:
        lines += [f'model = {model_class}.from_pretrained({own}, dtype="auto", use_safetensors=True)']
    lines += [f"processor = AutoProcessor.from_pretrained({base if adapter else own}, trust_remote_code=False)"]
    where = "The names are folders in the working directory, or names on the hub. No code of the checkpoint is run."
    return "\n".join(["## Loading", "", "```python", *lines, "```", "", where])


def _in_deepseeks_layout(model: str | Path | None) -> bool:
    """Whether a folder is, or a hub name that was fetched."""
    if model is None:
        return False
    folders = snapshots(str(model), "model") if _repository(model) else [Path(model)]
    return any(is_theirs(folder) for folder in folders)


def _model_class(folder: Path) -> str:
    """The class that wrote config.json; the one that transformers picks where it does not say."""
    if is_theirs(folder):
        return "JanusForConditionalGeneration"  # of what it is converted into
    try:
        names = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
        name = str(names[0])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return ANY_MODEL
    return name if name.isidentifier() else ANY_MODEL


def _score_section(before: Scores | None, after: Scores | None) -> str:
    rows = score_rows(before, after)
    if not rows:
        return ""
    lines = ["## Scores", "", f"On held-out items, which training never saw; changes of shares in points; {INTERVALS}."]
    lines += [
        "",
        "| task | measure | unit | items | before | after | change | |",
        "|---|---|---|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        sides = ((row.before, row.before_interval), (row.after, row.after_interval))
        old, new = (f"{show_score(value, row.unit)} {show_interval(interval, row.unit)}" for value, interval in sides)
        change = f"{show_change(row)} {show_interval(row.change_interval, row.unit, signed=True)}"
        items = str(row.num_items or "–")
        cells = (row.label, row.measure, row.unit, items, old, new, change, ", ".join(row.marks))
        lines.append("| " + " | ".join(_plain(cell) for cell in cells) + " |")
    words = [f"- {name}: {meaning}" for name, meaning in measures_in(rows).items()]
    return "\n".join([*lines, *([""] if words else []), *words])


def _settings_section(config: Any) -> str:
    if config is None:
        return ""
    lines = ["## Settings", "", "| setting | value |", "|---|---|"]
    for field in dataclasses.fields(config):
        lines.append(f"| {field.name} | {_code(_show(field.name, getattr(config, field.name)))} |")
    return "\n".join(lines)


def _limits(before: Scores | None, after: Scores | None) -> str:
    lines = ["## Limits", ""]
    if not before and not after:
        lines.append("- This checkpoint was not evaluated when the card was written.")
    else:
        lines.append("- The scores are of this run's own evaluation; other prompts, images or seeds give other ones.")
    lines += [
        "- Rewards stand in for what is wanted: a model can score well and be wrong, or draw what a checker likes.",
        "- Biases and unsafe behaviour of the base model and the data were not removed; the base's licence applies.",
    ]
    return "\n".join(lines)


def _show(name: str, value: Any) -> str:
    """A setting's value on one line; paths by their last name, nothing that is called a secret."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        shown = ", ".join(f"{key}: {_show(str(key), item)}" for key, item in value.items()) or "none"
    elif isinstance(value, tuple | list):
        shown = ", ".join(_show(name, item) for item in value) or "none"
    elif isinstance(value, Path):
        shown = checkpoint_label(value)
    else:
        secret = isinstance(value, str) and _SECRET_NAME.search(name)
        shown = REDACTED if secret else _without_paths(str(value))
    # Redacted before it is cut: half a token is still a leak, and no longer looks like one.
    shown = redact(shown)
    return shown if len(shown) <= MAX_VALUE else shown[: MAX_VALUE - 1] + "…"


def _without_paths(text: str) -> str:
    """Absolute paths by their last name: the rest tells of one machine and of who works there."""
    if _STARTS_A_PATH.match(text):  # as a whole, since a path may have spaces
        return _last_name(text)
    return _PATH.sub(lambda found: _last_name(found.group()), text)


def _last_name(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _plain(text: str) -> str:
    """One line that Markdown and HTML leave alone inside a table or a heading."""
    return re.sub(r"[\\|<>`*#\[\]]", lambda found: "\\" + found.group(), " ".join(text.split()))


def _code(text: str) -> str:
    """One line as a code span, which may stand in a table."""
    flat = " ".join(text.split()).replace("`", "'").replace("|", "\\|")
    return f"`{flat}`" if flat else "–"
