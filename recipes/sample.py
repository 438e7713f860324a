"""Draws and answers with a checkpoint, or with several side by side: a grid, the pictures, and a JSONL.

python recipes/sample.py --model runs/sync_r1/checkpoints/last             some held-out items of the rendered world
python recipes/sample.py --model JANUS --cfg_weight 5 --prompt "a red cup" "a blue cup"      four drawings of each
python recipes/sample.py --model JANUS --prompt "what is this?" --image photo.png            four answers
python recipes/sample.py --model JANUS --prompt "a cup" --produce text image                 reasons, then draws
python recipes/sample.py --compare A B --data unifybench/                  two models, the same random numbers
python recipes/sample.py --help                                            every setting
"""

from __future__ import annotations

import os

# As in sync_r1.py; read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from syncr1.engine.methods.early import loading, unix_habits
from syncr1.engine.methods.exit import run_to_exit
from syncr1.engine.methods.preflight import check_start, check_weights
from syncr1.engine.methods.sample_config import SampleConfig
from syncr1.engine.settings.flags import parse


def main() -> None:
    config = parse(SampleConfig, description=__doc__)
    run_to_exit(check_start, config)
    run_to_exit(check_weights, {f"compare {name}": name for name in config.compare})
    run_to_exit(sample, config, interrupted="stopped; what was sampled is in output_dir")


def sample(config: SampleConfig) -> None:
    with loading():
        from syncr1.engine.methods.sample import run_sample

    run_sample(config)


if __name__ == "__main__":
    with unix_habits():
        main()
