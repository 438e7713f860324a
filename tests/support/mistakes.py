"""What users get wrong, by kind: a command, the files that it finds, and words of the one line that it ends with.

`TABLE` is run by `tests/methods/test_mistakes.py` (each in a process of its own where torch is not needed to know it,
with a torch that cannot be imported) and, cold and with a clock, by `tests/campaigns/test_mistakes_cold.py`.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 2048}
PROMPTS = "".join(json.dumps({"prompt": f"a red square, number {n}"}) + "\n" for n in range(12))
REWARD = "def good(*, completions, **_):\n    return [1.0 for _ in completions]\n"


@dataclass(frozen=True, slots=True)
class Mistake:
    """One of them."""

    name: str
    command: str
    """Recipe and flags; the working directory is the folder that `files` has filled."""
    words: str
    """That the line must have, beside what was expected and what came."""
    files: Callable[[Path], object] = lambda folder: None
    lines: int = 1
    """As many as settings are wrong."""
    needs_torch: bool = False
    """Torch is needed to know it, or to read the data: allowed 15 seconds instead of 5."""
    env: tuple[tuple[str, str], ...] = ()

    @property
    def is_module(self) -> bool:
        """`python -m …` and no recipe."""
        return self.command.startswith("-m ")


def program(mistake: Mistake) -> list[str]:
    """What stands behind `python`."""
    words = shlex.split(mistake.command)
    return words if mistake.is_module else [str(ROOT / "recipes" / words[0]), *words[1:]]


def text(**contents: str) -> Callable[[Path], object]:
    """Files by name, `__` for a dot, `___` for a slash."""

    def write(folder: Path) -> None:
        for name, content in contents.items():
            path = folder / name.replace("___", "/").replace("__", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    return write


def safetensors(path: Path, sizes: dict[str, int], missing: int = 0) -> None:
    """Weights of float32 by name, zeros; `missing` bytes cut off."""
    header: dict[str, Any] = {}
    end = 0
    for name, count in sizes.items():
        header[name] = {"dtype": "F32", "shape": [count], "data_offsets": [end, end + 4 * count]}
        end += 4 * count
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end - missing)


def model(config: object = LLAMA, *, weights: str = "whole", tokenizer: bool = True) -> Callable[[Path], object]:
    """A folder `m` that looks like a checkpoint, and what is wrong with its weights."""

    def write(folder: Path) -> None:
        m = folder / "m"
        m.mkdir()
        if config is not None:
            (m / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        if tokenizer:
            (m / "tokenizer.json").write_text("{}")
        if weights == "pickled":
            (m / "pytorch_model.bin").write_bytes(b"PK")
        elif weights == "gguf":
            (m / "m.Q4.gguf").write_bytes(b"GGUF")
        elif weights == "pointer":
            (m / "model.safetensors").write_text(LFS)
        elif weights == "shards":
            names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
            (m / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": dict(zip("ab", names, strict=True))})
            )
            safetensors(m / names[0], {"a": 4})
        elif weights == "no header":
            (m / "model.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b"not JSON, really")
        elif weights != "none":
            safetensors(m / "model.safetensors", {"a": 2**40 if weights == "huge" else 8}, 5 * (weights == "cut"))

    return write


def both(*writers: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [write(folder) for write in writers]


def trained_run(name: str) -> Callable[[Path], object]:
    """A run with a checkpoint to resume from and a saved model."""
    return text(
        **{
            f"{name}___checkpoints___latest": "step_000002",
            f"{name}___checkpoints___last___config__json": json.dumps(LLAMA),
            f"{name}___config__yaml": "seed: 0\n",
        }
    )


OFFLINE = (("HF_ENDPOINT", "http://127.0.0.1:9"), ("HF_HUB_CACHE", "hub"))
"""A port that nobody listens on, and an empty cache."""


def whole_model(**changed: str) -> Callable[[Path], object]:
    """A small Janus that can be loaded, as `m`, and twelve prompts; files of it by name, with other contents."""

    def write(folder: Path) -> None:
        from made import short_base  # which takes torch

        shutil.copytree(short_base(), folder / "m")
        text(**{f"m___{name}": content for name, content in changed.items()}, rows__jsonl=PROMPTS)(folder)

    return write


FLAGS = [
    Mistake("a misspelt flag", "sync_r1.py --lerning_rate 3", "did you mean --learning_rate?"),
    Mistake("a number out of range", "sync_r1.py --num_generations 1", "num_generations: expected at least 2, got 1"),
    Mistake(
        "three at once",
        "sync_r1.py --lr 3 --num_generations 1 --seed x",
        "seed: expected an integer",
        lines=3,
    ),
    Mistake("neither on nor off", "sync_r1.py --bf16 maybe", "bf16: expected true or false, got 'maybe'"),
    Mistake("more than a float holds", "sync_r1.py --learning_rate 1e400", "at most 1.8e308"),
    Mistake("no number", "sync_r1.py --learning_rate nan", "a finite number"),
    Mistake("a share of nothing", "sync_r1.py --top_p 0", "top_p: expected more than 0 and at most 1, got 0"),
    Mistake("fewer than no ids", "sample.py --image_top_k -1", "image_top_k: expected at least 0, got -1"),
    Mistake("none of the choices", "sync_r1.py --zero_stage 7", "zero_stage: expected one of 0, 1, 2, 3"),
    Mistake("half a seed", "sync_r1.py --seed 1.5", "seed: expected an integer"),
    Mistake("a flag without its value", "sync_r1.py --max_steps --seed 1", "expected a value after --max_steps"),
    Mistake("a word alone", "sync_r1.py stray", "a word without a setting"),
    Mistake("a dash from a text processor", "sync_r1.py —seed 3", "did you mean --seed?", lines=2),
    Mistake("a name from TRL", "sync_r1.py --epsilon_low .1", "set epsilon"),
    Mistake("settings that exclude each other", "sync_r1.py --dgs top_k", "dgs_keep"),
    Mistake("a rule over two timeouts", "sync_r1.py --reward_timeout 9000", "expected less than stage_timeout"),
    Mistake("no settings file", "sync_r1.py --config no.yaml", "no.yaml"),
    Mistake("an empty settings file", "sync_r1.py --config a.yaml", "a file without any", text(a__yaml="# later\n")),
    Mistake("no YAML", "sync_r1.py --config a.yaml", "not plain YAML", text(a__yaml="a: b: c\n")),
    Mistake("a list for a mapping", "sync_r1.py --config a.yaml", "got list", text(a__yaml="- a\n- b\n")),
    Mistake("a key twice", "sync_r1.py --config a.yaml", "given twice (line 2)", text(a__yaml="seed: 1\nseed: 2\n")),
    Mistake("a tag of code", "sync_r1.py --config a.yaml", "not plain YAML", text(a__yaml="seed: !!python/none\n")),
    Mistake("too much in YAML", "sync_r1.py --config a.yaml", "at most 1.8e308", text(a__yaml="beta: 1e400\n")),
    Mistake(
        "file and flag",
        "sync_r1.py --config a.yaml --seed x",
        "did you mean beta?",
        text(a__yaml="betta: 1\n"),
        lines=2,
    ),
    Mistake("a folder for a file", "sync_r1.py --config .", "not a file"),
    Mistake("the tiny base in no steps", "tiny_base.py --steps 0", "steps: expected at least 1"),
]
MODELS = [
    Mistake("an empty folder", "sync_r1.py --model m", "no config.json", model(None, weights="none", tokenizer=False)),
    Mistake("a configuration that is no JSON", "sync_r1.py --model m", "no JSON", model("{")),
    Mistake("pickled weights", "sync_r1.py --model m", "convert it with save_pretrained", model(weights="pickled")),
    Mistake("a download that was cut off", "sync_r1.py --model m", "the download was cut off", model(weights="cut")),
    Mistake("a header of nonsense", "sync_r1.py --model m", "is no safetensors'", model(weights="no header")),
    Mistake("a shard missing", "sync_r1.py --model m", "1 of 2 shards missing", model(weights="shards")),
    Mistake("a pointer of git-lfs", "sync_r1.py --model m", "git lfs pull", model(weights="pointer")),
    Mistake("no tokenizer", "sync_r1.py --model m", "expected a tokenizer", model(tokenizer=False)),
    Mistake("another kind of model", "sync_r1.py --model m", "model_type 't5'", model({"model_type": "t5"})),
    Mistake(
        "DeepSeek's own format", "corl.py --model m", "deepseek-community/", model({"model_type": "multi_modality"})
    ),
    Mistake(
        "quantised weights",
        "sync_r1.py --model m",
        "quantised by awq",
        model(LLAMA | {"quantization_config": {"quant_method": "awq"}}),
    ),
    Mistake("llama.cpp's format", "sync_r1.py --model m", "m.Q4.gguf", model(weights="gguf")),
    Mistake(
        "an adapter alone",
        "evaluate.py --model m",
        "merge it into its base",
        both(model(None), text(m___adapter_config__json="{}")),
    ),
    Mistake(
        "a pipeline of diffusers",
        "sync_r1.py --model m",
        "a pipeline of diffusers",
        both(model(None), text(m___model_index__json="{}")),
    ),
    Mistake("a run's folder", "sync_r1.py --model run", "did you mean run/checkpoints/last?", trained_run("run")),
    Mistake("a file for a model", "sync_r1.py --model m.safetensors", "not a folder", text(m__safetensors="x")),
    Mistake("a path that is not there", "sync_r1.py --model runs/typo", "not a folder", text(runs___x="")),
    Mistake(
        "a cache that is a file",
        "sync_r1.py",
        "SYNCR1_CACHE: expected a folder",
        text(afile=""),
        env=(("SYNCR1_CACHE", "afile"),),
    ),
    Mistake("the hub out of reach", "sync_r1.py --model org/name", "does not answer", env=OFFLINE),
    Mistake(
        "no network wanted", "sync_r1.py --model org/name", "HF_HUB_OFFLINE", env=(*OFFLINE, ("HF_HUB_OFFLINE", "1"))
    ),
    Mistake("a longer text than the toy's positions", "sync_r1.py --max_completion_length 5000", "the 512 positions"),
    Mistake(
        "a longer text than positions", "sync_r1.py --model m --max_completion_length 5000", "2048 positions", model()
    ),
    Mistake("a model larger than the disk", "sync_r1.py --model m", "GiB of free space", model(weights="huge")),
]
DATA = [
    Mistake("a name nearly right", "sync_r1.py --data row.jsonl", "mean rows.jsonl?", text(rows__jsonl=PROMPTS)),
    Mistake("data that are not there", "corl.py --data nowhere.jsonl", "which is not there"),
    Mistake("an empty file", "sync_r1.py --data rows.jsonl", "got an empty file", text(rows__jsonl="")),
    Mistake("an archive", "sync_r1.py --data rows.zip", "the suffix '.zip'", text(rows__zip="PK")),
    Mistake("a folder of nothing", "sync_r1.py --data d", "without any of these", text(d___a___b__png="x")),
    Mistake(
        "the folder above", "sync_r1.py --data d", "did you mean d/unify?", text(d___unify___concept___train___c___x="")
    ),
    Mistake("data that git-lfs has", "sync_r1.py --data rows.jsonl", "git lfs pull", text(rows__jsonl=LFS)),
    Mistake("twelve prompts and a step of 16", "sync_r1.py --data rows.jsonl", "at most 12", text(rows__jsonl=PROMPTS)),
    Mistake(
        "twelve samples and a step of 16",
        "corl.py --data rows.jsonl --prompts_per_step 16",
        "at most 12, the rows",
        text(rows__jsonl=PROMPTS),
    ),
    Mistake("a data set out of reach", "corl.py --data org/name", "hf download --repo-type dataset", env=OFFLINE),
    Mistake("data to evaluate on", "evaluate.py --data d.jsonl", "which is not there"),
    Mistake(
        "a row that is no JSON",
        "sync_r1.py --data rows.jsonl --prompts_per_step 1",
        "rows.jsonl, line 2",
        text(rows__jsonl='{"prompt": "a"}\n{"prompt"\n'),
        needs_torch=True,
    ),
    Mistake(
        "more prompts a step than the world has",
        "sync_r1.py --prompts_per_step 100000",
        "lower prompts_per_step",
        needs_torch=True,
    ),
    Mistake(
        "a parquet file that is none",
        "sync_r1.py --data rows.parquet",
        "rows.parquet",
        text(rows__parquet="PAR0"),
        needs_torch=True,
    ),
]
REWARDS = [
    Mistake("a reward's name", "corl.py --reward_funcs acuracy", "did you mean accuracy?"),
    Mistake("a reward's name in a plan", "corl.py --reward_funcs acuracy --dry_run", "did you mean accuracy?"),
    Mistake("no file of rewards", "corl.py --reward_funcs no.py:good", "no file no.py"),
    Mistake("no such module", "corl.py --reward_funcs no_such:good", "no module 'no_such'"),
    Mistake(
        "a reward with a slip of syntax", "corl.py --reward_funcs r.py:good", "at line 1", text(r__py="def good(:\n")
    ),
    Mistake("another function", "corl.py --reward_funcs r.py:god", "did you mean good?", text(r__py=REWARD)),
    Mistake(
        "a reward's own needs",
        "corl.py --reward_funcs r.py:good",
        "pip install no_such_package",
        text(r__py=f"import no_such_package\n\n\n{REWARD}"),
    ),
    Mistake("one weight for two rewards", "corl.py --reward_funcs tim format --reward_weights 1", "one per reward"),
    Mistake("a judge by FTP", "sync_r1.py --judge_url ftp://host/v1 --judge_model m", "got 'ftp://host/v1'"),
    Mistake("a port that there is not", "sync_r1.py --judge_url http://host:99999/v1 --judge_model m", "host or port"),
    Mistake("a judge without a name", "sync_r1.py --judge_url https://host/v1", "judge_model: expected"),
    Mistake("a judge in the open", "sync_r1.py --judge_url http://host/v1 --judge_model m", "plain http"),
    Mistake(
        "a key that is not set",
        "sync_r1.py --judge_url https://h/v1 --judge_model m --judge_key_env NO_KEY",
        "judge_key_env: expected",
    ),
    Mistake("a judge without an address", "corl.py --reward_funcs judge", "judge_url: expected an address"),
]
PLACES = [
    Mistake("a file for the run's folder", "sync_r1.py --output_dir f", "expected a folder", text(f="")),
    Mistake("a file above the run's folder", "sync_r1.py --output_dir f/run", "is a file", text(f="")),
    Mistake("a folder that cannot be written", "sync_r1.py --output_dir /proc/run", "change its permissions"),
    Mistake(
        "a slip in the name of a run to resume",
        "sync_r1.py --output_dir runs/snyc --resume_from_checkpoint latest",
        "did you mean runs/sync?",
        trained_run("runs___sync"),
    ),
    Mistake("a run that is not there", "sync_r1.py --resume_from_checkpoint nowhere", "no folder"),
    Mistake(
        "prompts that three ranks cannot share",
        "sync_r1.py --ranks_per_node 3",
        "prompts_per_step: expected a multiple of the 3 ranks, got 16",
    ),
    Mistake(
        "a model to merge out of reach",
        "merge.py --base org/w --models org/a org/b --output o",
        "org/a",
        lines=3,
        env=OFFLINE,
    ),
    Mistake("a list of machines", "sync_r1.py --hostfile hosts", "hostfile"),
    Mistake("nothing to score", "evaluate.py --stage score --output_dir e", "run --stage generate first"),
    Mistake("nothing to merge", "merge.py --output o", "expected two or more folders", lines=2),
    Mistake(
        "half a model to merge",
        "merge.py --base m --models m n --output o",
        "the download was cut off",
        both(model(weights="cut"), lambda folder: shutil.copytree(folder / "m", folder / "n")),
        lines=3,
    ),
    Mistake("a result over another", "merge.py --base m --models m m --output m", "expected a new or empty", model()),
    Mistake("a node's agent by hand", "-m syncr1.engine.processes.nodes", "--hostfile FILE"),
    Mistake(
        "a reward's process by hand",
        "-m syncr1.engine.rewards.yours.worker",
        "isolated@FILE:FUNCTION",
        needs_torch=True,
    ),
]
TABLE = (*FLAGS, *MODELS, *DATA, *REWARDS, *PLACES)

SHORT = "--model m --data rows.jsonl --prompts_per_step 4 --num_generations 2 --max_steps 1 --eval_samples 0"
WITH_A_MODEL = [
    Mistake(
        "a tokenizer of nonsense",
        f"sync_r1.py {SHORT}",
        "expected files that its library can read",
        whole_model(tokenizer__json='{"version": "1.0", "model": {"type": "nothing"}}'),
        needs_torch=True,
    ),
    Mistake(
        "layers that the model has not",
        f"sync_r1.py {SHORT} --lora_rank 2 --lora_target_modules wq",
        "lora_target_modules: expected some of down_proj",
        whole_model(),
        needs_torch=True,
    ),
    Mistake(
        "a captioner out of reach",
        f"corl.py {SHORT} --cycle_image none --spice_parser world --stage unified --max_completion_length 8",
        "captioner: expected a folder, or a name",
        whole_model(),
        needs_torch=True,
        env=OFFLINE,
    ),
    Mistake(
        "a reward of another length",
        f"corl.py {SHORT} --reward_funcs r.py:short --stage unified --cfg_weight 1 --max_completion_length 4",
        "expected 2 values, one per trajectory",
        both(
            whole_model(), text(r__py="def short(*, completions, **_):\n    return [1.0]\n\n\nshort.kind = 'image'\n")
        ),
        needs_torch=True,
    ),
]
"""Those that a model has to be read for."""
