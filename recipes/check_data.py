"""Checks data before a run does: every fault with its file, entry and remedy, what each task has, what is not used.

python recipes/check_data.py --data unifybench/                       a UnifyBench++ folder or a table, for sync_r1.py
python recipes/check_data.py --data prompts.jsonl --recipe corl       a table, for corl.py
python recipes/check_data.py --help                                   every setting

Ends with 0 where the data can be trained on, and with 2 where they cannot.
"""

from __future__ import annotations

from syncr1.engine.errors import EXIT_BAD_INPUT
from syncr1.engine.methods.check_data_config import CheckDataConfig
from syncr1.engine.methods.early import unix_habits
from syncr1.engine.methods.exit import run_to_exit
from syncr1.engine.settings.flags import parse


def main() -> None:
    config = parse(CheckDataConfig, description=__doc__)
    run_to_exit(check_data, config, interrupted="stopped; nothing is written here")


def check_data(config: CheckDataConfig) -> None:
    from syncr1.engine.methods.check_data import check

    if not check(config):
        raise SystemExit(EXIT_BAD_INPUT)


if __name__ == "__main__":
    with unix_habits():
        main()
