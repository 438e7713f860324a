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
import sys
from pathlib import Path

# Two processes that spin for each other's threads are many times slower than two that sleep; read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from syncr1.engine.corl.config import CorlConfig
from syncr1.engine.methods.exit import run_to_exit
from syncr1.engine.processes.launch import launch
from syncr1.engine.settings.flags import parse
from syncr1.engine.settings.rewards_given import without_stale_weights

TINY = Path(__file__).with_name("corl_tiny.yaml")
"""Settings of the embedded default; the dataclass's own defaults are the paper's, for Janus-Pro."""


def main() -> None:
    given = [argument.split("=", 1)[0] for argument in sys.argv[1:]]
    embedded = not {"--model", "--data", "--config", "--help", "-h"} & set(given)
    config = parse(
        CorlConfig, without_stale_weights(sys.argv[1:]), description=__doc__, default_yaml=TINY if embedded else None
    )
    config = launch(config, __file__)
    if embedded:
        print(f"syncr1: no --model and no --data: the tiny world, settings from recipes/{TINY.name}")
    print("syncr1: loading torch and transformers ...", flush=True)
    from syncr1.engine.corl.run import run

    run_to_exit(run, config)


if __name__ == "__main__":
    main()
