"""CoRL / ULM-R1: unified RL of drawing and answering under one reward, three refined runs, and the merge of two models.

python recipes/corl.py                                      the embedded default: no model, no data, no GPU needed
python recipes/corl.py --model JANUS --data DATA            a Janus checkpoint on x2x_rft_22k or your own data
python recipes/corl.py --model QWEN --data DATA --reward_funcs accuracy my.py:function     a language model on questions
python recipes/corl.py --stage mcq --model FOLDER ...       one refined run alone
python recipes/corl.py --strategy separate                  the paper's pilot study: two models, one a skill
python recipes/corl.py --help                               every setting
"""

from __future__ import annotations

import os
from pathlib import Path

# Two processes that spin for each other's threads are many times slower than two that sleep; read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from syncr1.engine.corl.config import CorlConfig
from syncr1.engine.methods.early import loading, unix_habits
from syncr1.engine.methods.exit import run_to_exit
from syncr1.engine.methods.preflight import check_start
from syncr1.engine.processes.launch import launch
from syncr1.engine.settings.flags import parse

TINY = Path(__file__).with_name("corl_tiny.yaml")
"""Settings of the tiny model; the dataclass's own defaults are the paper's, for Janus-Pro."""


def main() -> None:
    config = parse(CorlConfig, description=__doc__, default_yaml=TINY)
    run_to_exit(check_start, config)
    run_to_exit(train, launch(config, __file__))


def train(config: CorlConfig) -> None:
    if config.model is None and config.stage != "merge":
        print(f"syncr1: no --model: the tiny one, and recipes/{TINY.name} for what is not set", flush=True)
    with loading():
        from syncr1.engine.corl.run import run

    run(config)


if __name__ == "__main__":
    with unix_habits():
        main()
