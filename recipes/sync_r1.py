"""Sync-R1: one reasoning loop in which text and then image tokens are sampled, scored together and trained together.

python recipes/sync_r1.py                                   the embedded default: no model, no data, no GPU needed
python recipes/sync_r1.py --model JANUS --data FOLDER       a Janus checkpoint on a UnifyBench++ folder
python recipes/sync_r1.py --nodes 4                         on four machines: Slurm, torchrun or --hostfile FILE
python recipes/sync_r1.py --dry_run                         settings, ranks, memory, first prompts; nothing is trained
python recipes/sync_r1.py --help                            every setting
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Two processes that spin for each other's threads are many times slower than two that sleep; read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from syncr1.engine.cli import parse
from syncr1.engine.config import ConfigError, SyncR1Config
from syncr1.engine.launch import launch


def main() -> None:
    config = parse(SyncR1Config, description=__doc__)
    config = launch(config, __file__)
    print("syncr1: loading torch and transformers ...", flush=True)
    from syncr1.engine.pictures import PictureError
    from syncr1.engine.prompts import DataError
    from syncr1.engine.run import run
    from syncr1.engine.safetensors_stream import CheckpointError

    try:
        run(config)
    except (ConfigError, DataError, PictureError, CheckpointError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:  # during training `run` handles it itself: it scores, saves and reports what there is
        print("syncr1: stopped outside of training", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
