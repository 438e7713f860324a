"""10,000 fuzzed answers: none raises, and at the 99th percentile one takes at most 5 ms.  About half a minute.

python -m pytest tests/campaigns/test_answers_fuzz.py -s
"""

from __future__ import annotations

from answer_fuzz import fuzzed, timed

from syncr1.engine.answers.same import same_answer

MOST = 0.005


def test_ten_thousand_answers() -> None:
    assert same_answer(r"\sqrt{8}", r"2\sqrt{2}")  # loads sympy
    times = sorted(entry.seconds for entry in timed(fuzzed(10_000, seed=17)))
    shares = {share: times[int(share * len(times))] for share in (0.5, 0.9, 0.99, 0.999)}
    print({share: f"{1e3 * seconds:.2f} ms" for share, seconds in shares.items()}, f"slowest {1e3 * times[-1]:.0f} ms")
    assert shares[0.99] <= MOST
