"""A whole Sync-R1 run: one training on a UnifyBench++ folder, the rendered world, or a table of prompts."""

from __future__ import annotations

from ..evaluate.drawing import together
from ..learn.from_settings import check_order, objective_of
from ..processes.group import local_device, one_at_a_time, place
from ..records import Prompt
from ..rollout.capacity import LOOKED_AT, check_lengths, check_plans, remarks_on
from ..settings.yaml_files import to_yaml
from ..world.worlds import WORLDS
from .ahead_start import AheadOf
from .bad_rows import BadRows
from .data_checks import checked_chains, found_in
from .resume import resume_point
from .starting import add_adapters, loaded_from, starting_policy
from .sync_r1_config import SyncR1Config
from .sync_r1_parts import build_reward_set, evaluator_of, own_rewards, prepare_data, prepare_model, stream_of
from .training import Session, Summaries, Training, run_method, run_training


def run(config: SyncR1Config) -> Summaries:
    """Runs to the end and returns the summaries `before` and `after` (empty without evaluation)."""
    return run_method(config, train_and_score, dry_run, num_stages=4)


def train_and_score(config: SyncR1Config, session: Session) -> Summaries:
    """The run itself, on a rank of the process group."""
    display = session.display
    resumed = resume_point(config, display.note)
    display.stage("data and starting model")
    root = one_at_a_time(lambda: prepare_data(config))
    rows = BadRows.of(config, resumed.run_folder if resumed is not None and resumed.checkpoint is not None else None)
    own = own_rewards(config)
    loaded = checked_chains(config, root, display.note, rows)
    prompts, anchors, benchmark = loaded.prompts, loaded.anchors, loaded.held_out
    stream = stream_of(config, prompts, anchors, *place())
    model = one_at_a_time(lambda: prepare_model(config, display.note))  # last: a base may be trained for minutes
    policy = starting_policy(config, model, display)
    check_order(config, policy)
    check_plans(policy, prompts)
    for line in remarks_on(policy, prompts):
        display.note(line)
    most = None if config.data is not None else LOOKED_AT  # the rendered world's are short
    check_lengths(policy, [*prompts, *anchors], config.drawing_turn, config.max_completion_length, most=most)
    if not anchors and config.anchor_fraction > 0:
        display.note("no general/train in the data: training without anchors")
    held = (
        f", and {len(anchors)} anchors, which earn nothing and hold in place what is not trained on" if anchors else ""
    )
    display.note(f"{len(prompts)} training prompts{held}, from {root}")
    if loaded.no_scores:
        display.note(loaded.no_scores)
    frozen = add_adapters(config, policy).to(local_device())
    anchor_beta = config.anchor_beta if config.anchor_fraction > 0 else 0.0
    training = Training(
        method="Sync-R1",
        data=config.data or f"{WORLDS[config.world].title} of syncr1",
        found=found_in(loaded),
        policy=policy,
        reference=frozen,
        objective=objective_of(config, policy.num_image_tokens, anchor_beta),
        prompts=stream,
        rewards=build_reward_set(config, frozen, prompts, own),
        evaluator=one_at_a_time(lambda: evaluator_of(config, frozen, benchmark)) if benchmark else None,
        ahead=AheadOf(
            "syncr1.engine.methods.sync_r1_ahead",
            {
                "settings": to_yaml(config, comments=False),
                "model": loaded_from(policy, model),
                "skipped": loaded.skipped,
            },
        ),
    )
    return run_training(config, training, session, resumed).summaries


def dry_run(config: SyncR1Config) -> None:
    """Prints the resolved settings, the plan, what it will take and the first prompts, without loading a model."""
    from .dry_run import show
    from .reward_memory import image_reward_models, reward_models

    held_out: list[Prompt] = []
    everything: list[Prompt] = []

    def prompts_of(world_size: int) -> list[Prompt]:
        root = prepare_data(config)
        loaded = checked_chains(config, root, print)
        held_out.extend(*together(loaded.held_out, config.eval_samples))
        if config.data is not None:
            everything.extend([*loaded.prompts, *loaded.anchors])
        print(f"data: {root}: {len(loaded.prompts)} prompts, {len(loaded.anchors)} anchors")
        return stream_of(config, loaded.prompts, loaded.anchors, 0, world_size).next_step()

    show(
        config,
        prompts_of,
        held_out=lambda: held_out,
        everything=lambda: everything,
        beside=lambda policy: (
            reward_models({"CLIP": config.clip}) | image_reward_models(config.reward_funcs, config.reward_models)
        ),
        anchor_beta=config.anchor_beta if config.anchor_fraction > 0 else 0.0,
    )
