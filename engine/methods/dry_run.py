"""What `--dry_run` says: settings, where the run goes, what it will take, and one step's prompts, checked.

No GPU and no weights are needed: of a checkpoint only the configuration and the tokenizer are read.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import yaml

from ..checkpoints.published import settings_alone
from ..errors import ConfigError, RewardSpecError
from ..evaluate.manifest import picture_names
from ..learn.from_settings import check_order, objective_of
from ..pictures import open_picture
from ..policies.auto import policy_class
from ..policies.base import Policy
from ..policies.inputs import Inputs, checkpoint_notes
from ..processes.launch import Request, Start, count_gpus, decide
from ..records import Prompt
from ..rewards.hooks import state_of
from ..rewards.images.image_rewards import NAMED
from ..rewards.trial import try_rewards
from ..rewards.yours.custom import load_reward, own_column
from ..rollout.capacity import check_lengths, check_plans, remarks_on
from ..settings.train_config import TinyPolicy, TrainConfig, WorldName
from ..settings.yaml_files import to_yaml
from ..show.names import training_task_words
from .cost import Unit
from .estimate import Estimate, estimate_of
from .memory import memory_of, prepare


def policy_without_weights(name: str | None, world: WorldName = "rendered", policy: TinyPolicy = "janus") -> Policy:
    """The policy of a checkpoint on the device `meta`: shapes, tokenizer and sizes, and no numbers.

    Args:
        name: folder or hub name; None: the tiny base.
        world, policy: whose, and of which kind.

    Raises:
        ConfigError: no policy is known for the checkpoint's `model_type`, or it refuses the model.
    """
    if name is None:
        from ..world.worlds import WORLDS

        return WORLDS[world].bases[policy].untrained().to("meta")
    with settings_alone(name, print) as settings:
        return policy_class(settings).without_weights(settings)


def _start_policy(config: TrainConfig) -> Policy:
    """What training begins with; CoRL has one world and one kind of tiny base."""
    return policy_without_weights(
        config.model, getattr(config, "world", "rendered"), getattr(config, "policy", "janus")
    )


def start_of(config: TrainConfig) -> tuple[Start, list[str]]:
    """How this very command would start, and lines about it; what stands in its way is part of the plan."""
    request = Request.of(config, sys.argv[0], sys.argv[1:])
    try:
        start = decide(request, os.environ)
    except ConfigError as error:
        nodes = config.nodes or 1
        ranks = nodes * (config.ranks_per_node or count_gpus(os.environ))
        missing = Start(how="here", nodes=nodes, ranks=ranks, words="")
        return missing, ["without --dry_run this command ends here, with exit code 2:", *str(error).splitlines()]
    return start, [start.words]


def show(
    config: TrainConfig,
    prompts_of: Callable[[int], Sequence[Prompt]],
    say: Callable[[str], None] = print,
    *,
    held_out: Callable[[], Sequence[Prompt]] = lambda: (),
    times: int = 2,
    beside: Callable[[Policy], Mapping[str, int]] = lambda policy: {},
    anchor_beta: float = 0.0,
    refers: bool = True,
    everything: Callable[[], Sequence[Prompt]] = lambda: (),
) -> Estimate:
    """Prints settings, plan, what it will take and the first step's prompts of one rank.

    Args:
        config: resolved settings.
        prompts_of: number of ranks to the prompts of the first one's first step.
        say: takes lines.
        held_out: the items that are scored; asked after `prompts_of`.
        times: that they are, beside eval_steps.
        beside: of a policy, what memory lasts beside the learner's: models that judge, by name, in bytes.
        anchor_beta: weight of the KL term on prompts without a reward.
        refers: the learner or a judge has a frozen copy of what is trained.
        everything: all prompts that the training may come to, whose lengths are checked; asked after `prompts_of`.

    Returns:
        What was said of the cost.

    Raises:
        ConfigError: a prompt that the model cannot take, or prompts that ranks cannot share.
        DataError, PictureError: data or a picture that cannot be read.
        RewardSpecError: a reward of the user's own that cannot be loaded or called.
    """
    for line in settings_lines(config):
        say(line)
    start, lines = start_of(config)
    nodes, ranks = ("s" * (count != 1) for count in (start.nodes, start.ranks))
    say(f"plan: {start.nodes} node{nodes}, {start.ranks} rank{ranks}, ZeRO stage {config.zero_stage}")
    for line in lines:
        say(f"  {line}")
    prompts = prompts_of(start.ranks)
    policy = Inputs.of(config).given_to(_start_policy(config))
    for note in checkpoint_notes(policy):
        say(f"model: {note}")
    check_batch(config, policy, prompts)
    check_lengths(policy, everything(), config.drawing_turn, config.max_completion_length)
    for line in remarks_on(policy, prompts):
        say(f"  {line}")
    try_own_rewards(config, policy, prompts, say)
    others = beside(policy)
    prepare(config, policy)
    memory = memory_of(config, policy, prompts, start.ranks, others, refers)
    unit = Unit.of(policy)
    estimate = estimate_of(config, policy, unit, prompts, start.ranks, memory, held_out(), times, anchor_beta)
    for line in estimate.lines():
        say(line)
    for name in (name for name, size in others.items() if not size):
        say(f"  not in the memory: {name}, whose size is known once it is there")
    say(f"data: the first step's {len(prompts)} prompts of a rank, their pictures opened and their lengths checked:")
    for prompt in prompts:
        say(f"  {prompt_words(prompt)}")
    return estimate


def prompt_words(prompt: Prompt) -> str:
    """A prompt of a step, and what is wanted of it."""
    photo = f" [{picture_names(prompt.images)}]" if prompt.images else ""
    wanted = (
        f"a text: {prompt.answer!r}"
        if prompt.answer
        else f"a drawing of {'it' if prompt.target in (None, prompt.text) else repr(prompt.target)}"
    )
    if prompt.answer and "image" in prompt.segments:
        wanted += ", then a drawing"
    task = training_task_words(prompt.task, drawn="image" in prompt.segments, rewarded=prompt.rewarded)
    return f"{task} ({prompt.task}){photo}: {prompt.text!r} -> {wanted}"


def settings_lines(config: TrainConfig) -> list[str]:
    """What differs from the defaults, a line each, and how many settings do not."""
    usual, here = (yaml.safe_load(to_yaml(of, comments=False)) for of in (type(config)(), config))
    del here["dry_run"]
    changed = {name: value for name, value in here.items() if value != usual[name]}
    lines = [f"settings that differ from the defaults, by flags or a settings file: {len(changed) or 'none'}"]
    lines += [f"  {name}: {shown(value)}" for name, value in changed.items()]
    source = f"recipes/{Path(sys.argv[0]).stem}.yaml" if Path(sys.argv[0]).stem in ("sync_r1", "corl") else ""
    where = f"{source} and --help explain" if source else "--help explains"
    return [*lines, f"  {len(here) - len(changed)} more are as they are by default: {where} every one"]


def shown(value: object) -> str:
    """A setting as YAML writes it, on a line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()


