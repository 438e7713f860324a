"""How much memory a rank will need, worked out from the model's configuration alone: no weights, no GPU.

What lasts (weights, copies, gradients, optimizer) is arithmetic, with ZeRO's shares.  What comes and goes is measured
on the model itself, built without data (torch's `meta` device): a micro-batch runs forward and backward through the
decoder and a batch of pictures through the image decoder, and `PeakBytes` counts what is alive.  Reward models, NCCL,
CUDA's own context (about 0.5 GiB) and fragmentation are not in it.

Dims: N tokens of a micro-batch, D hidden size, H query heads, K key-value heads, E head size, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from syncr1.kernels.linear import CHUNK_ROWS, WORKSPACE_BYTES
from syncr1.kernels.support import num_words

from ..forward.masked_states import MaskedPlan
from ..learn.optimizer import bucket_size
from ..policies.base import Policy
from ..policies.lora import add_lora
from ..records import Prompt, SegmentKind
from ..rollout.batch import DRAWN_AT_ONCE
from ..rollout.capacity import Sizes
from ..rollout.drawing_turn import DrawingTurns
from ..rollout.free_prompts import FreePrompts
from ..rollout.masked_draw import ROWS_AT_ONCE
from ..rollout.sampling import Sampling, truncation_of
from ..settings.train_config import TrainConfig
from .masked_cost import Filling, Turns

GIB = 1 << 30
GATHERED = "weights, gathered"
DRAWING_STEP = "a step of drawing"
"""What only models that fill images in have: of it a pass over all of a step's images."""
LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's `stage3_max_live_parameters`, its default; what a ZeRO-3 step really holds was not measured."""


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside hold at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._known:
                    self._known.add(storage)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _free(self, num_bytes: int) -> None:
        self.live -= num_bytes


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank by what they are for: what lasts, and what each part of a step adds."""

    lasting: dict[str, int]
    rollout: dict[str, int]
    backward: dict[str, int]
    update: dict[str, int]
    cache_stays: bool = True
    """On a GPU keys and values stay allocated between rollouts, where CUDA graphs hold their addresses."""

    def moments(self) -> dict[str, int]:
        """What each moment adds."""
        kept = self.rollout["keys and values"] * self.cache_stays
        adds = {"rollout": 0, "backward": kept, "update": kept}
        return {name: stays + sum(getattr(self, name).values()) for name, stays in adds.items()}

    @property
    def worst(self) -> str:
        """The moment at which most is held."""
        moments = self.moments()
        return max(moments, key=moments.__getitem__)

    def peak(self) -> int:
        """At the worst moment."""
        return sum(self.lasting.values()) + max(self.moments().values())

    def lines(self) -> list[str]:
        """For people, what it comes to first."""
        unit = "GiB" if self.peak() >= GIB else "MiB"
        stays = {"keys and values": self.rollout["keys and values"] * self.cache_stays}
        moments = {"rollout": self.rollout, "backward": stays | self.backward, "update": stays | self.update}
        return [
            f"memory: {_sized(self.peak(), unit)} {unit} at the worst moment, the {self.worst}",
            f"  lasting {_listed(self.lasting, unit)}",
            *(f"  {name} + {_listed(parts, unit)}" for name, parts in moments.items()),
        ]


def _listed(parts: Mapping[str, int], unit: str) -> str:
    """The sum, and what it is of; what is too small to show is left out."""
    shown = ((what, _sized(size, unit)) for what, size in parts.items() if size)
    told = ", ".join(f"{what} {size}" for what, size in shown if float(size))
    return f"{_sized(sum(parts.values()), unit)}: {told}"


def _sized(num_bytes: int, unit: str) -> str:
    return f"{num_bytes / (GIB if unit == 'GiB' else 1 << 20):.1f}"


class _Attention(torch.autograd.Function):
    """What a fused attention keeps for its backward: queries, keys, values, result, and one number per row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])


