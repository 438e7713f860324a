"""The records that flow through one RL step: Prompt -> Rollout -> PackedBatch -> StepMetrics.

Data moves one way.  Each record is frozen, and no stage writes into a record that an earlier stage made.

Dims: T packed tokens, S sequences (trajectories), P prompts (groups), G members of a group, L segment length, D hidden.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from syncr1.kernels.api import SharedPrefixLayout

from .pictures import PICTURE

if TYPE_CHECKING:
    from .pictures import ImageRef

TEXT, IMAGE = 0, 1
"""Values of `modality`, the vocabulary that a *target* token belongs to, and columns of `advantages`."""

SegmentKind = Literal["text", "image"]
MODALITY_NAMES: tuple[SegmentKind, SegmentKind] = ("text", "image")
DecodingOrder = Literal["raster", "masked"]
"""How an image is drawn: one token after another, each predicted by the place before it; or all places at once, filled
in by steps, each predicted at its own place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question or drawing request, with everything a reward may want to know about it."""

    id: str
    """Unique and stable over runs; keys the sampler, e.g. `train/bobo/reasoning/3`."""
    task: str
    """UnifyBench++ task: rec, vqa, qa, rea, dense_rea, gen, dense_gen, rea_gen, … ; scores are reported by it."""
    text: str
    """What the user says. Of a prompt that shows pictures each `PICTURE` in it is the place of one, in order; a single
    picture without a sign comes before it."""
    request: str | None = None
    """What is to be drawn, in the user's words, where `text` holds more or something else: a question, what is known of
    the concept. The drawing turn says it; None: `text`."""
    info: str = ""
    """What the data say of the concept's looks (UnifyBench++'s `info`); the drawing turn says it."""
    images: tuple[ImageRef, ...] = ()
    """The photos that the user shows, as many as `text` has signs; () for a text-only prompt."""
    segments: tuple[SegmentKind, ...] = ("text", "image")
    """What the policy produces, in order, as one causal sequence: text, image, text, any of which may be absent.
    `("text", "image")` is Sync-R1's chain."""
    answer: str | None = None
    """Ground truth of the first text segment."""
    right_answers: tuple[str, ...] = ()
    """All that is right, where it is more than `answer` alone: texts of which any will do (OE), or letters that must
    all be chosen (MC), which `answer` then lists."""
    follow_up: str | None = None
    """What the user asks about the drawn image, where `segments` has text behind the image."""
    follow_up_answer: str | None = None
    """Ground truth of the text behind the image."""
    options: tuple[str, ...] = ()
    """Candidate answers, one of which is right (Sync-R1's mode `r`, where the policy is told of the concept: its
    `extra_info`, of which the request means `answer`)."""
    qa_type: Literal["MC", "OE"] | None = None
    """CoRL: multiple choice (`options` in the order of their letters, `answer` is the letter) or open-ended."""
    concept: str | None = None
    """The personalised concept that it is about, without brackets."""
    target: str | None = None
    """Explicit description of the image that should come out."""
    references: tuple[ImageRef, ...] = ()
    """Photos of the concept, for identity rewards."""
    real_image: ImageRef | None = None
    """The picture that a drawing is compared with (CoRL's cycle reward)."""
    attributes: Mapping[str, str] | None = None
    """What the image must show, attribute -> value. Known in the rendered world, absent for photographs."""
    rewarded: bool = True
    """False for an anchor: its rewards are all None, so only the KL term acts on it."""
    sample: str | None = None
    """Prompts of one sample may share one reward, member by member (CoRL's first stage)."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further columns of the data, for reward functions, which get them by name."""

    @property
    def words(self) -> str:
        """`text` without the signs of its pictures."""
        return re.sub(rf"{PICTURE}[ \t]*\n?", "", self.text).strip() if self.images else self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A run of tokens of one vocabulary that the policy sampled, and what it was given right before."""

    kind: SegmentKind
    lead: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    """[L'] int64 text ids that were fed and not sampled: the image's start, with the drawing turn before it where there
    is one; a follow-up turn."""
    lead_image: Tensor | None = None
    """[num_image_tokens, D] embeddings at the image placeholders of `lead`: the drawn image, seen."""
    tokens: Tensor
    """[L] int64 ids in the segment's own vocabulary; a text segment includes its end-of-turn token if one came."""
    logp: Tensor
    """[L] float32 nats: conditional log-probability, recorded by the sampler."""
    logp_mixed: Tensor
    """[L] float32 nats: under the CFG-mixed distribution that was sampled from; equals `logp` without CFG."""
    guidance: float = 1.0
    """w of that distribution, u + w (c - u)."""
    free_prompt: Tensor | None = None
    """[L'] int64: the classifier-free prompt behind which u was computed, `image_start` included; None without CFG."""
    entropy: Tensor
    """[L] float32 nats, of the conditional distribution."""
    support: Tensor | None = None
    """[L, ceil(V/32)] int32 or None = all: the ids that each token was drawn from under top_k, top_p and min_p, as
    `CFGSample.support` has them; what was forced has none that means anything. The three above are then those of the
    distributions renormalised over them."""
    order: Tensor | None = None
    """[L] int64, of an image that was filled in: the step that settled each token, whose state has the tokens of all
    steps before it and masks elsewhere; -1: it was given. None: the image was drawn in raster order."""
    proposals: Tensor | None = None
    """[T, L] int64, of such an image, where they were kept: the picture as each step drew it, masks filled."""
    proposal_logp: Tensor | None = None
    """[T, 2, L] float32 nats: `logp` and `logp_mixed` of what each step drew; NaN where it was known before."""
    truncated: bool = False
    """A text segment that ran into its length limit. Never true for images: a full image is complete."""

    @property
    def num_sampled(self) -> int:
        """Tokens that the sampler settled: of a filled-in image that a preview gave up fewer than it has."""
        return self.tokens.numel() if self.order is None else int((self.order >= 0).sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One trajectory: what the policy made of `prompt`."""

    prompt: Prompt
    member: int
    """Index within the group, 0 … G-1."""
    prompt_tokens: Tensor
    """[L] int64 text ids of the prompt; image placeholders stand for `prompt_image` rows."""
    prompt_image: Tensor | None
    """[num_image_tokens of all, D] embeddings of `prompt.images`, one after the other (frozen vision tower); shared by
    the group."""
    segments: tuple[Segment, ...]
    text: str = ""
    """The decoded first text segment, special tokens removed; "" when there is none."""
    follow_up_text: str = ""
    """The decoded text behind the image."""
    image: Tensor | None = None
    """[3, H, W] float32 in [0, 1]; None when no image was drawn."""
    attempts: int = 1
    """Tries that preview DGS spent on this member."""
    dropped: bool = False
    """Preview DGS gave it up: its image segment stops at the preview, `image` repeats its last row, and nothing rewards
    it."""
    uid: int = 0
    """Keys the sampler's random numbers: a function of seed, prompt id, member and attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeBranch:
    """The images of a `PackedBatch` once more, behind the classifier-free prompts beside which they were drawn.

        [ free prompt 0 | free prompt 1 | … | image 0.0 | image 0.1 | … | image 1.0 | … ]

    The loss never sees this axis: its hidden states are mixed into those of the same tokens on the batch's own. Dims:
    Tu tokens of free prompts, Tf image tokens, T as in `PackedBatch`.
    """

    prompt_tokens: Tensor
    """[Tu] int64 text ids, `image_start` included; each distinct prompt once."""
    rows: Tensor
    """[Tf] int64: which of the batch's response tokens [T] each image token is."""
    weight: Tensor
    """[Tf] float32: w of u + w (c - u)."""
    layout: SharedPrefixLayout
    """Of this axis alone: for a pass without a gradient."""
    joined: SharedPrefixLayout
    """Of both in one pass: [prompts | free prompts | responses | images]."""

    @property
    def num_tokens(self) -> int:
        return int(self.prompt_tokens.numel() + self.rows.numel())

    @property
    def num_unshared_tokens(self) -> int:
        """What they would be if every image brought its own copy of its prompt."""
        copies, lengths = self.layout.group_offsets.diff(), self.layout.cu_prefixes.diff()
        return int((copies * lengths).sum() + self.rows.numel())

    def to(self, device: torch.device) -> FreeBranch:
        """The same branch with every tensor on `device`."""
        return FreeBranch(**_moved(self, device))


@dataclass(frozen=True, slots=True, kw_only=True)
class FilledStates:
    """States of filled-in images behind turns or free prompts. Dims: Tt tokens of those, M states, N places, Tf scored
    tokens."""

    prompt_tokens: Tensor
    """[Tt] int64 text ids; each distinct one once."""
    codes: Tensor
    """[M, N] int64 image ids, the mask among them; the frame is not in it."""
    at: Tensor
    """[Tf] int64: places among the states' tokens, frames included, that score a token."""
    rows: Tensor
    """[Tf] int64: which of the batch's tokens [T] each of them scores."""
    layout: SharedPrefixLayout
    """Of this axis alone: for a pass without a gradient."""

    def to(self, device: torch.device) -> FilledStates:
        """The same with every tensor on `device`."""
        return FilledStates(**_moved(self, device))


@dataclass(frozen=True, slots=True, kw_only=True)
class FilledImages:
    """The images of a `PackedBatch` whose policy fills them in (forward/filled_images.py).

    Image tokens lie on the loss's axis [T] alone; attention sees the states that they were drawn from. Dims: Ta text
    tokens on the attention axis, Tf scored image tokens, T as in `PackedBatch`.
    """

    rows: Tensor
    """[Tf] int64: scored image tokens on [T]."""
    weight: Tensor
    """[Tf] float32: w of u + w (c - u)."""
    attended: Tensor
    """[Ta] int64: the tokens of [T] that are text, which attention sees where they are."""
    drawn: FilledStates
    free: FilledStates | None
    """The same states behind free prompts, where the loss scores the distribution that was sampled from."""
    layout: SharedPrefixLayout
    """Of one pass over the batch's prompts and text and the drawn states: [prompts | turns | text | states]."""
    both: SharedPrefixLayout | None
    """With the free states as well."""
    scale: float
    """What the loss of image tokens is multiplied by: T / k where k of T states were chosen."""
    num_items: int
    """Image tokens that the loss is divided by, those of states that were not chosen among them."""

    @property
    def num_tokens(self) -> int:
        """Positions that the trunk computes."""
        return self.layout.num_tokens if self.both is None else self.both.num_tokens

    def to(self, device: torch.device) -> FilledImages:
        """The same with every tensor on `device`."""
        return FilledImages(**_moved(self, device))


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """Whole groups on one token axis, no padding: first all prompts, each once, then all responses.

        [ prompt 0 | prompt 1 | … | response 0.0 | response 0.1 | … | response 1.0 | … ]

    Pruned trajectories keep their place on [S] with zero tokens: a loss that averages over sequences counts them.
    A prompt with a single response lies before it, in its sequence, and its prefix is empty: there is nothing
    to share. Dims: Tp tokens of prompts, T tokens of responses.
    """

    prefix_tokens: Tensor
    """[Tp] int64 text ids of the shared prompts."""
    layout: SharedPrefixLayout
    """Which prefix tokens and which responses belong together, for attention."""
    tokens: Tensor
    """[T] int64: the token at each position, in the vocabulary that `modality` names."""
    modality: Tensor
    """[T] uint8: TEXT or IMAGE, of the token at this position, i.e. of the target predicted one position earlier."""
    loss_mask: Tensor
    """[T] bool: tokens that the policy produced."""
    cu_seqlens: Tensor
    """[S+1] int32, over responses."""
    group_offsets: Tensor
    """[P+1] int32, over sequences."""
    advantages: Tensor
    """[S, 2] float32: of a trajectory's tokens, by their modality (columns TEXT and IMAGE), in units of its group's
    spread; 0 = nothing to learn. Alike but for `credit="per_segment"`."""
    image_rows: Tensor
    """[R] int64: positions on the whole axis [Tp + T] whose embedding comes from `image_embeddings`."""
    image_embeddings: Tensor
    """[R, D] float32: frozen vision-tower embeddings of the images that the policy was shown."""
    sampled_logp: Tensor
    """[T] float32: the sampler's log-probability, conditional or, with a free branch, the mixed one; NaN where nothing
    was sampled. Diagnostics, and what `importance_correction` compares with."""
    support: tuple[Tensor | None, Tensor | None] = (None, None)
    """Of text and of image: [N, ceil(V/32)] int32 rows of that modality's loss tokens in the order of the axis, the ids
    that each was drawn from; None = all. Every policy's log-probabilities are those over them."""
    free: FreeBranch | None = None
    """The classifier-free twin of every image, where the loss scores the distribution that was sampled from."""
    filled: FilledImages | None = None
    """The images of a policy that fills them in; `layout` is then of the prompts and the text alone."""
    anchor: bool = False
    """True for a batch of anchors, which are held harder than what is being trained."""
    old_logp: Tensor | None = None
    """[T] float32: the trainer's own forward before the first update."""
    is_ratio: Tensor | None = None
    """[T] float32: what a token's policy loss is multiplied by, from the scoring pass before the first update: the
    correction for the sampler's policy, 0 where an entropy quantile leaves it out. None: 1 everywhere."""
    ref_logp: Tensor | None = None
    """[T] float32: the reference policy's; present when beta > 0."""

    @property
    def num_tokens(self) -> int:
        """Positions that the trunk computes; all of them are real."""
        if self.filled is not None:
            return self.filled.num_tokens
        twins = 0 if self.free is None else self.free.num_tokens
        return int(self.prefix_tokens.numel() + self.tokens.numel()) + twins

    @property
    def num_unshared_tokens(self) -> int:
        """What they would be if every response brought its own copy of its prompt."""
        if self.filled is not None:
            return _unshared(self.filled.layout if self.filled.both is None else self.filled.both)
        trained = self.cu_seqlens.diff() > 0
        copies = torch.stack([trained[a:b].sum() for a, b in pairwise(self.group_offsets.tolist())])
        twins = 0 if self.free is None else self.free.num_unshared_tokens
        return int((copies * self.layout.cu_prefixes.diff()).sum() + self.tokens.numel()) + twins

    def without_loss(self) -> PackedBatch:
        """The same batch with nothing to learn: a forward pass for a rank that has none of its own."""
        return replace(self, loss_mask=torch.zeros_like(self.loss_mask), support=(None, None))

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch with every tensor on `device`."""
        return PackedBatch(**_moved(self, device))


def _unshared(layout: SharedPrefixLayout) -> int:
    """Tokens of a layout if every response that has any brought its own copy of its prefix."""
    trained = layout.cu_seqlens.diff() > 0
    copies = torch.stack([trained[a:b].sum() for a, b in pairwise(layout.group_offsets.tolist())])
    return int((copies * layout.cu_prefixes.diff()).sum() + layout.cu_seqlens[-1])


def _moved(record: FreeBranch | FilledStates | FilledImages | PackedBatch, device: torch.device) -> dict[str, Any]:
    """A record's fields, what lies on a device on that one."""
    moved: dict[str, Any] = {f.name: getattr(record, f.name) for f in fields(record)}
    for name, value in moved.items():
        if isinstance(value, Tensor):
            moved[name] = value.to(device, non_blocking=True)
        elif isinstance(value, SharedPrefixLayout | FreeBranch | FilledStates | FilledImages):
            moved[name] = value.to(device)
        elif name == "support":
            moved[name] = tuple(None if kept is None else kept.to(device, non_blocking=True) for kept in value)
    return moved


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """Everything one step has to tell, under TRL's names where TRL has one."""

    step: int
    values: Mapping[str, float]
    """Scalars for metrics.jsonl and the trackers, e.g. `reward`, `rewards/text/mean`, `clip_ratio/region_mean`."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall time of each stage: rollout, reward, pack, score, update."""
    extras: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """What rewards logged of each of this rank's trajectories: by column, [S] plain values or None."""
