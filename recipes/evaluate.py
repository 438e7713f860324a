"""Evaluation in two stages that go on where they were interrupted: generate answers and images, then score them.

python recipes/evaluate.py                                     the tiny base on the rendered world
python recipes/evaluate.py --model JANUS --data FOLDER --clip openai/clip-vit-base-patch32 --output_dir OUT
python recipes/evaluate.py --stage score --output_dir OUT --judge_url https://…/v1 --judge_model NAME
python recipes/evaluate.py --benchmark geneval --model JANUS --data GENEVAL --images_per_prompt 4 --geneval_detector M2F
python recipes/evaluate.py --benchmark mmmu --model JANUS      a benchmark's own files, rules and published numbers
python recipes/evaluate.py --help                              every setting
"""

from __future__ import annotations

import os

# As in sync_r1.py; read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from syncr1.engine.methods.early import loading, unix_habits
from syncr1.engine.methods.evaluation_config import EvaluateConfig
from syncr1.engine.methods.exit import run_to_exit
from syncr1.engine.methods.preflight import check_start
from syncr1.engine.settings.flags import parse


def main() -> None:
    config = parse(EvaluateConfig, description=__doc__)
    run_to_exit(check_start, config)
    run_to_exit(evaluate, config, interrupted="stopped; the same command goes on from here")


def evaluate(config: EvaluateConfig) -> None:
    with loading():
        import syncr1.engine.compat  # noqa: F401  # before transformers

        from transformers.utils import logging

        from syncr1.engine.methods.evaluation import run_evaluation

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    run_evaluation(config)


if __name__ == "__main__":
    with unix_habits():
        main()