class _AnyLayout:
    """An attention layout that computes nothing."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        attended: Tensor = _Attention.apply(query, key, value)
        return attended.transpose(1, 2)


def prepare(config: TrainConfig, policy: Policy) -> Policy:
    """The policy as it is trained: with adapters, dtype and gradient checkpointing as the settings say."""
    policy.to(torch.bfloat16 if config.bf16 else torch.float32)
    if config.lora_rank:
        add_lora(policy, config.lora_rank, config.lora_alpha, target_modules=config.lora_target_modules or None)
    if config.gradient_checkpointing:
        policy.checkpoint_activations()
    return policy


def memory_of(
    config: TrainConfig,
    policy: Policy,
    prompts: Sequence[Prompt],
    world_size: int,
    beside: Mapping[str, int] | None = None,
    refers: bool = True,
) -> Memory:
    """What a rank of `world_size` needs.

    Args:
        config: settings of the run.
        policy: on the device `meta`, where dry_run.py builds it; `prepare` has been called with it.
        prompts: a step's, this rank's share; they tell how long prompts are.
        world_size: ranks that ZeRO shares over.
        beside: what else lasts, by name.
        refers: there is a frozen copy of what is trained.
    """
    whole, alive = _gathered(config, policy)
    return Memory(
        lasting={**_lasting(config, policy, world_size, refers), **(beside or {})},
        rollout={**_rollout(config, policy, prompts), GATHERED: whole},
        backward={**_backward(config, policy, prompts, world_size), GATHERED: alive},
        update={"gradients": _gradients_at_update(config, policy, world_size)},
        cache_stays=config.cuda_graphs and config.zero_stage < 3,
    )


def _gathered(config: TrainConfig, policy: Policy) -> tuple[int, int]:
    """(bytes of weights that ZeRO 3 gathers for a rollout, those that it lets be alive at a time in training)."""
    if config.zero_stage < 3:
        return 0, 0
    item, parameters = 2 if config.bf16 else 4, sum(p.numel() for p in policy.parameters())
    return item * parameters, item * min(parameters, LIVE_PARAMETERS)


def _lasting(config: TrainConfig, policy: Policy, world_size: int, refers: bool) -> dict[str, int]:
    item = 2 if config.bf16 else 4
    parameters = sum(p.numel() for p in policy.parameters())
    trained = _num_trained(policy)
    stage = config.zero_stage
    state = _share(trained, config, world_size)
    copied = (parameters if stage == 3 else 0 if config.lora_rank else trained) * refers
    return {
        "weights": item * (-(-parameters // world_size) if stage == 3 else parameters),
        "frozen copy": item * copied,
        "float32 weights": 4 * state if config.bf16 or stage else 0,
        "AdamW's moments": 8 * state,
        "DeepSpeed's buffer": item * bucket_size(trained) if stage == 3 else 0,
    }


def _share(count: int, config: TrainConfig, world_size: int) -> int:
    """A rank's part of the optimizer's state."""
    return -(-count // world_size) if config.zero_stage else count


def _gradients_at_update(config: TrainConfig, policy: Policy, world_size: int) -> int:
    """Float32 when the optimizer steps; without ZeRO the bfloat16 ones are still there."""
    trained = _num_trained(policy)
    return 4 * _share(trained, config, world_size) + 2 * trained * (config.bf16 and config.zero_stage == 0)


def _num_trained(policy: Policy) -> int:
    return sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)


def _rollout(config: TrainConfig, policy: Policy, prompts: Sequence[Prompt]) -> dict[str, int]:
    G = config.num_generations
    sizes, prefixes = _sizes(config, policy, prompts)
    images = sum(sizes.images)
    guided = config.cfg_weight != 1.0 and images > 0
    filling = Filling.of(policy, config.image_steps)
    columns = sum(prefixes) + G * sum(sizes.own)
    if filling is not None:
        columns += sizes.turn_columns(G, prefixes) * (images > 0)
    elif guided:
        free = FreePrompts.of(policy, prefixes, sizes.images, config.unconditional)
        columns += sum(ids.numel() for ids in free.tokens) + G * images * policy.num_image_tokens
    if config.preview_fraction and config.preview_max_attempts > 1 and filling is None:
        reach = policy.num_image_tokens if config.preview_completion == "likely" else None
        columns += sizes.preview_columns(G, round(config.preview_fraction * policy.num_image_tokens), guided, reach)
    found = {"keys and values": policy.cache_shape().num_bytes(columns), "pictures": 0}
    found["kept ids"] = _kept_ids(config, policy, G * len(prompts), images > 0)
    if images:
        with torch.no_grad(), PeakBytes() as peak:
            policy.draw(
                torch.zeros(min(DRAWN_AT_ONCE, images * G), policy.num_image_tokens, dtype=torch.long, device="meta")
            )
        found["pictures"] = peak.peak
    if filling is not None and images:  # the last of which is over when pictures are made
        found[DRAWING_STEP] = max(0, _filled_at_once(policy, filling, images * G, 1 + guided) - found["pictures"])
    return found


def _filled_at_once(policy: Policy, filling: Filling, images: int, sides: int) -> int:
    """Of a pass over all images: what the trunk holds at a time, and the logits of some of their places."""
    num_tokens = images * sides * filling.span
    with torch.no_grad(), PeakBytes() as peak:
        embeddings = torch.empty(1, num_tokens, _hidden_size(policy), dtype=_dtype(policy), device="meta")
        policy.eval().trunk(embeddings, torch.zeros(1, num_tokens, dtype=torch.long, device="meta"), _AnyLayout())
    rows, head = min(images * filling.num_tokens, ROWS_AT_ONCE), policy.head(embeddings[0, :1], "image").weight
    return peak.peak + rows * sides * head.numel() // head.shape[1] * head.itemsize


def _kept_ids(config: TrainConfig, policy: Policy, num_sequences: int, draws: bool) -> int:
    """The table of what truncated sampling kept, a bit for each id of each token."""
    sampling, total = Sampling(temperature=config.temperature, **truncation_of(config)), 0
    hidden = torch.empty(1, _hidden_size(policy), device="meta", dtype=_dtype(policy))
    lengths: dict[SegmentKind, int] = {"text": config.max_completion_length}
    if draws:
        lengths["image"] = policy.num_image_tokens
    for kind, length in lengths.items():
        if sampling.truncation(kind).acts:
            total += 4 * num_sequences * length * num_words(policy.head(hidden, kind).weight.shape[0])
    return total


def _backward(config: TrainConfig, policy: Policy, prompts: Sequence[Prompt], world_size: int) -> dict[str, int]:
    sizes, prefixes = _sizes(config, policy, prompts)
    G = config.num_generations
    groups = [
        prefix * (1 if config.share_prefix else G) + G * own for prefix, own in zip(prefixes, sizes.own, strict=True)
    ]
    filling, plan = Filling.of(policy, config.image_steps), MaskedPlan(config.masked_logp, config.masked_steps)
    span = policy.num_image_tokens
    if filling is not None:
        span = filling.span * filling.states(plan)
        groups = _filled_groups(config, filling, plan, sizes, prefixes)
    twins = _twins(config, policy, sizes, prefixes, span)
    whole = [group + twin for group, twin in zip(groups, twins, strict=True)]
    budget = config.max_tokens_per_microbatch
    if config.policy_logp == "guided_detached":  # which count, but leave nothing behind
        budget = int(budget * max(group / size for group, size in zip(groups, whole, strict=True)))
    else:
        groups = whole
    alone = max(groups) if filling is None else -(-max(groups) // G)  # what cannot be cut: a group, or a member of it
    num_tokens = max(min(budget, sum(groups)), alone)
    trained, item = _num_trained(policy), 2 if config.bf16 else 4
    partial = sum(groups) > num_tokens or config.zero_stage >= 2
    saved, peak = _activations(policy, num_tokens, gradients_apart=partial)
    kinds = ["text", "image"] if policy.num_image_tokens else ["text"]
    hidden = torch.empty(1, _hidden_size(policy), device="meta", dtype=_dtype(policy))
    weights = [policy.head(hidden, kind).weight for kind in kinds]  # type: ignore[arg-type]
    widest = max(weight.shape[0] for weight in weights)
    at_most = max(WORKSPACE_BYTES["cuda"] // item, CHUNK_ROWS[0] * widest)
    logits = min(min(num_tokens, CHUNK_ROWS[1]) * widest, at_most) * item
    return {
        "DeepSpeed's buffer": item * bucket_size(trained) if config.zero_stage in (1, 2) else 0,
        "gradients of other micro-batches": partial
        * item
        * (_share(trained, config, world_size) if config.zero_stage >= 2 else trained),
        "gradients of the heads": sum(4 * weight.numel() for weight in weights if weight.requires_grad),
        "activations": saved,
        "logits or the backward's own": max(peak - saved, logits),
    }


def _filled_groups(
    config: TrainConfig, filling: Filling, plan: MaskedPlan, sizes: Sizes, prefixes: Sequence[int]
) -> list[int]:
    """Tokens of each group on the attention axis where images have sequences of their own: text, turns and states."""
    G, states, found = config.num_generations, filling.states(plan), []
    for prefix, text, apart, drawn in zip(prefixes, sizes.own, sizes.apart, sizes.images, strict=True):
        tokens = (prefix * (1 if config.share_prefix else G) + G * text) * (text > 0)
        if drawn:
            turns = Turns.of(prefix, apart - filling.span, G, states, config.share_prefix)
            tokens += int(turns.tokens) + G * states * filling.span
        found.append(tokens)
    return found


def _twins(config: TrainConfig, policy: Policy, sizes: Sizes, prefixes: Sequence[int], span: int) -> list[int]:
    """Tokens of each group's free branch in training; `span` of an image, in all states that are trained."""
    G = config.num_generations
    if config.policy_logp == "conditional" or config.cfg_weight == 1.0 or not any(sizes.images):
        return [0] * len(prefixes)
    free = FreePrompts.of(policy, prefixes, sizes.images, config.unconditional)
    lengths = [free.tokens[index].numel() * (1 if config.share_prefix else G) for index in free.beside]
    return [(length + G * span) * drawn for length, drawn in zip(lengths, sizes.images, strict=True)]


