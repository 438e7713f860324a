"""Converts Janus from DeepSeek's layout and Show-o from showlab's into transformers' and back, on disk, bit for bit.

python recipes/convert.py --model deepseek-ai/Janus-Pro-1B --output OUT      into transformers' format
python recipes/convert.py --model RUN/checkpoints/last --base deepseek-ai/Janus-Pro-1B --output OUT   and back
python recipes/convert.py --model showlab/show-o --vq showlab/magvitv2 --tokenizer microsoft/phi-1_5 --output OUT
python recipes/convert.py --help                                             every setting

Other recipes need no conversion by hand: `--model` takes either layout, and keeps a conversion in the cache. Every
tensor arrives bit for bit; the model may be larger than memory. OUT/conversion.json has the SHA-256 of all files.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from syncr1.engine.errors import CheckpointError, one_line
from syncr1.engine.methods.checkpoint_folders import new_folder_problems, source_problems
from syncr1.engine.methods.convert_checks import check_conversion
from syncr1.engine.methods.early import loading, unix_habits
from syncr1.engine.methods.exit import run_to_exit
from syncr1.engine.reasons import reason_of
from syncr1.engine.settings.flags import parse
from syncr1.engine.settings.schema import Range, Rule, Settings

LAYOUTS = {"transformers": "transformers'", "deepseek": "DeepSeek's", "showlab": "showlab's"}
KEPT = {
    "transformers": "without a place in transformers' model, kept in deepseek/ for the way back",
    "showlab": "of the image tokenizer, in magvitv2/",
}
"""Layout -> what stands in the file beside."""


def _problems(config: Any) -> list[str]:
    problems = []
    if config.model is None:
        problems.append("model: expected a folder or a hub name, got none; name the checkpoint to convert")
    vq = config.vq if config.vq is None or not Path(config.vq).expanduser().is_file() else None
    named = [("model", config.model), ("base", config.base), ("vq", vq), ("tokenizer", config.tokenizer)]
    problems += source_problems(named)
    return problems + new_folder_problems(config.output)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertConfig(Settings):
    """Settings of `recipes/convert.py`; model and output have to be given."""

    # --- checkpoints ---
    model: str | None = None
    """Folder or hub name (`org/name@revision`) of Janus or Show-o, as they are published or in transformers' layout."""
    output: Path | None = None
    """Folder for the result; must not exist, or be empty."""
    to: Literal["transformers", "deepseek", "showlab"] | None = None
    """Layout of the result; left out: the one that `model` is not in."""
    base: str | None = None
    """Into a published layout: the checkpoint in that layout that the training started from, whose settings files are
    taken over, and tensors that transformers has no place for. Left out: what a conversion kept, or zeros."""
    vq: str | None = None
    """Of a published Show-o: folder, file or hub name of its image tokenizer (`showlab/magvitv2`). Left out: what lies
    beside the model."""
    tokenizer: str | None = None
    """Of a published Show-o: folder or hub name of its text tokenizer (`microsoft/phi-1_5`, or an enlarged one). Left
    out: what lies beside the model."""

    # --- files ---
    max_shard_gb: Annotated[float, Range("leave it out for the default", gt=0)] = 5.0
    """A weight file is at most so large, in 10^9 bytes."""

    RULES: ClassVar[tuple[Rule, ...]] = (_problems,)


def main() -> None:
    config = parse(ConvertConfig, description=__doc__)
    run_to_exit(check_conversion, config)
    run_to_exit(run, config, interrupted="stopped; nothing was written")


def run(config: ConvertConfig) -> None:
    with loading():
        from syncr1.engine.checkpoints.convert import Conversion, convert, kind_of_checkpoint
        from syncr1.engine.checkpoints.published import published_folder, settings_folder
        from syncr1.engine.methods.starting import quieten

    quieten()
    assert config.model is not None and config.output is not None  # ConvertConfig saw to it
    source = published_folder(config.model, _say)
    base = None if config.base is None else published_folder(config.base, _say)
    vq = None if config.vq is None else Path(config.vq).expanduser()
    vq = published_folder(vq, _say) if vq is not None and not vq.is_file() else vq
    text = None if config.tokenizer is None else settings_folder(config.tokenizer)
    to = kind_of_checkpoint(source)
    print(f"syncr1: converting {config.model} into {LAYOUTS[to]} layout ...", flush=True)
    try:
        done: Conversion = convert(
            source,
            config.output,
            base=base,
            vq=vq,
            text=text,
            name=config.model,
            max_shard_bytes=int(config.max_shard_gb * 1e9),
            say=_say,
        )
    except OSError as error:  # of the files that the settings name
        raise CheckpointError(reason_of(error, "converting") or f"convert: {one_line(error)}") from error
    _tell(done, config.output)


def _say(line: str) -> None:
    print(f"  {line}", flush=True)


def _tell(done: Any, output: Path) -> None:
    """What was written, and what has no counterpart."""
    files = f"{len(done.written)} file{'s' * (len(done.written) != 1)}"
    print(f"  {done.num_tensors} tensors, {done.num_bytes / 1e9:.2f} GB in {files}, bit for bit as they were")
    for names, what in (
        (done.kept, KEPT.get(done.to, "")),
        (done.zeros, "that DeepSeek's code wants and does not read, written as zeros; --base takes the published ones"),
    ):
        if names:
            groups = Counter(
                name.partition("attn_pool")[0] + "attn_pool" if "attn_pool" in name else name for name in names
            )
            print(f"  {len(names)} tensors {what}: {', '.join(f'{name} ({count})' for name, count in groups.items())}")
    for line in done.lost:
        print(f"  no counterpart: {line}")
    print(f"saved {output} in {done.seconds:.0f} s")


if __name__ == "__main__":
    with unix_habits():
        main()
