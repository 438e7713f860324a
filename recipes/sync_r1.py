"""Sync-R1: one reasoning loop in which text and then image tokens are sampled, scored together and trained together.

python recipes/sync_r1.py                                   the embedded default: no model, no data, no GPU needed
python recipes/sync_r1.py --model JANUS --data FOLDER       a Janus checkpoint on a UnifyBench++ folder
python recipes/sync_r1.py --nodes 4                         on four machines: Slurm, torchrun or --hostfile FILE
python recipes/sync_r1.py --dry_run                         GPU-hours, memory, disk, first prompts; nothing is trained
python recipes/sync_r1.py --help                            every setting
"""

from __future__ import annotations

import os

# Two processes that spin for each other's threads are many times slower than two that sleep; read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from syncr1.engine.methods.early import loading, unix_habits
from syncr1.engine.methods.exit import run_to_exit
from syncr1.engine.methods.preflight import check_start
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.processes.launch import launch
from syncr1.engine.settings.flags import parse


def main() -> None:
    config = parse(SyncR1Config, description=__doc__)
    run_to_exit(check_start, config)
    run_to_exit(train, launch(config, __file__))


def train(config: SyncR1Config) -> None:
    with loading():
        from syncr1.engine.methods.sync_r1 import run

    run(config)


if __name__ == "__main__":
    with unix_habits():
        main()
