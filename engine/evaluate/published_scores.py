"""Scores that others published of models before they are trained, and after the papers' training: each with its source.

Only what could be read somewhere stands here.  Of Sync-R1 on UnifyBench++ nothing does: the paper's tables were not at
hand.  `baseline.py` puts these beside our own.
"""

from __future__ import annotations

from typing import NamedTuple

JANUS_1B, JANUS_7B, ULM_R1 = "Janus-Pro-1B", "Janus-Pro-7B", "ULM-R1"
SIZES = {(2048, 24): JANUS_1B, (4096, 30): JANUS_7B}
"""Hidden size and layers of the decoder -> the published model; fine-tuned ones have the same."""
TRAINED = {ULM_R1: JANUS_1B}
"""What a paper trained -> what it started from."""


SOURCES = {
    "J": "Janus-Pro, arXiv 2501.17811, as the sources named with it quote its tables",
    "J1": "Janus-Pro, arXiv 2501.17811, Figure 1",
    "C": "CoRL, arXiv 2505.17534, main results; it writes 1.5B where the checkpoint's name has 1B",
    "W": "WISE's repository, WISE_legacy/README.md: 1,000 prompts, GPT-4o (2024-05-13)",
    "WV": "WISE's repository, leadboard.md: verified prompts, Qwen3.5-35B-A3B, right or wrong",
    "205": "https://github.com/deepseek-ai/Janus/issues/205",
    "210": "https://github.com/deepseek-ai/Janus/issues/210",
    "237": "https://github.com/deepseek-ai/Janus/issues/237",
    "239": "https://github.com/deepseek-ai/Janus/issues/239",
    "V794": "https://github.com/open-compass/VLMEvalKit/issues/794",
    "B46": "https://github.com/JiuhaiChen/BLIP3o/issues/46",
}
"""What stands in brackets in `Published.source`."""


class Published(NamedTuple):
    """A number as it stands in its source."""

    benchmark: str
    model: str
    score: str
    """Its own writing and unit."""
    by: str
    """Who measured it: the model's authors, or others who tried to."""
    source: str
    part: str = ""
    """The part of the benchmark, by the name that our table gives it; "": the headline."""


AUTHORS, OTHERS = "authors", "others"


def _parts(benchmark: str, model: str, source: str, **scores: str) -> tuple[Published, ...]:
    """Single parts of a benchmark, by those who published the whole."""
    return tuple(Published(benchmark, model, score, AUTHORS, source, part) for part, score in scores.items())


