"""A mistake of a user's, and the files that it needs: what `mistakes.py` makes its table of."""

from __future__ import annotations

import json
import os
import resource
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import warm
from made import cache_folder

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
    file_size: int = 0
    """Bytes that a file may have before the system says that there is no room; 0: as many as it likes."""

    @property
    def is_module(self) -> bool:
        """`python -m …` and no recipe."""
        return self.command.startswith("-m ")


def program(mistake: Mistake) -> list[str]:
    """What stands behind `python`."""
    words = shlex.split(mistake.command)
    return words if mistake.is_module else [str(ROOT / "recipes" / words[0]), *words[1:]]


def run_cold(mistake: Mistake, folder: Path) -> subprocess.CompletedProcess[str]:
    """It in a process of its own, as a user makes it, in the folder that its files are in."""
    limits = (mistake.file_size, mistake.file_size)
    return subprocess.run(
        [sys.executable, *program(mistake)],
        cwd=folder,
        env=warm.environment(cache_folder()) | {"PYTHONPATH": str(ROOT)} | dict(mistake.env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)) if mistake.file_size else None,
    )


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


GENERATION = ("gen_vision_config", "gen_aligner_config", "gen_head_config")
"""Parts of a configuration that a model which draws nothing does not have."""


def deepseek(
    *,
    weights: str = "whole",
    config: dict[str, Any] | None = None,
    without: Sequence[str] = (),
    without_files: Sequence[str] = (),
) -> Callable[[Path], object]:
    """A folder `m` in DeepSeek's layout, and what is wrong with it."""

    def write(folder: Path) -> None:
        import torch
        from deepseek_janus import save_small

        m = folder / "m"
        tensors: dict[str, Any] = dict(save_small(m, weights="bin_shards" if weights == "missing" else "bin"))
        told = {**json.loads((m / "config.json").read_text()), **(config or {})}
        (m / "config.json").write_text(json.dumps({key: value for key, value in told.items() if key not in without}))
        for name in without_files:
            (m / name).unlink()
        if weights == "missing":
            (m / "pytorch_model-00002-of-00003.bin").unlink()
        elif weights == "pointer":
            (m / "pytorch_model.bin").write_text(LFS)
        elif weights == "cut":
            os.truncate(m / "pytorch_model.bin", 100_000)
        elif weights != "whole":
            tensors |= {"hostile": {"x": Hostile()}, "unknown": {"language_model.adapter": torch.ones(2)}}.get(
                weights, {}
            )
            tensors |= {"gen_embed.weight": torch.ones(3, 8)} if weights == "shape" else {}
            tensors = {
                name: tensor
                for name, tensor in tensors.items()
                if weights != "without one" or name != "gen_embed.weight"
            }
            torch.save(tensors, m / "pytorch_model.bin")

    return write


class Hostile:
    """Unpickled, it would run a program."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("a_strangers_code_ran",)


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


HELD = socket.socket()
"""Listens as long as this process lives."""


def taken_port() -> tuple[tuple[str, str], ...]:
    """A launcher's variables for one rank, which is to listen where this process does."""
    HELD.bind(("127.0.0.1", 0))
    HELD.listen()
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    return (*place.items(), ("MASTER_PORT", str(HELD.getsockname()[1])))


OFFLINE = (("HF_ENDPOINT", "http://127.0.0.1:9"), ("HF_HUB_CACHE", "hub"))
"""A port that nobody listens on, and an empty cache."""


def whole_model(**changed: str) -> Callable[[Path], object]:
    """A small Janus that can be loaded, as `m`, and twelve prompts; files of it by name, with other contents."""

    def write(folder: Path) -> None:
        from made import short_base  # which takes torch

        shutil.copytree(short_base(), folder / "m")
        text(**{f"m___{name}": content for name, content in changed.items()}, rows__jsonl=PROMPTS)(folder)

    return write
