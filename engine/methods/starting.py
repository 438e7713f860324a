"""What every training starts from: quiet libraries, a watched process group, and the model on its device."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from syncr1.kernels.api import attention_provider

from ..checkpoints.published import local_checkpoint
from ..policies.auto import load_policy
from ..policies.base import Policy
from ..policies.fused import use_liger_kernels
from ..policies.inputs import Inputs, check_fit, checkpoint_notes
from ..policies.lora import add_lora, base_of
from ..processes.group import join, local_device, one_at_a_time
from ..processes.interrupts import ending_once, preemptible
from ..processes.launch import requeued, restarted
from ..processes.meeting import START_SECONDS, Meeting, meet
from ..processes.watchdog import Watchdog
from ..settings.train_config import TrainConfig
from ..show.display import Display

Config = TypeVar("Config", bound=TrainConfig)
RUN_FOLDER = "folder"
"""What the first start leaves to later ones: where this run writes."""
SMALL_MODEL = 5_000_000
"""Parameters below which a second thread costs more than it does (measured on the tiny Janus of 2 million)."""


def quieten() -> None:
    """Libraries report progress bars and notices of their own; a run has one display."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("DeepSpeed", "deepspeed", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


@contextmanager
def supervised(config: TrainConfig) -> Iterator[tuple[Watchdog, Meeting]]:
    """Joins the process group; inside nothing hangs unnoticed, and SIGTERM ends the run in order."""
    with preemptible("stopped outside of training; what was saved is whole"):
        meeting = meet()
        with Watchdog(config.stage_timeout, meeting) as watchdog:
            watchdog.mark("joining the process group", within=START_SECONDS)
            if not dist.is_initialized():  # else by a run before this one, in the same process
                join(meeting, config.stage_timeout + 60)  # the watchdog, which says more, comes first
            watchdog.mark("loading")
            torch.manual_seed(config.seed)
            with ending_once():
                yield watchdog, meeting


def going_on(config: Config, meeting: Meeting) -> Config:
    """The settings of a rank that replaces a lost one: it goes on in the run's folder, from its newest checkpoint, or
    from the beginning where there is none yet."""
    folder = meeting.left(RUN_FOLDER)
    if folder is not None:
        return replace(config, resume_from_checkpoint=folder)
    # Without a store that outlives a start, or with a job of Slurm's that came back: the newest run of that name.
    again = meeting.world_size > 1 if requeued() else restarted() and meeting.kept is None
    return replace(config, resume_from_checkpoint=config.resume_from_checkpoint or "latest") if again else config


def starting_policy(config: TrainConfig, model: str | Path, display: Display) -> Policy:
    """The model that is trained, on its device, with Liger's kernels where they apply.

    Args:
        config: dtype and kernels.
        model: folder or hub name, in transformers' format or DeepSeek's.
        display: told which kernels are used, and what is fetched or converted.
    """
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    policy = one_at_a_time(lambda: load_policy(local_checkpoint(model, display.note), dtype=dtype))
    check_fit(Inputs.of(config).given_to(policy))
    for note in checkpoint_notes(policy):
        display.note(note)
    limit_threads(policy)
    policy.to(local_device())
    fuse_kernels(config, policy, display)
    return policy


def loaded_from(policy: Policy, model: str | Path) -> str:
    """The folder that `starting_policy` loaded `model` from: a name on the hub, asked for again, may mean another one,
    or ask in vain."""
    return str(getattr(policy.model, "name_or_path", None) or model)


def limit_threads(policy: Policy) -> None:
    """One thread for a model too small to share out, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ and sum(p.numel() for p in policy.parameters()) < SMALL_MODEL:
        torch.set_num_threads(1)


def fuse_kernels(config: TrainConfig, policy: Policy, display: Display) -> None:
    """Liger's kernels in the decoder, where they apply; says which, and on a GPU whose kernels attention has."""
    if config.use_liger_kernel:
        for line in use_liger_kernels(policy.decoder()):
            if not line.startswith("none"):
                display.note(f"liger-kernel: {line}")
    shape = policy.cache_shape()
    if shape.device.type == "cuda":
        dtype = torch.bfloat16 if config.bf16 else shape.dtype
        display.note(f"attention: {attention_provider(shape.device, dtype=dtype, head_size=shape.head_dim)}")


def add_adapters(config: TrainConfig, policy: Policy) -> Policy:
    """LoRA, where the settings ask for it; returns the policy as it was before, frozen, to judge and to be referred to.

    It shares what does not change with `policy`, except under ZeRO-3, which takes parameters apart."""
    whole = policy.frozen_copy() if config.zero_stage == 3 else None
    if config.lora_rank:
        modules = config.lora_target_modules or None
        add_lora(policy, config.lora_rank, config.lora_alpha, target_modules=modules, seed=config.seed)
    return whole or base_of(policy)
