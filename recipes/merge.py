"""Merges models that were trained from one base into one checkpoint, as CoRL does after its refined stage.

python recipes/merge.py --base W0 --models MC OE --output OUT   Gaussian merge of folders MC and OE, trained from W0
python recipes/merge.py --help                                  every setting

Works on disk, tensor by tensor: the models may be larger than memory. `--method` gaussian, fnorm or mean; what they
compute is written atop engine/checkpoints/merge.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from syncr1.engine.checkpoints.model_card import write_model_card
from syncr1.engine.errors import CheckpointError, one_line
from syncr1.engine.methods.checkpoint_folders import new_folder_problems, source_problems
from syncr1.engine.methods.early import loading, unix_habits
from syncr1.engine.methods.exit import run_to_exit
from syncr1.engine.methods.preflight import check_weights
from syncr1.engine.reasons import reason_of
from syncr1.engine.settings.flags import parse
from syncr1.engine.settings.schema import Range, Rule, Settings


def _problems(config: Any) -> list[str]:
    problems = []
    if config.base is None:
        problems.append(
            "base: expected the folder that all models were trained from, got none; name it, there is no default"
        )
    if len(config.models) < 2:
        problems.append(f"models: expected two or more folders, got {len(config.models)}; list them after --models")
    problems += source_problems([("base", config.base), *(("models", model) for model in config.models)])
    return problems + new_folder_problems(config.output)


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeConfig(Settings):
    """Settings of `recipes/merge.py`; base, models and output have to be given."""

    # --- checkpoints ---
    base: str | None = None
    """Folder or hub name of the checkpoint that all models were trained from, also in DeepSeek's layout. Another base
    gives another merge."""
    models: tuple[str, ...] = ()
    """Two or more folders or hub names; configuration, tokenizer and processor are taken from the first."""
    output: Path | None = None
    """Folder for the result; must not exist, or be empty."""

    # --- the merge ---
    method: Literal["gaussian", "fnorm", "mean"] = "gaussian"
    """gaussian: ordinary changes are averaged, large ones added. fnorm: weighted by 1/norm. mean: plain average."""
    width: Annotated[float, Range("leave it out for the default", gt=0)] = 2.0
    """gaussian: changes within so many standard deviations are ordinary."""
    max_shard_gb: Annotated[float, Range("leave it out for the default", gt=0)] = 5.0
    """A weight file is at most so large, in 10^9 bytes."""

    RULES: ClassVar[tuple[Rule, ...]] = (_problems,)


def main() -> None:
    config = parse(MergeConfig, description=__doc__)
    models = {"base": config.base or "", **{f"models {model}": model for model in config.models}}
    run_to_exit(partial(check_weights, output=config.output), models)
    run_to_exit(merge, config, interrupted="stopped; nothing was written")


def merge(config: MergeConfig) -> None:
    with loading("torch"):
        from syncr1.engine.checkpoints.merge import merge_checkpoints

    assert config.base is not None and config.output is not None  # MergeConfig saw to it
    tenth = [0]

    def say(done: int, total: int, name: str) -> None:
        if done * 10 // total > tenth[0]:
            tenth[0] = done * 10 // total
            print(f"  {done} of {total} tensors", flush=True)

    print(f"syncr1: merging {len(config.models)} models ({config.method}) ...", flush=True)
    try:
        report = merge_checkpoints(
            config.base,
            config.models,
            config.output,
            config.method,
            config.width,
            say,
            max_shard_bytes=int(config.max_shard_gb * 1e9),
            say=lambda line: print(f"  {line}", flush=True),
        )
    except OSError as error:  # of the files that the settings name
        raise CheckpointError(reason_of(error, "merging") or f"merge: {one_line(error)}") from error
    method = f"{config.method} merge"
    write_model_card(config.output, base_model=config.base, method=method, config=config, merged_from=config.models)
    for index, model in enumerate(report.models):
        moved = f"moved by {report.moved[index]:.4g} (norm of the change)"
        if report.outside is not None:
            moved += f", {report.outside[index]:.2%} of its elements taken in full, the others averaged"
        print(f"  {model.name}: {moved}; {report.unmoved[index]} tensors unmoved")
    if report.not_in_base:
        print(f"  copied from the first model, as the base lacks them: {', '.join(report.not_in_base)}")
    print(f"saved {config.output} in {report.seconds:.0f} s")


if __name__ == "__main__":
    with unix_habits():
        main()
