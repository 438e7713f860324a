"""Show-o as showlab publishes it, looked at without torch: three parts that lie in three places.

    the model            a folder of diffusers' kind: `_class_name` Showo in its config.json, and no `model_type`
    its image tokenizer  another one, MAGVITv2 (`showlab/magvitv2`)
    its text tokenizer   that of the language model it was made from (`microsoft/phi-1_5`)

They are found beside one another under the names below, or are named.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError
from .deepseek_files import config_in, is_theirs, weight_names

SHOW_O, MAGVIT, OURS = "Showo", "MAGVITv2", "show_o"
"""`_class_name` of the published parts, and `model_type` of what they are converted into."""
MODEL, VQ, TEXT = "showlab/show-o", "showlab/magvitv2", "microsoft/phi-1_5"
"""Names on the hub."""
VQ_HOME, TEXT_HOME = "magvitv2", "phi-1_5"
"""Where a conversion into the published layout puts the tokenizers."""
_VQ_PLACES = (VQ_HOME, "vq_model", f"{VQ_HOME}.safetensors", f"{VQ_HOME}.bin", f"../{VQ_HOME}")
_TEXT_PLACES = (".", TEXT_HOME, "tokenizer", f"../{TEXT_HOME}")


def published_class(folder: Path) -> str:
    """`_class_name` of a folder of diffusers' kind; empty where it is none."""
    return str(config_in(folder).get("_class_name") or "")


def is_show_o(folder: Path) -> bool:
    """Whether a folder is Show-o as it is published."""
    return published_class(folder) == SHOW_O


def needs_conversion(folder: Path) -> bool:
    """Whether a folder is in a layout that is converted before it is loaded."""
    return is_theirs(folder) or is_show_o(folder)


def is_published(folder: Path) -> bool:
    """Whether a folder is one whose pickles are read, as tensors alone: those, and Show-o's image tokenizer."""
    return needs_conversion(folder) or published_class(folder) == MAGVIT


def layout_of(folder: Path) -> str:
    """Whose layout that is."""
    return "showlab's" if is_show_o(folder) else "DeepSeek's"


def vq_beside(folder: Path) -> Path | None:
    """The image tokenizer, a folder or a file; None where there is none."""
    places = (folder / place for place in _VQ_PLACES)
    return next((place for place in places if place.is_file() or weight_names(place)), None)


def text_beside(folder: Path) -> Path | None:
    """The folder of the text tokenizer: beside, or where the configuration says that the language model is."""
    places = [folder / place for place in (*_TEXT_PLACES, str(config_in(folder).get("llm_model_path") or "."))]
    files = ("tokenizer.json", "vocab.json")
    return next((place for place in places if any((place / file).is_file() for file in files)), None)


def show_o_problems(setting: str, folder: Path, *, vq: object = None, text: object = None) -> list[str]:
    """What is wrong with a published folder, by its settings and what lies beside it.

    Args:
        setting: that names it.
        folder: which is there.
        vq, text: named places of the tokenizers, which need not lie beside then.
    """
    found = []
    if config_in(folder).get("w_clip_vit"):
        found.append(
            f"{setting}: expected a Show-o that sees by its image tokens, got {folder}, which sees through CLIP's "
            f"tower (w_clip_vit); take {MODEL} or {MODEL}-512x512"
        )
    absent = [f"image tokenizer ({VQ_HOME}/)"] if vq is None and vq_beside(folder) is None else []
    absent += [f"text tokenizer ({TEXT_HOME}/)"] if text is None and text_beside(folder) is None else []
    if absent:
        found.append(
            f"{setting}: expected Show-o's {' and '.join(absent)} beside its weights, got none in {folder}; put them "
            f"there, or convert it once and name the result: python recipes/convert.py --model {folder} --vq {VQ} "
            f"--tokenizer {TEXT} --output show-o"
        )
    return found


def parts_of(folder: Path, vq: Path | None = None, text: Path | None = None) -> tuple[Path, Path]:
    """(image tokenizer, folder of the text tokenizer) of a published folder, named or beside.

    Raises:
        CheckpointError: one is not there, or the model is another one.
    """
    vq, text = vq or vq_beside(folder), text or text_beside(folder)
    problems = show_o_problems("model", folder, vq=vq, text=text)
    if vq is None or text is None or problems:
        raise CheckpointError("\n".join(problems))
    return vq, text


def read_files(folder: Path) -> list[Path]:
    """Every file that a conversion of a published folder reads; CheckpointError as `parts_of`."""
    vq, text = parts_of(folder)
    weights = [folder / name for name in weight_names(folder)]
    weights += [vq] if vq.is_file() else [vq / name for name in weight_names(vq)]
    words = [path for path in sorted(text.iterdir()) if path.suffix in (".json", ".txt", ".jinja")]
    return list(dict.fromkeys([folder / "config.json", *weights, *words]))
