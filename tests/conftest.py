"""Settings that all tests share: one thread that does not spin, one seed, memory that shows when it is not written.

Torch is imported where it is used: the process that shares the tests out has no need of it, and the others wait for it.
"""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Iterator

# Before torch is imported: spinning idle threads slow every other process of the machine down.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest

# What collecting imports and makes stays: the collector would look through it a hundred times (2.2 s of a core).
gc.disable()

hypothesis.settings.register_profile("syncr1", deadline=None, derandomize=True, max_examples=25, database=None)
# New examples every time, many of them; on failure the smallest is printed with the line that reproduces it.
hypothesis.settings.register_profile(
    "nightly", deadline=None, derandomize=False, max_examples=1500, database=None, print_blob=True
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "syncr1"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests go first, so that at the end no process waits for another's long one."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """What was imported stays: the collector, which ZeRO-3 calls in every step, need not look through it (0.6 s)."""
    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)  # else nanobind calls all that is left a leak, at length


@pytest.fixture(autouse=True, scope="session")
def _session_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where the processes of the session share what they make."""
    from warm import SESSION_FOLDER, session_folder

    os.environ[SESSION_FOLDER] = str(session_folder(tmp_path_factory))


@pytest.fixture(autouse=True)
def _threads_and_seed() -> None:
    """One thread, unless a run of the suite asks for more."""
    import torch

    torch.set_num_threads(int(os.environ.get("SYNCR1_TEST_THREADS", "1")))
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _no_process_group_left() -> Iterator[None]:
    """A group that the tests of a file have made ends with the file: those of the next may fork ranks of their own."""
    launcher = {
        name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    yield
    import torch

    if torch.distributed.is_initialized():
        from helpers import end_process_group

        end_process_group()
        for name, value in launcher.items():
            if value is None:
                os.environ.pop(name, None)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch fills what `empty` returns with NaN (or the largest integer): an output left unwritten becomes visible."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
