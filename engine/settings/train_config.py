"""Settings that every recipe has: model, sampling, objective, dynamic group scaling, learner, what is written.

`SyncR1Config` (methods/sync_r1_config.py) and `CorlConfig` (corl/config.py) are this and what their method adds.  Names
are TRL's where TRL has one.  Nothing heavy is imported, so that a mistyped flag is refused before torch is loaded.  The
docstring under a field is its flag's help and its comment in `recipes/*.yaml`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from .renamed import RENAMED
from .rules import TRAINING
from .schema import Range, Rule, Settings

Credit = Literal["shared", "per_segment", "image_only"]
PolicyLogp = Literal["conditional", "guided", "guided_detached"]
MaskedLogp = Literal["committed", "step", "all", "random_mask"]
Unconditional = Literal["fixed", "pads"]
PictureFit = Literal["processor", "crop", "pad"]
WorldName = Literal["rendered", "digits"]
TinyPolicy = Literal["janus", "show_o"]
LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
LRScheduler = Literal[
    "linear_with_min_lr", "linear", "cosine", "cosine_with_min_lr", "constant", "constant_with_warmup"
]
Tracker = Literal["tensorboard", "trackio", "wandb", "all", "none"]
ImportanceCorrection = Literal["none", "truncate", "mask"]
GpuName = Literal["b200", "h200", "h100", "h100-pcie", "h800", "h20", "a100", "a100-40gb", "a800", "l40s", "rtx4090"]
DGSRule = Literal["variance_mass", "max_variance", "top_k", "random", "none"]

# Fields of several recipes, or of several stages of one.
Seed = Annotated[int, Range("take any other number", ge=0, lt=2**32, words="0 to 2^32 - 1")]
PromptsPerStep = Annotated[int, Range("a step needs a prompt", ge=1)]
GroupSize = Annotated[int, Range("a group of one has no advantage; try 8", ge=2)]
MaxTokens = Annotated[int, Range("raise it", ge=1)]
Guidance = Annotated[float, Range("1 is without guidance", ge=0)]
TopK = Annotated[int, Range("0 keeps all", ge=0)]
TopP = Annotated[float, Range("1 keeps all", gt=0, le=1)]
MinP = Annotated[float, Range("0 keeps all", ge=0, le=1)]
ImageTopK = Annotated[int | None, Range("0 keeps all, none is as top_k", ge=0)]
ImageTopP = Annotated[float | None, Range("1 keeps all, none is as top_p", gt=0, le=1)]
ImageMinP = Annotated[float | None, Range("0 keeps all, none is as min_p", ge=0, le=1)]
ImageSteps = Annotated[int, Range("Show-o draws in 16 to 50", ge=1)]
ImageStepsOrRuns = Annotated[int | None, Range("Show-o draws in 16 to 50", ge=1)]
ImageNoise = Annotated[float, Range("0 keeps what is most likely", ge=0)]
ImageNoiseOrRuns = Annotated[float | None, Range("0 keeps what is most likely", ge=0)]
LearningRate = Annotated[float, Range("for Janus-Pro start near 1e-6", gt=0)]
WarmupSteps = Annotated[int, Range("0 starts at the peak", ge=0)]
KLWeight = Annotated[float, Range("0 switches the KL term off", ge=0)]
ClipRange = Annotated[float, Range("TRL's default is 0.2", gt=0, lt=1)]
PreviewFraction = Annotated[float, Range("0 switches the preview off", ge=0, lt=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig(Settings):
    """What a training run needs to know, whatever its method."""

    # --- model, data and output ---
    model: str | None = None
    """Checkpoint in transformers' format (Janus, Emu3, Chameleon, Liquid, Show-o, or a text decoder such as Qwen3 for
    prompts that ask for text alone) or, of Janus, DeepSeek's: a folder or a hub name. None: the tiny base, trained on
    first use."""
    image_folder: Path | None = None
    """Folder that the data's paths of pictures are relative to and stay within. None: that of the data file."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """Rows of the data that cannot be used (no right answer, a picture that is broken, a prompt that is too long): the
    run ends before its first step and names them (refuse), or leaves them out and counts them (skip)."""
    picture_fit: PictureFit = "processor"
    """How a photo comes to the size that the model sees: as the checkpoint's own image processor does it, cut at the
    centre to a square (crop), or whole on the mean colour (pad)."""
    chat_template_kwargs: tuple[str, ...] = ()
    """Arguments of the checkpoint's chat template, NAME=VALUE, where it takes any: enable_thinking=false,
    date_string="26 Jul 2024"."""
    output_dir: Path = Path("runs/sync_r1")
    """The run's folder; a number is appended when it already holds a run."""
    run_name: str | None = None
    """Name of the run in trackers, in the report and on the model's card. None: the folder's name."""
    seed: Seed = 0
    """Seeds sampling, prompt order and dropout; the same seed gives the same run."""

    # --- length of the run ---
    max_steps: Annotated[int, Range("--dry_run tries the settings without training", ge=1)] = 100
    """Rollout-and-update steps."""
    prompts_per_step: PromptsPerStep = 16
    """Groups per step, over all ranks (TRL: generation_batch_size / num_generations)."""
    num_generations: GroupSize = 8
    """G: trajectories per prompt. Their rewards are compared with each other, so at least 2."""
    num_iterations: Annotated[int, Range("1 is on-policy", ge=1)] = 1
    """Optimizer updates per rollout (the GRPO paper's mu); from the second one on the ratio leaves 1, and epsilon
    bounds it."""
    refill: Annotated[int, Range("0 trains on what was drawn first", ge=0)] = 0
    """Rounds of a step, at most, in which groups whose rewards are all equal are given up for new prompts (DAPO's
    dynamic sampling); 0: none."""

    rollout_staleness: Annotated[int, Range("0 samples each step with the newest weights", ge=0, le=1)] = 0
    """1: another process draws and scores the next step while this one trains, with the weights of one step before; one
    rank, an importance_correction, and on GPUs a second one for it. 0: one after the other."""

    # --- sampling ---
    temperature: Annotated[
        float, Range("1 samples the model's own distribution; greedy groups would be all alike", gt=0)
    ] = 1.0
    """Of text and image sampling; log-probabilities are taken at the same temperature."""
    image_temperature: Annotated[float | None, Range("leave it out to use temperature", gt=0)] = None
    """Of image tokens. None: as temperature."""
    max_completion_length: MaxTokens = 16
    """Text tokens at most; image segments always have the model's full number of tokens."""
    top_k: TopK = 0
    """Draw from the k most likely ids alone; 0: from all. What is kept travels with every token, and the loss is that
    of the distribution over it: on policy the ratio is 1, as without."""
    top_p: TopP = 1.0
    """Draw from the smallest set of ids that holds this share of what top_k left; 1: from all."""
    min_p: MinP = 0.0
    """Draw from ids with at least this share of the greatest probability alone; 0: from all. After top_k and top_p."""
    image_top_k: ImageTopK = None
    """top_k of image tokens, of the guided distribution. None: as top_k."""
    image_top_p: ImageTopP = None
    """top_p of image tokens. None: as top_p."""
    image_min_p: ImageMinP = None
    """min_p of image tokens. None: as min_p."""
    cfg_weight: Guidance = 1.5
    """Classifier-free guidance w of image tokens in rollouts: u + w (c - u); 1 is without. Janus-Pro draws at 5."""
    eval_cfg_weight: Guidance = 1.5
    """Guidance when images are drawn for evaluation and for showing."""
    unconditional: Unconditional = "fixed"
    """The prompt that u is computed behind: the model's own of a few tokens, one for all (fixed), or padding in the
    place of every token of the prompt, as Janus-Pro draws: one for each length of prompt (pads)."""
    drawing_turn: str = "none"
    """How an image is asked for behind the policy's own text: none (in the same answer), or in a new turn of the user:
    sync_r1 "{prompt}. {info} {text}", t2i_r1 "{prompt}. {text}", or a template of your own with {prompt} {text} {info}
    {concept}."""

    # --- the objective ---
    learning_rate: LearningRate = 5e-4
    """AdamW's peak. The default suits the tiny base; for Janus-Pro start near 1e-6."""
    warmup_steps: WarmupSteps = 5
    """Steps over which the rate rises linearly to its peak; then it follows lr_scheduler_type."""
    lr_scheduler_type: LRScheduler = "linear_with_min_lr"
    """How the rate falls until max_steps: to a tenth (…_with_min_lr), to 0 (linear, cosine), or not at all; constant
    has no warm-up either."""
    weight_decay: Annotated[float, Range("0 switches it off", ge=0)] = 0.0
    """AdamW's decoupled weight decay."""
    adam_beta1: Annotated[float, Range("0.9 is usual", ge=0, lt=1)] = 0.9
    """AdamW's decay of the mean gradient."""
    adam_beta2: Annotated[float, Range("0.98 is the default, transformers' is 0.999", ge=0, lt=1)] = 0.98
    """AdamW's decay of the mean squared gradient; transformers' default is 0.999."""
    adam_epsilon: Annotated[float, Range("1e-8 is usual", gt=0)] = 1e-8
    """What AdamW adds to the root of the mean squared gradient."""
    max_grad_norm: Annotated[float, Range("0 switches clipping off", ge=0)] = 1.0
    """Clip of the global gradient norm; 0 switches it off."""
    beta: KLWeight = 0.02
    """Weight of the k3 KL to the starting model; 0 needs no reference model."""
    image_beta: Annotated[float | None, Range("leave it out to use beta", ge=0)] = None
    """The same for image tokens. None: as beta."""
    loss_type: LossType = "dapo"
    """Per-token loss and its reduction, as TRL defines them."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Ratio per token, or one per trajectory: the geometric mean over its tokens (GSPO)."""
    epsilon: ClipRange = 0.2
    """Clip range of the ratio: at least 1 - epsilon."""
    epsilon_high: Annotated[float | None, Range("leave it out to use epsilon", gt=0)] = None
    """Clip range upwards: at most 1 + epsilon_high. None: the same as epsilon. For cispo it is the bound itself."""
    image_epsilon: Annotated[float | None, Range("leave it out to use epsilon", gt=0, lt=1)] = None
    """The clip range of image tokens. None: as epsilon."""
    image_epsilon_high: Annotated[float | None, Range("leave it out to use that of text", gt=0)] = None
    """The same upwards. None: as epsilon_high, and without that as image_epsilon."""
    delta: float | None = None
    """Bound of the ratio where the advantage is negative (two-sided clipping), above 1 + epsilon_high. None: none."""
    importance_correction: ImportanceCorrection = "none"
    """What multiplies a token's loss where trainer and sampler disagree about its probability: their ratio, cut off at
    importance_cap (truncate), or 0 where it is beyond (mask); none: nothing. It takes a forward pass more."""
    importance_level: Literal["token", "sequence"] = "token"
    """Of that ratio: each token's own, or the product over all that its trajectory sampled (TRL's token_truncate,
    sequence_mask, ...)."""
    importance_cap: Annotated[float, Range("TRL's default is 3", ge=1)] = 3.0
    """The largest ratio that is let through."""
    top_entropy_quantile: Annotated[float, Range("1 trains on all tokens", gt=0, le=1)] = 1.0
    """Share of each modality's tokens whose advantage is learnt from: those of highest entropy in the whole update. It
    takes a forward pass more."""
    scale_rewards: Literal["group", "batch", "none", "loo"] = "group"
    """What an advantage is divided by: its group's or the batch's standard deviation, or nothing (Sync-R1's released
    code); loo: leave-one-out baseline."""
    policy_logp: PolicyLogp = "conditional"
    """What is trained where guidance draws (cfg_weight other than 1): the log-probability of the conditional branch
    alone (T2I-R1, ULM-R1), or of u + w (c - u), which was sampled from, with a gradient through both branches (guided:
    Sync-R1) or through c alone (guided_detached)."""
    image_steps: ImageSteps = 16
    """Steps in which a model that draws in masked order (Show-o) fills in an image."""
    image_noise: ImageNoise = 1.0
    """How much chance decides, at first, which places such a step keeps; Sync-R1 has 1.8 under previews."""
    masked_logp: MaskedLogp = "committed"
    """What of such an image is trained: each token in the state of the step that settled it (committed), with one
    ratio for a whole step (step: Mask-GRPO); in every state all places (all: Sync-R1's released code); or the finished
    image with a random share masked anew (random_mask: UniGRPO)."""
    masked_steps: Annotated[int | None, Range("leave it out to train all steps", ge=1)] = None
    """Train on so many steps of each image, drawn at random, their loss weighted so that its expectation is that of
    all; with random_mask: maskings of each. None: all steps; one masking."""
    credit: Credit = "shared"
    """Which reward a token answers for: both segments share one advantage (the paper), each its own segment's
    rewards, or only image tokens learn (Sync-R1's released code)."""
    text_loss_weight: Annotated[float, Range("0 leaves text tokens out", ge=0)] = 1.0
    """Weight of text tokens in the loss."""
    image_loss_weight: Annotated[float, Range("0 leaves image tokens out", ge=0)] = 1.0
    """Weight of image tokens in the loss."""

    # --- rewards ---
    reward_funcs: tuple[str, ...] = ()
    """Rewards: the recipe's own by name, and yours: `module:function`, `file.py:function`, `verl@file.py:function`,
    `unirl@http://127.0.0.1:8080#pickscore` (docs/rewards.md)."""
    reward_weights: tuple[float, ...] = ()
    """One for each of reward_funcs. None given: 1 for each."""
    reward_models: tuple[str, ...] = ()
    """Checkpoints of image rewards that are named in reward_funcs, in place of the published ones: `clip=FOLDER`,
    `geneval=google/owlv2-base-patch16-ensemble`, … (docs/image_rewards.md)."""
    judge_url: str | None = None
    """Address of an OpenAI-compatible server that judges drawings, e.g. http://127.0.0.1:8000/v1; https, or this
    machine. Sync-R1's judge is then this one; CoRL names it `judge` in reward_funcs."""
    judge_model: str | None = None
    """Name of the model there."""
    judge_key_env: str | None = None
    """Environment variable that holds the server's key, where it needs one; the key itself is written nowhere."""
    reward_timeout: Annotated[float, Range("a reward needs time; 120 is the default", gt=0)] = 120.0
    """Seconds that a step's reward functions may take; a late one counts as failed, never as 0."""

    # --- dynamic group scaling ---
    dgs: DGSRule = "variance_mass"
    """Which trajectories are trained on once their rewards are known; random, the control, keeps as many as
    variance_mass does; none prunes nothing."""
    dgs_mass: Annotated[float, Range("1 keeps every trajectory that has an advantage", gt=0, le=1)] = 0.9
    """variance_mass: share of the group's sum of squared advantages that is kept."""
    dgs_keep: Annotated[int | None, Range("--dgs none keeps all", ge=1)] = None
    """max_variance and top_k: trajectories kept per group."""
    preview_fraction: PreviewFraction = 0.25
    """Preview DGS: score a trajectory after this fraction of its image tokens; 0 switches the preview off."""
    preview_completion: Literal["repeat", "likely"] = "repeat"
    """The rest of a picture in its preview: its last drawn row again, or, by one more pass of the model over those
    rows, the most likely tokens, which tells more of the finished drawing."""
    preview_threshold: Annotated[float | None, Range("rewards lie in this range", ge=0, le=1, words="0 to 1")] = None
    """Score above which a preview is accepted at the start; adapts afterwards. None: from the first step's previews, so
    that the target acceptance is met."""
    preview_acceptance: Annotated[float, Range("1 accepts every preview", gt=0, le=1)] = 0.75
    """Acceptance rate that the threshold adapts to (the released code: 0.25)."""
    preview_dead_band: Annotated[float, Range("0 follows every step's acceptance", ge=0, lt=1)] = 0.0
    """The threshold stays where it would move by no more than this. The released code's is 0.005, so that it moves by
    0.005 or not at all; 0 steers to the target itself."""
    preview_max_attempts: Annotated[int, Range("1 never tries again", ge=1)] = 2
    """Tries per trajectory; the best one is kept when none passes."""
    preview_min_keep: Annotated[int | None, Range("rewards are compared within a group", ge=2)] = None
    """Give up members whose tries all failed, except this many of a group, the best ones. None: nobody is given up."""

    # --- the learner ---
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO: what the ranks share out. 1: optimizer state, 2: also gradients, 3: also parameters."""
    bf16: bool = False
    """Compute in bfloat16 with float32 master weights."""
    max_tokens_per_microbatch: Annotated[int, Range("16384 fits the tiny base", ge=1)] = 16384
    """Packed tokens of one forward and backward. Lower it when memory runs out; the result stays the same."""
    share_prefix: bool = True
    """Compute a prompt once for its whole group in training; off, every trajectory brings a copy: the same result."""
    gradient_checkpointing: bool = False
    """Keep one activation per layer and compute the others again in backward: less memory, a third more time."""
    lora_rank: Annotated[int, Range("0 trains the weights themselves", ge=0)] = 0
    """Train low-rank adapters of this rank in the decoder (peft) instead of its weights; 0 trains the weights. The KL
    term then needs no second copy of the model, and what is saved is the merged model with the adapter beside it."""
    lora_alpha: Annotated[float, Range("twice the rank is usual", gt=0)] = 32.0
    """Scale of the adapters: alpha / rank."""
    lora_target_modules: tuple[str, ...] = ()
    """Linear layers that get an adapter, by the end of their names, e.g. q_proj v_proj. None named: all of them."""
    use_liger_kernel: bool = True
    """Liger's RMSNorm, SwiGLU and RoPE in the language model, on a GPU."""
    cuda_graphs: bool = True
    """Replay decoding steps as CUDA graphs, on a GPU and below ZeRO-3."""
    compile_decode: bool = False
    """Run decoding steps through torch.compile."""
    nodes: Annotated[int | None, Range("1 is this machine", ge=1)] = None
    """Machines: with Slurm, torchrun or a hostfile; with none of them the exact commands are said, and nothing starts.
    None: as many as torchrun started or as the hostfile names, else this one."""
    ranks_per_node: Annotated[int | None, Range("leave it out for one per GPU", ge=1)] = None
    """Processes per machine. None: one per GPU (a hostfile's slots) where nodes is given, else one."""
    hostfile: Path | None = None
    """Machines in DeepSpeed's form, `name slots=n` per line. None: /job/hostfile where nodes needs one."""
    launcher: str = "ssh"
    """What reaches a hostfile's machines: ssh, or a command with {host} in it that runs its last words there."""
    max_restarts: Annotated[int, Range("0 gives up at the first loss", ge=0)] = 3
    """How often in a row, without a new checkpoint in between, all ranks start again from the last one when a rank or a
    machine is lost; not for one process."""
    stage_timeout: Annotated[float, Range("more than the longest rollout takes; 1800 is the default", gt=0)] = 1800.0
    """Seconds that a stage of a step (rollout, reward, update, the scores of eval_steps, ...) may take before the run
    ends with the stacks of the rank that holds it up."""
    shutdown_timeout: Annotated[int, Range("more than a step and a checkpoint take; 120 is the default", ge=1)] = 120
    """Seconds that ranks have, once SIGTERM or SIGUSR1 asks a launcher to end, to finish their step, with its scores
    where eval_steps asks for them, and to save."""
    max_skipped_updates: Annotated[int, Range("0 ends the run at the first one", ge=0)] = 10
    """Updates in a row whose gradients are NaN or infinite, and which all ranks skip, before the run ends."""

    # --- what is written and shown ---
    eval_samples: Annotated[int, Range("0 skips the evaluation", ge=0)] = 192
    """Held-out items per task in the before/after table; 0 skips the evaluation."""
    eval_steps: Annotated[int, Range("0 scores only before and after", ge=0)] = 0
    """Every this many steps the held-out items are scored, into metrics.jsonl as eval/…, and the best model so far is
    kept whole in checkpoints/best; 0: only before and after."""
    metric_for_best_model: str | None = None
    """The score that says which model is best, higher is better: `score`, or a name in scores.json such as
    summary/understanding/greedy. None: score, the mean over trained tasks of each task's main score."""
    load_best_model_at_end: bool = False
    """The run's result (scores, card, what is pushed or trained on) is checkpoints/best; off: the last step's model."""
    report_to: tuple[Tracker, ...] = ()
    """Trackers beside metrics.jsonl and report.html, which are always written. all: those that are installed."""
    log_completions: bool = True
    """Trackers get tables of prompts, texts, pictures and rewards, every sample_steps."""
    logging_steps: Annotated[int, Range("1 logs every step", ge=1)] = 1
    """Every this many steps a line is printed (where there is no terminal) and sent to the trackers."""
    report_steps: Annotated[int, Range("0 writes report.html at the end alone", ge=0)] = 1
    """Every this many steps report.html is rewritten, which a browser then reloads by itself: at most every 10 seconds,
    and in at most a hundredth of the run's time. 0: at the end alone."""
    replay_check_steps: Annotated[int, Range("0 never checks", ge=0)] = 10
    """Every this many steps the sampler's log-probabilities are compared with the trainer's; 0: never."""
    sample_steps: Annotated[int, Range("0 never writes samples", ge=0)] = 20
    """Every this many steps an image grid with prompts and texts goes to `samples/`; 0: never."""
    checkpointing_steps: Annotated[int, Range("0 saves at the end alone", ge=0)] = 20
    """Every this many steps everything that the training depends on goes to `checkpoints/`, so that it can be resumed;
    0: only at the end."""
    save_total_limit: Annotated[int | None, Range("leave it out to keep all", ge=1)] = 2
    """Checkpoints to resume from that are kept, the newest ones. None: all."""
    push_to_hub: bool = False
    """Upload the saved model and its card to the hub at the end, with the token of HF_TOKEN or `hf auth login`."""
    hub_model_id: str | None = None
    """`name` or `organisation/name` on the hub. None: run_name, or the folder's name, under your own."""
    hub_private_repo: bool = True
    """A repository that the upload makes is private."""
    resume_from_checkpoint: str | None = None
    """Go on from a checkpoint, in its own run's folder: `latest` (of output_dir; a new run where there is none yet), a
    run's folder, or one checkpoint."""
    dry_run: bool = False
    """Print the resolved settings, nodes and ranks, GPU-hours, memory and disk that it will take, and one checked data
    batch, then end; no GPU is needed."""
    gpu: GpuName | None = None
    """What dry_run counts GPU-hours and memory for. None: this machine's, else an H100."""

    RULES: ClassVar[tuple[Rule, ...]] = TRAINING
    GOES_WITH: ClassVar[dict[str, str]] = {"reward_weights": "reward_funcs"}
    """A list that says nothing of others than those that it was written with."""
    REWARDS: ClassVar[tuple[str, ...]] = ()
    """What reward_funcs may name beside functions of a user's own."""
    RENAMED: ClassVar[Mapping[str, str]] = RENAMED
