"""What is compiled ahead of time: every launcher, called at the sizes of real models on tensors without memory.

A launcher is called with `meta` tensors, so that signature, alignments and switches are those of a launch on a GPU and
are written down nowhere else. The matrix products (D = 2048, 4096) are the vendor's: no kernel here knows D.

Dims: `T` packed tokens, `S` sequences, `P` groups, `V` vocabulary, `B` decode rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..options import LossOptions
from ..support import num_words
from ..terms import DecodeStep, Head, LossTerms, RowSettings, RowTerms, SampleInputs, padded
from . import groups
from .decode_attention import prefix_decode_attention
from .loss import token_loss
from .rows import gradient_rows, loss_rows, score_rows
from .sample import sample

NUM_TOKENS = 65536
NUM_SEQUENCES = 128
NUM_GROUPS = 16
DECODE_ROWS = 64
CHUNK_ROWS = 4096
TEXT, IMAGE, RAGGED = 102400, 16384, 184622
"""Vocabularies of Janus's heads, and of Emu3, which is no multiple of 16."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CLIP = RowSettings("clip", 0.2, 0.2, None, 0.0, False, 1.0, 1.05)


@dataclass(frozen=True, slots=True)
class Case:
    """One call of a launcher."""

    name: str
    """What sets it apart from other calls of the same kernel."""
    call: Callable[[], object]
    num_bytes: int
    """That must move between memory and the chip."""
    passes: str
    """Reads and writes of the row or token by the kernel."""
    hot: bool = True
    """On the way of every training step or token: no spills, loads of 16 bytes."""
    wide: bool = True
    """The rows are read 16 bytes at a time (what reads one value a group or sequence has nothing to read so)."""
    more_loads: int = 0
    """Narrow ones that it may hold beyond what every hot kernel may: of a support whose rows begin anywhere."""


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def rows_of(num_rows: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """A chunk of products as `linear.Workspace` cuts it."""
    return empty(num_rows, padded(vocabulary), dtype=dtype)[:, :vocabulary]


def row_cases() -> Iterator[Case]:
    """The row kernels; of `selective_logp`, whose caller hands in all rows at once, T·V > 2³¹."""
    for kind, dtype in DTYPES.items():
        for vocabulary, biased, truncated in (
            (TEXT, False, False),
            (IMAGE, True, False),
            (RAGGED, False, False),
            (RAGGED, True, False),
            (TEXT, False, True),
            (IMAGE, True, True),
            (RAGGED, False, True),
        ):
            one_sweep = vocabulary * dtype.itemsize <= 32768
            name = f"V={vocabulary} {kind}{' bias' if biased else ''}{' support' if truncated else ''}"
            chunk, all_rows = (rows_of(n, vocabulary, dtype) for n in (CHUNK_ROWS, NUM_TOKENS))
            bias = empty(vocabulary, dtype=dtype) if biased else None
            words = partial(empty, dtype=torch.int32) if truncated else None
            kept = [None if words is None else words(n, num_words(vocabulary)) for n in (NUM_TOKENS, CHUNK_ROWS)]
            all_head, head = (Head(bias, support=support) for support in kept)
            row_bytes = vocabulary * dtype.itemsize + (0 if words is None else 4 * num_words(vocabulary))
            size, chunk_size = NUM_TOKENS * row_bytes, CHUNK_ROWS * row_bytes
            vector, hot = partial(empty, CHUNK_ROWS), kind == "bf16" or vocabulary != RAGGED
            more = 8 if truncated and vocabulary == RAGGED else 0
            targets, chunk_targets = (empty(n, dtype=torch.int64) for n in (NUM_TOKENS, CHUNK_ROWS))
            score = partial(score_rows, all_rows, targets, all_head)
            yield Case(f"{name} T={NUM_TOKENS}", score, size, "1 read", hot, more_loads=more)
            yield Case(
                f"{name} C={CHUNK_ROWS}",
                partial(loss_rows, chunk, chunk_targets, head, RowTerms(vector(), vector(), vector(), vector()), CLIP),
                2 * chunk_size,
                "1 read, 1 write" if one_sweep else "2 reads (the second from L2), 1 write",
                hot,
                more_loads=more,
            )
            lse = empty(CHUNK_ROWS, dtype=torch.float64)
            yield Case(
                f"{name} C={CHUNK_ROWS}",
                partial(gradient_rows, chunk, chunk_targets, head, lse, vector(), vector(), vector(), chunk),
                2 * chunk_size,
                "1 read, 1 write",
                hot,
                more_loads=more,
            )
    # The caller's own logits, V no multiple of 16: their rows begin anywhere.
    logits, targets = empty(NUM_TOKENS, RAGGED, dtype=torch.bfloat16), empty(NUM_TOKENS, dtype=torch.int64)
    yield Case(
        f"V={RAGGED} bf16 rows of selective_logp T={NUM_TOKENS}",
        partial(score_rows, logits, targets, Head()),
        2 * NUM_TOKENS * RAGGED,
        "1 read",
        wide=False,
    )


def loss_terms(options: dict[str, Any], given: bool = False, per_sequence: bool = False, **absent: None) -> LossTerms:
    """A batch of 64k tokens with everything but what is named as None."""
    settings = LossOptions(**options)
    num_credits = options.get("loss_type") == "cispo"
    scores = (2 if num_credits else 1, NUM_SEQUENCES)
    vector, words = partial(empty, NUM_TOKENS), partial(empty, dtype=torch.int64)
    terms = LossTerms(
        settings=settings,
        cu_seqlens=words(NUM_SEQUENCES + 1),
        group_offsets=words(NUM_GROUPS + 1),
        logp=vector(),
        old_logp=vector(),
        ref_logp=vector(),
        entropy=vector(),
        loss_mask=vector(dtype=torch.bool),
        modality=vector(dtype=torch.uint8),
        is_ratio=empty(NUM_SEQUENCES) if per_sequence else vector(),
        is_per_sequence=per_sequence,
        rewards=None if given else empty(*scores, dtype=torch.float64),
        advantages=empty(*scores) if given else None,
        keep=empty(NUM_SEQUENCES, dtype=torch.bool) if given else None,
        frac_reward_zero_std=empty() if given else None,
    )
    return replace(terms, **absent)  # type: ignore[arg-type]


def loss_cases() -> Iterator[Case]:
    """The token loss: logp, old_logp, entropy, mask, modality in, d loss / d logp out."""
    plain: dict[str, Any] = {"ref_logp": None, "is_ratio": None}
    each = NUM_TOKENS * (3 * 4 + 2 + 4)
    more = NUM_TOKENS * 4
    for name, terms, num_bytes, hot in (
        ("dapo, pruned", loss_terms({"dgs": "variance_mass"}, **plain), each, True),
        ("dapo, advantages given", loss_terms({}, given=True, **plain), each, True),
        ("dapo, num_items, KL", loss_terms({"num_items": 9.0, "beta": 0.1}, is_ratio=None), each + more, True),
        (
            "grpo, sequence ratio, KL",
            loss_terms({"loss_type": "grpo", "ratio": "sequence", "beta": 0.1}, is_ratio=None),
            each + more,
            True,
        ),
        (
            "sapo, bias-corrected KL",
            loss_terms({"loss_type": "sapo", "bias_corrected_kl": True, "beta": 0.1}, is_ratio=None),
            each + more,
            False,
        ),
        (
            "cispo, two rewards, items per modality",
            loss_terms({"loss_type": "cispo", "dgs": "top_k", "num_items": {"text": 5.0, "image": 9.0}}, ref_logp=None),
            each + more,
            False,
        ),
        (
            "vespo, is_ratio per sequence",
            loss_terms({"loss_type": "vespo"}, per_sequence=True, ref_logp=None),
            each,
            False,
        ),
    ):
        yield Case(f"{name} T={NUM_TOKENS}", partial(token_loss, terms), num_bytes, "1 read, 1 write", hot, wide=False)


def group_cases() -> Iterator[Case]:
    """Group statistics: a kilobyte or two, so that a launch is all that they cost."""
    rewards, offsets = empty(NUM_SEQUENCES, dtype=torch.float64), empty(NUM_GROUPS + 1, dtype=torch.int64)
    for scale in ("group", "batch", "loo", "none"):
        call = partial(groups.group_advantages, rewards, offsets, scale, 1e-4)
        yield Case(f"scale={scale}", call, NUM_SEQUENCES * 12, "2 reads", scale == "group", wide=False)
    for rule in groups.RULES:
        call = partial(groups.dgs_select, rewards, rewards, offsets, rule=rule, mass=0.9, keep=4, min_keep=2, seed=0)
        yield Case(f"rule={rule}", call, NUM_SEQUENCES * 17, "1 read a member", rule == "variance_mass", wide=False)


def sample_cases() -> Iterator[Case]:
    """Guided image tokens, plain text tokens, and both of a vocabulary that is no multiple of 16."""
    seeds = empty(DECODE_ROWS, dtype=torch.int64)
    for kind, dtype in DTYPES.items():
        for vocabulary, guided in ((IMAGE, True), (TEXT, False), (RAGGED, True)):
            cond = rows_of(DECODE_ROWS, vocabulary, dtype)
            uncond = rows_of(DECODE_ROWS, vocabulary, dtype) if guided else None
            resident = vocabulary <= IMAGE
            for how, top_k, top_p, min_p, temperature, kept in (
                ("plain", 0, 1.0, 0.0, 1.0, False),
                ("top-p", 0, 0.9, 0.0, 1.0, False),
                ("top-k", 1000, 1.0, 0.0, 1.0, False),
                ("top-k top-p", 1000, 0.9, 0.0, 1.0, False),
                ("min-p support", 0, 1.0, 0.05, 1.0, True),
                ("top-k top-p min-p support", 1000, 0.9, 0.05, 1.0, True),
                ("greedy", 0, 1.0, 0.0, 0.0, False),
            ):
                weight = 5.0 if guided else 1.0
                drawn = SampleInputs(
                    cond, uncond, weight, temperature, top_k, top_p, min_p, seeds, seeds, None, kept, "triton"
                )
                swept = (3 if how == "plain" else 2 if how == "greedy" else 33) + kept
                yield Case(
                    f"V={vocabulary} {kind}{' guided' if guided else ''} {how} B={DECODE_ROWS}",
                    partial(sample, drawn),
                    (1 + guided) * DECODE_ROWS * vocabulary * dtype.itemsize,
                    "1 read" if resident else f"{swept} reads at most (the later from L2)",
                    hot=kind == "bf16",
                )


def decode_cases() -> Iterator[Case]:
    """64 rows in 4 groups over prefixes of 676 columns, 128 columns of their own; each prefix counted once."""
    own, prefixes = DECODE_ROWS * 256, 4 * 676
    for kind, dtype in DTYPES.items():
        # Janus-Pro 1B and 7B; Emu3 with four query heads per key-value head, Qwen with seven; a small model.
        for heads, kv_heads, width in ((16, 16, 128), (32, 32, 128), (32, 8, 128), (28, 4, 128), (8, 8, 64)):
            query = empty(DECODE_ROWS, heads, width, dtype=dtype)
            new = empty(DECODE_ROWS, kv_heads, width, dtype=dtype)
            prefix, mine = (empty(kv_heads, columns, width, dtype=dtype) for columns in (prefixes, own))
            spans = empty(DECODE_ROWS, 4, dtype=torch.int64)
            step = DecodeStep(query, new, new, prefix, prefix, mine, mine, spans, width**-0.5, "triton")
            yield Case(
                f"{heads} heads on {kv_heads}, E={width} {kind} B={DECODE_ROWS}",
                partial(prefix_decode_attention, step),
                2 * kv_heads * width * dtype.itemsize * (prefixes + DECODE_ROWS * 128),
                "1 read of own columns, 1 of the prefix a row",
                hot=kind == "bf16",
            )


def cases() -> list[Case]:
    """All of them."""
    return [*row_cases(), *loss_cases(), *group_cases(), *sample_cases(), *decode_cases()]