def nothing_trained(say: Callable[[str], None] = print) -> None:
    """The last line: what this was, and the command that trains."""
    words = _without_the_flag(sys.argv)
    flag = [] if len(words) < len(sys.argv) else ["--no_dry_run"]  # a file for --config asks for it
    say(f"this was a dry run: nothing was trained; to train: {shlex.join([_interpreter(), *words, *flag])}")


def _without_the_flag(words: Sequence[str]) -> list[str]:
    """The words but `--dry_run`, `--dry-run`, `--dry_run=yes` and `--dry_run yes`, as the flags' reader takes them."""
    kept, pending = [], list(words)
    while pending:
        word = pending.pop(0)
        name, equals, _ = word.partition("=")
        if name.replace("-", "_") not in ("__dry_run", "__no_dry_run"):
            kept.append(word)
        elif not equals and pending and not pending[0].startswith("--"):
            pending.pop(0)
    return kept


def _interpreter() -> str:
    """This Python as a shell finds it from here: another has none of what is installed."""
    here, found = Path(sys.executable), shutil.which("python")
    if found is not None and Path(found).absolute() == here:
        return "python"
    return str(here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here)


def try_own_rewards(config: TrainConfig, policy: Policy, prompts: Sequence[Prompt], say: Callable[[str], None]) -> None:
    """Loads the user's own rewards and calls each once, as a run does; RewardSpecError where one fails, ConfigError
    where one judges neither texts nor images."""
    specs = [spec for spec in config.reward_funcs if spec not in (*config.REWARDS, *NAMED)]
    loaded = {spec: load_reward(spec, budget=0.9 * config.reward_timeout) for spec in specs}
    own = {c.name: c.function for c in (own_column(spec, one, 1.0, "text") for spec, one in loaded.items())}
    problems = try_rewards(
        own,
        prompts,
        image_size=policy.image_size,
        encode=lambda text: policy.encode(text).tolist(),
        timeout=config.reward_timeout,
        state=state_of(config, 0),
    )
    if problems:
        raise RewardSpecError("\n".join(problems))
    if own:
        say(f"rewards: {', '.join(own)} loaded, and called once on made-up trajectories")


def check_batch(config: TrainConfig, policy: Policy, prompts: Sequence[Prompt]) -> None:
    """Opens every picture and checks every prompt's plan and length, as a rollout would."""
    objective_of(config, policy.num_image_tokens)  # for what it refuses
    check_order(config, policy)
    check_plans(policy, prompts)
    check_lengths(policy, prompts, config.drawing_turn, config.max_completion_length)
    for prompt in prompts:
        if prompt.images:
            policy.load_images(prompt.images)
        for picture in (prompt.real_image, *prompt.references):
            if picture is not None:
                open_picture(picture).close()
