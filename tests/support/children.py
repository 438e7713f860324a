"""What the processes that a test starts cost."""

from __future__ import annotations

import resource


class ChildrenSeconds:
    """Seconds of a core that the processes of a `with` block used: unlike the clock's, no matter of what else runs."""

    def __enter__(self) -> ChildrenSeconds:
        self._before = self._used()
        return self

    def __exit__(self, *_: object) -> None:
        self.used = self._used() - self._before

    @staticmethod
    def _used() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime
