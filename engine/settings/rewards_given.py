"""Reward weights belong to the functions that they were written for: a flag that names others takes them away."""

from __future__ import annotations

from collections.abc import Sequence


def without_stale_weights(arguments: Sequence[str]) -> list[str]:
    """The flags, with an empty `--reward_weights` where `--reward_funcs` is given without weights of its own.

    Those of a settings file, such as the embedded default's, are in the order of the file's functions.
    """
    given = {argument.split("=", 1)[0].replace("-", "_") for argument in arguments if argument.startswith("--")}
    if "__reward_funcs" in given and "__reward_weights" not in given:
        return [*arguments, "--reward_weights"]
    return list(arguments)
