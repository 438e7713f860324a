"""A second process for `test_beside.py`: says back what it is told, fails as it is asked to, waits, starts another."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time

import torch

from syncr1.engine.errors import ConfigError, RewardError
from syncr1.engine.processes.beside import Answers, Message, SharedBytes, serve


def begin(first: Message) -> tuple[Message, Answers]:
    if first.about.get("refused"):
        raise ConfigError("model: expected a folder, got none; name one")
    os.dup2(os.open(first.about["stderr"], os.O_WRONLY | os.O_CREAT), 2)
    memory = SharedBytes(first.about["size"], first.about["descriptor"])

    def answer(message: Message) -> Message:
        about = message.about
        if about["do"] == "raise":
            errors = {"reward": RewardError("f", 3, "got nan"), "disk": OSError(28, "No space left on device")}
            raise errors.get(about["what"]) or KeyError(about["what"])
        if about["do"] == "sleep":
            if about["child"]:  # it inherits the pipe of the answers
                subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
            time.sleep(60)
        logging.getLogger("there").warning("%s was told", about["do"])
        print("printed, which is no answer")
        rank = [name for name in os.environ if name in ("RANK", "WORLD_SIZE")]
        return Message({"back": about, "rank": rank}, {**message.tensors, "seen": memory.vector(torch.float32, 3, 64)})

    return Message({"ready": os.getpid()}), answer


if __name__ == "__main__":
    serve(begin)