PUBLISHED = (
    Published("GenEval", JANUS_1B, "0.73", AUTHORS, "[J] by [C], [237]"),
    Published(
        "GenEval", JANUS_1B, "two objects .697, position .463", OTHERS, "[210]: 4 images a prompt, temperature 1"
    ),
    Published("GenEval", JANUS_7B, "0.80", AUTHORS, "[J1]"),
    Published("GenEval", ULM_R1, "0.77", AUTHORS, "[C]"),
    *_parts("GenEval", JANUS_1B, "[J] by [C]", two_object="0.82", counting="0.51", position="0.65", color_attr="0.56"),
    *_parts("GenEval", JANUS_7B, "[J] by [C]", two_object="0.89", counting="0.59", position="0.79"),
    *_parts("GenEval", ULM_R1, "[C]", two_object="0.85", counting="0.71", position="0.68", color_attr="0.80"),
    Published("DPG-Bench", JANUS_1B, "82.63", AUTHORS, "[J] by [C], [B46]"),
    Published("DPG-Bench", JANUS_1B, "74.64", OTHERS, "[B46]"),
    Published("DPG-Bench", JANUS_7B, "84.2", AUTHORS, "[J1]"),
    Published("DPG-Bench", ULM_R1, "83.92", AUTHORS, "[C]"),
    Published("WISE", JANUS_1B, "0.26", AUTHORS, "[W], [C]"),
    Published("WISE", JANUS_7B, "0.35", AUTHORS, "[W], [C]"),
    Published("WISE", ULM_R1, "0.33", AUTHORS, "[C]"),
    *_parts("WISE", JANUS_1B, "[W]", culture="0.20", time="0.28", space="0.45"),
    *_parts("WISE", JANUS_1B, "[W]", biology="0.24", physics="0.32", chemistry="0.16"),
    *_parts("WISE", JANUS_7B, "[W]", culture="0.30", time="0.37", space="0.49"),
    *_parts("WISE", JANUS_7B, "[W]", biology="0.36", physics="0.42", chemistry="0.26"),
    Published("WISE Verified", JANUS_1B, "0.2650", AUTHORS, "[WV]"),
    Published("WISE Verified", JANUS_7B, "0.3340", AUTHORS, "[WV]"),
    *_parts("WISE Verified", JANUS_1B, "[WV]", culture="0.3050", time="0.2333", space="0.2333"),
    *_parts("WISE Verified", JANUS_1B, "[WV]", biology="0.2167", physics="0.3083", chemistry="0.2000"),
    *_parts("WISE Verified", JANUS_7B, "[WV]", culture="0.3700", time="0.3500", space="0.2833"),
    *_parts("WISE Verified", JANUS_7B, "[WV]", biology="0.2833", physics="0.4000", chemistry="0.2333"),
    Published("MMMU", JANUS_1B, "36.3", AUTHORS, "[J] by [C], [239]"),
    Published("MMMU", JANUS_1B, "34.89", OTHERS, "[239]: VLMEvalKit, exact matching"),
    Published("MMMU", JANUS_7B, "41.0", AUTHORS, "[J] by [C]"),
    Published("MMMU", ULM_R1, "42.3", AUTHORS, "[C]"),
    Published("POPE", JANUS_1B, "86.2", AUTHORS, "[J] by [C], [239]"),
    Published("POPE", JANUS_1B, "84.11", OTHERS, "[239]: VLMEvalKit"),
    Published("POPE", JANUS_7B, "87.4", AUTHORS, "[J] by [C]"),
    Published("POPE", ULM_R1, "88.9", AUTHORS, "[C]"),
    Published("MMBench", JANUS_1B, "75.5", AUTHORS, "[J] by [239]"),
    Published("MMBench", JANUS_1B, "74.2", OTHERS, "[239]: VLMEvalKit, exact matching"),
    Published("MMBench", JANUS_7B, "79.2", AUTHORS, "[J] by [205]"),
    Published("MMBench", JANUS_7B, "65.81", OTHERS, "[205]: lmms-eval, mmbench_en_dev"),
    Published("SEED", JANUS_1B, "68.3", AUTHORS, "[J] by [239]"),
    Published("SEED", JANUS_1B, "67.28", OTHERS, "[239]: VLMEvalKit"),
    Published("MMVet", JANUS_1B, "39.8", AUTHORS, "[J] by [C], [239]: judged by GPT-4o"),
    Published("MMVet", JANUS_1B, "36.7", OTHERS, "[239]: judged by GPT-4.1"),
    Published("MMVet", ULM_R1, "43.9", AUTHORS, "[C]"),
    Published("MME-P", JANUS_7B, "1567", AUTHORS, "[J] by [V794]"),
    Published("MME-P", JANUS_7B, "1520", OTHERS, "[V794]: VLMEvalKit"),
    Published("MathVista", JANUS_1B, "37.3", OTHERS, "[C]: CoRL's own evaluation, VLMEvalKit"),
    Published("MathVista", JANUS_7B, "42.5", AUTHORS, "[J] by [C]"),
    Published("MathVista", ULM_R1, "42.5", AUTHORS, "[C]"),
    Published("WeMath", JANUS_1B, "5.9", AUTHORS, "[C]"),
    Published("WeMath", ULM_R1, "21.1", AUTHORS, "[C]"),
    Published("LogicVista", JANUS_1B, "23.9", AUTHORS, "[C]"),
    Published("LogicVista", ULM_R1, "34.5", AUTHORS, "[C]"),
    Published("MathVerse", JANUS_1B, "13.5", AUTHORS, "[C]"),
    Published("MathVerse", ULM_R1, "25.4", AUTHORS, "[C]"),
)
"""Benchmark by benchmark; the starting model before what was trained from it."""

SPELLED = {"mme": "MME-P", "seedbench": "SEED", "seed_bench": "SEED", "dpg": "DPG-Bench"}
"""Other names of the benchmarks, small letters."""


def published_of(benchmark: str, model: str | None) -> list[Published]:
    """What is known of a model on a benchmark, and of what was trained from it; of all where the model is None."""
    return [
        row
        for row in PUBLISHED
        if row.benchmark == benchmark and (model is None or model in (row.model, TRAINED.get(row.model)))
    ]


def benchmark_named(name: str) -> str | None:
    """The benchmark that a data set's or a task's name speaks of: `mmmu_val`, `MMBench_DEV_EN`; None: none of these."""
    small = name.lower().replace("-", "_")
    known = {row.benchmark.lower().replace("-", "_").replace(" ", "_"): row.benchmark for row in PUBLISHED} | SPELLED
    found = [word for word in known if word in small]
    return known[max(found, key=len)] if found else None
