"""Evaluation in two stages that go on where they were interrupted: generate answers and images, then score them.

python recipes/evaluate.py                                     the tiny base on the rendered world
python recipes/evaluate.py --model JANUS --data FOLDER --clip openai/clip-vit-base-patch32 --output_dir OUT
python recipes/evaluate.py --stage score --output_dir OUT --judge_url https://…/v1 --judge_model NAME
python recipes/evaluate.py --model JANUS --data evaluation_metadata.jsonl --images_per_prompt 4 --export geneval
python recipes/evaluate.py --help                              every setting
"""

from __future__ import annotations

import os
import sys

# As in sync_r1.py; read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from syncr1.engine.methods.early import loading, unix_habits
from syncr1.engine.methods.evaluation_config import EvaluateConfig
from syncr1.engine.settings.flags import parse


def main() -> None:
    config = parse(EvaluateConfig, description=__doc__)
    with loading():
        import syncr1.engine.compat  # noqa: F401  # before transformers

        from transformers.utils import logging

        from syncr1.engine.errors import DataError, EvaluationError, PictureError
        from syncr1.engine.methods.evaluation import run_evaluation

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        run_evaluation(config)
    except (EvaluationError, DataError, PictureError) as error:
        print(f"syncr1: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("syncr1: stopped; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    with unix_habits():
        main()