def _activations(policy: Policy, num_tokens: int, *, gradients_apart: bool) -> tuple[int, int]:
    """(what a forward through the decoder leaves, the peak of it and its backward); `gradients_apart`: without those
    of parameters."""
    policy.train()
    trained = [parameter for parameter in policy.decoder().parameters() if parameter.requires_grad]
    for parameter in trained if gradients_apart else ():
        parameter.register_post_accumulate_grad_hook(_drop)
    position_ids = torch.zeros(1, num_tokens, dtype=torch.long, device="meta")
    with PeakBytes() as memory:
        embeddings = torch.empty(1, num_tokens, _hidden_size(policy), dtype=_dtype(policy), device="meta")
        embeddings.requires_grad_(_embedded(policy).requires_grad)
        hidden = policy.trunk(embeddings, position_ids, _AnyLayout())
        saved = memory.live
        hidden.backward(torch.empty_like(hidden))
    return saved, memory.peak


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def _sizes(config: TrainConfig, policy: Policy, prompts: Sequence[Prompt]) -> tuple[Sizes, list[int]]:
    follow_ups = [policy.follow_up_tokens(p) if "image" in p.segments[:-1] else None for p in prompts]
    drawing = DrawingTurns(policy, config.drawing_turn, config.max_completion_length)
    sizes = Sizes.of(policy, prompts, follow_ups, drawing)
    return sizes, [policy.prompt_tokens(prompt).numel() for prompt in prompts]


def _hidden_size(policy: Policy) -> int:
    return int(_embedded(policy).shape[-1])


def _embedded(policy: Policy) -> Tensor:
    return policy.embed(torch.zeros(1, dtype=torch.long, device="meta"), "text")


def _dtype(policy: Policy) -> torch.dtype:
    return policy.cache_shape().dtype
