"""Names and values that people bring from TRL, transformers, verl and diffusers, and what to set here instead.

The one table of them: flags, YAML keys, verl's `key=value` and values are all looked up here.  A name that is ours
needs no entry.  Everything in TRL's `GRPOConfig` and `ModelConfig` is ours or stands here; the tests walk their fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate


def _all(remedy: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, remedy)


OWN_ROLLOUTS = "rollouts are the engine's own, in the trainer's process; leave it out"
ADAMW = "the optimizer is AdamW; set learning_rate, weight_decay, adam_beta1, adam_beta2 and adam_epsilon"
CORRECTION = "set importance_correction (truncate, mask), importance_level and importance_cap"
AHEAD = "set rollout_staleness (0 or 1) and importance_correction truncate"
WHOLE_MEMORY = "for memory set max_tokens_per_microbatch, gradient_checkpointing, zero_stage or lora_rank"
NO_TOKEN = "leave it out: the token comes from HF_TOKEN or `hf auth login`, and is written nowhere"
RANKS = "set nodes and ranks_per_node; zero_stage shares the model out"
NO_LOADER = "leave it out: prompts are few and lie in memory, without loader processes"
ONE_PROMPT_ONE_GROUP = "set prompts_per_step (groups) and max_tokens_per_microbatch (memory)"
WHOLE_VOCABULARY = "what is sampled is what is trained; set temperature, top_k, top_p or min_p"
STATIC = "text tokens of one model are trained; leave it out"
TRACKED = "metrics.jsonl and the report have it always; leave it out"
ENTROPY = "the loss has no entropy term; watch entropy/… in metrics.jsonl, and raise temperature"
NO_CRITIC = "there is no critic: advantages are within groups; leave it out"
NO_SERVERS = "there is no Ray and no server beside the ranks; set nodes and ranks_per_node"
NOT_DIFFUSION = "images are drawn token by token here, not by diffusion; leave it out"
PICTURES = "pictures are brought to the model's own size by its processor; leave it out"
UNMASKED = "a truncated text is trained as it is; raise max_completion_length"
ONE_REFERENCE = "the KL term refers to the starting model throughout; set beta"

TRL: dict[str, str] = {
    # Data, model, output.
    **_all("set model", "model_name_or_path", "model_id", "base_model", "model_path"),
    **_all("set data", "dataset_name", "dataset", "train_file", "dataset_path", "dataset_config"),
    **_all("set data_split of recipes/corl.py", "dataset_train_split"),
    **_all("set eval_split of recipes/corl.py", "dataset_test_split"),
    **_all("tables are read whole; leave it out", "dataset_streaming", "ignore_data_skip", "shuffle_dataset"),
    **_all("all columns reach the reward functions; leave it out", "remove_unused_columns", "label_names"),
    **_all("the model's own folder or name says it; set model", "model_revision", "model_init_kwargs", "config_name"),
    **_all("code of a checkpoint is never run; leave it out", "trust_remote_code"),
    **_all("attention is the engine's own; leave it out", "attn_implementation", "cache_implementation", "use_cache"),
    **_all("set bf16", "dtype", "torch_dtype", "bf16_full_eval", "half_precision_backend", "fp16", "fp16_full_eval"),
    **_all("heads and log-probabilities are float32 where it matters; leave it out", "cast_lm_head_to_fp32"),
    **_all("torch's own default holds; leave it out", "tf32"),
    **_all("runs have numbered folders, none is overwritten; leave it out", "overwrite_output_dir"),
    # Length of the run and its batches.
    **_all("set max_steps", "num_train_epochs", "num_epochs", "epochs", "total_steps"),
    **_all(ONE_PROMPT_ONE_GROUP, "per_device_train_batch_size", "auto_find_batch_size", "batch_size", "bs"),
    **_all("accumulation follows from max_tokens_per_microbatch", "gradient_accumulation_steps"),
    **_all("set prompts_per_step, which counts groups", "generation_batch_size"),
    **_all("set num_iterations; a step has one rollout", "steps_per_generation"),
    **_all(AHEAD, "max_staleness", "max_async_level", "max_head_offpolicyness", "max_trajectory_age_steps"),
    **_all("held-out items are drawn by the batch; set eval_samples", "per_device_eval_batch_size", "eval_batch_size"),
    **_all("set eval_samples", "num_generations_eval", "eval_accumulation_steps", "batch_eval_metrics"),
    **_all(NO_LOADER, *(f"dataloader_{name}" for name in ("num_workers", "pin_memory", "persistent_workers"))),
    **_all(NO_LOADER, *(f"dataloader_{name}" for name in ("prefetch_factor", "drop_last", "in_order"))),
    **_all(NO_LOADER, "dataloader_multiprocessing_context"),
    **_all("every epoch has an order of its own, from seed; leave it out", "train_sampling_strategy", "data_seed"),
    **_all("packing sorts by itself; leave it out", "group_by_length", "length_column_name", "pad_to_multiple_of"),
    # Optimizer.
    **_all("set learning_rate", "lr", "learning-rate", "peak_lr"),
    **_all("set lr_scheduler_type", "lr_scheduler", "scheduler", "lr_decay_style", "lr_scheduler_kwargs"),
    **_all("set warmup_steps, a number of steps", "warmup_ratio", "num_warmup_steps", "lr_warmup_steps"),
    **_all(ADAMW, "optim", "optim_args", "optim_target_modules", "optimizer"),
    **_all("set weight_decay", "adam_weight_decay"),
    **_all("set max_grad_norm", "grad_clip", "clip_grad", "gradient_clipping", "max_norm"),
    **_all("losses are divided by all ranks' tokens always; leave it out", "average_tokens_across_devices"),
    **_all("it is for supervised losses; leave it out", "label_smoothing_factor", "neftune_noise_alpha"),
    **_all("dropout is off in training; leave it out", "disable_dropout", "lora_dropout"),
    # Memory and speed.
    **_all("set gradient_checkpointing", "activation_checkpointing", "activation_checkpointing_kwargs"),
    **_all("set gradient_checkpointing", "gradient_checkpointing_kwargs"),
    **_all("set compile_decode, which compiles decoding", *(f"torch_compile{n}" for n in ("", "_backend", "_mode"))),
    **_all("set use_liger_kernel", "liger_kernel_config", "use_liger", "use_liger_loss"),
    **_all(WHOLE_MEMORY, "torch_empty_cache_steps", "skip_memory_metrics", "load_in_8bit", "load_in_4bit"),
    **_all(WHOLE_MEMORY, "bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"),
    **_all("set lora_rank", "use_peft", "lora_r", "peft_config", "lora_task_type", "use_rslora", "use_dora"),
    **_all("set lora_target_modules", "lora_target_parameters", "lora_modules_to_save"),
    # Ranks.
    **_all("set zero_stage", "deepspeed", "fsdp", "fsdp_config", "ds3_gather_for_generation"),
    **_all(
        RANKS, "accelerator_config", "parallelism_config", "local_rank", "num_processes", "num_gpus", "nproc_per_node"
    ),
    **_all(RANKS, *(f"ddp_{name}" for name in ("find_unused_parameters", "bucket_cap_mb", "broadcast_buffers"))),
    **_all(RANKS, "ddp_static_graph", "ddp_backend", "ignore_bias_buffers"),
    **_all("set stage_timeout", "ddp_timeout"),
    **_all("a GPU is used where there is one; hide it with CUDA_VISIBLE_DEVICES=", "use_cpu", "no_cuda"),
    # What is written.
    **_all("set logging_steps", "logging_strategy", "logging_first_step", "log_level", "log_level_replica"),
    **_all(TRACKED, "log_on_each_node", "logging_nan_inf_filter", "include_num_input_tokens_seen", "disable_tqdm"),
    **_all(TRACKED, "include_for_metrics", "debug", "logging_dir"),
    **_all("the project's name is syncr1; set run_name", "project", "project_name", "wandb_project"),
    **_all("set report_to trackio, and TRACKIO_SPACE_ID in the environment", "trackio_space_id", "trackio_bucket_id"),
    **_all("set report_to trackio, and TRACKIO_SPACE_ID in the environment", "trackio_static_space_id"),
    **_all("set eval_steps; 0 scores only before and after", "eval_strategy", "evaluation_strategy", "eval_delay"),
    **_all("the starting model is always scored; set eval_samples", "eval_on_start", "do_eval", "do_predict"),
    **_all("set eval_samples", "prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object"),
    **_all("training is what the recipe does; --dry_run tries the settings", "do_train"),
    **_all("every held-out score is better when it is higher; set metric_for_best_model", "greater_is_better"),
    **_all("set checkpointing_steps", "save_steps", "save_strategy", "save_freq", "save_interval"),
    **_all("the model is saved in checkpoints/last beside them; set checkpointing_steps", "save_only_model"),
    **_all("a checkpoint is written once, by all ranks; leave it out", "save_on_each_node"),
    **_all("SIGTERM and SIGUSR1 save always; set shutdown_timeout", "enable_jit_checkpoint"),
    **_all("resuming puts everything back; set resume_from_checkpoint", "restore_callback_states_from_checkpoint"),
    **_all("the same seed gives the same run already; set seed", "full_determinism"),
    **_all(NO_TOKEN, "hub_token", "use_auth_token", "token"),
    **_all("the upload is at the end; set push_to_hub", "hub_strategy", "hub_always_push", "hub_revision"),
    # GRPO.
    **_all("set epsilon", "epsilon_low", "clip_range", "clip_eps", "cliprange"),
    **_all("set beta", "kl_coef", "kl_loss_coef", "use_kl_loss", "init_kl_coef"),
    **_all("set num_generations", "group_size", "n", "rollout_n", "num_return_sequences"),
    **_all("set max_completion_length", "max_new_tokens", "max_tokens", "response_length"),
    **_all("prompts are taken whole, up to the model's positions; shorten them in data", "max_prompt_length"),
    **_all(
        "prompts are taken whole, up to the model's positions; shorten them in data", "max_length", "max_seq_length"
    ),
    **_all(WHOLE_VOCABULARY, "repetition_penalty", "generation_kwargs"),
    **_all("set cfg_weight", "guidance_scale", "cfg_scale", "cfg"),
    **_all("set think_instruction of recipes/corl.py", "system_prompt", "instruction"),
    **_all("totals are summed, then compared in groups; set scale_rewards", "multi_objective_aggregation"),
    **_all("set judge_url and judge_model, or name it in reward_funcs", "reward_model_name_or_path", "reward_model"),
    **_all("the loss has TRL's default of it; set loss_type", "sapo_temperature_neg", "sapo_temperature_pos"),
    **_all("the loss has TRL's default of it; set loss_type", "vespo_k_pos", "vespo_k_neg"),
    **_all("the loss has TRL's default of it; set loss_type", "vespo_lambda_pos", "vespo_lambda_neg"),
    **_all(UNMASKED, "mask_truncated_completions"),
    **_all(ONE_REFERENCE, "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
    **_all("the KL term is not weighted by the ratio, which num_iterations 1 keeps at 1", "use_bias_correction_kl"),
    **_all(ENTROPY, "entropy_coef", "use_adaptive_entropy", "entropy_coef_min", "entropy_coef_max", "entropy_target"),
    **_all(ENTROPY, "entropy_coef_delta", "entropy_coeff"),
    **_all("set num_iterations 1: rollouts are then never old", "off_policy_mask_threshold"),
    **_all("the models here have no experts to balance; leave it out", "router_aux_loss_coef"),
    **_all("one turn is trained; leave it out", "max_tool_calling_iterations"),
    **_all("set log_completions and sample_steps; samples/ has them all", "log_multimodal", "log_unique_prompts"),
    **_all("set log_completions and sample_steps; samples/ has them all", "num_completions_to_print"),
    **_all("set log_completions; the run's own samples/ has them all", "log_completions_hub_repo"),
    **_all(OWN_ROLLOUTS, "use_vllm", "use_transformers_paged", "use_transformers_continuous_batching"),
    **_all(OWN_ROLLOUTS, "transformers_continuous_batching_config"),
    **_all(
        OWN_ROLLOUTS,
        *(f"vllm_{name}" for name in ("mode", "model_impl", "enable_sleep_mode", "structured_outputs_regex")),
        *(f"vllm_server_{name}" for name in ("base_url", "host", "port", "timeout")),
        *(
            f"vllm_{name}"
            for name in ("group_port", "gpu_memory_utilization", "max_model_length", "tensor_parallel_size")
        ),
    ),
    **_all(
        CORRECTION, *(f"vllm_importance_sampling_{n}" for n in ("correction", "mode", "clip_max", "clip_min", "cap"))
    ),
}
"""TRL's and transformers' arguments, and the short forms that are usual beside them."""

DIFFUSERS: dict[str, str] = {
    **_all("set model", "pretrained_model_name_or_path", "pretrained_model"),
    **_all("the model's own folder or name says it; set model", "revision", "variant", "tokenizer_name", "cache_dir"),
    **_all(
        "set data, a UnifyBench++ folder (docs/data.md): photos of each concept and what is asked of it",
        *("instance_data_dir", "instance_prompt", "train_data_dir", "placeholder_token", "initializer_token"),
        *("dataset_config_name", "image_column", "caption_column", "conditioning_image_column", "max_train_samples"),
    ),
    **_all(
        "what shall stay as it was is held by anchors; set anchor_fraction and anchor_beta of recipes/sync_r1.py",
        *("with_prior_preservation", "class_data_dir", "class_prompt", "num_class_images", "prior_loss_weight"),
        *("prior_generation_precision", "sample_batch_size"),
    ),
    **_all("set max_steps", "max_train_steps"),
    **_all(ONE_PROMPT_ONE_GROUP, "train_batch_size"),
    **_all("set bf16", "mixed_precision"),
    **_all("set learning_rate for the whole step; it is not scaled", "scale_lr"),
    **_all("set lr_scheduler_type", "lr_num_cycles", "lr_power"),
    **_all(ADAMW, "use_8bit_adam", "use_prodigy", "prodigy_beta3"),
    **_all("set save_total_limit", "checkpoints_total_limit"),
    **_all("set lora_rank", "rank", "use_lora"),
    **_all("the whole decoder is trained, or its adapters; set lora_rank", "train_text_encoder", "text_encoder_lr"),
    **_all("set sample_steps; held-out items are the data's own", "validation_prompt", "validation_prompts"),
    **_all("set sample_steps; held-out items are the data's own", "num_validation_images", "validation_images"),
    **_all("set eval_steps", "validation_epochs", "validation_steps"),
    **_all(PICTURES, "resolution", "center_crop", "random_flip", "image_interpolation_mode"),
    **_all(
        NOT_DIFFUSION,
        *("snr_gamma", "noise_offset", "prediction_type", "num_inference_steps", "input_perturbation", "use_ema"),
        *("pre_compute_text_embeddings", "tokenizer_max_length", "text_encoder_use_attention_mask", "offload_ema"),
        *("class_labels_conditioning", "dream_training", "dream_detail_preservation", "foreach_ema", "strength"),
    ),
    **_all("attention is the engine's own; leave it out", "enable_xformers_memory_efficient_attention"),
    **_all("torch's own default holds; leave it out", "allow_tf32"),
}
"""Arguments of diffusers' train_dreambooth*.py and train_text_to_image*.py that TRL has not."""

VERL: dict[str, str] = {
    "actor_rollout_ref.model.path": "set model",
    "actor_rollout_ref.model.lora_rank": "set lora_rank",
    "actor_rollout_ref.model.lora_alpha": "set lora_alpha",
    "actor_rollout_ref.model.target_modules": "set lora_target_modules",
    "actor_rollout_ref.model.enable_gradient_checkpointing": "set gradient_checkpointing",
    "actor_rollout_ref.model.use_liger": "set use_liger_kernel",
    "actor_rollout_ref.model.trust_remote_code": "code of a checkpoint is never run; leave it out",
    "actor_rollout_ref.model": "set model",
    "actor_rollout_ref.rollout.n": "set num_generations",
    "actor_rollout_ref.rollout.temperature": "set temperature",
    "actor_rollout_ref.rollout.top_p": "set top_p",
    "actor_rollout_ref.rollout.top_k": "set top_k, where all ids are 0 in place of -1",
    "actor_rollout_ref.rollout.response_length": "set max_completion_length",
    "actor_rollout_ref.rollout.val_kwargs": "held-out items are drawn greedily and at temperature 1; set eval_samples",
    "actor_rollout_ref.rollout.calculate_log_probs": "set replay_check_steps",
    "actor_rollout_ref.rollout.enforce_eager": "set cuda_graphs",
    "actor_rollout_ref.rollout": OWN_ROLLOUTS,
    "actor_rollout_ref.actor.optim.lr": "set learning_rate",
    "actor_rollout_ref.actor.optim.weight_decay": "set weight_decay",
    "actor_rollout_ref.actor.optim.betas": "set adam_beta1 and adam_beta2",
    "actor_rollout_ref.actor.optim.lr_warmup_steps": "set warmup_steps",
    "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio": "set warmup_steps, a number of steps",
    "actor_rollout_ref.actor.optim.total_training_steps": "set max_steps",
    "actor_rollout_ref.actor.optim": "set lr_scheduler_type, learning_rate, warmup_steps and weight_decay",
    "actor_rollout_ref.actor.ppo_mini_batch_size": "a step's rollouts are one update; set num_iterations to repeat it",
    "actor_rollout_ref.actor.ppo_epochs": "set num_iterations",
    "actor_rollout_ref.actor.tis_imp_ratio_cap": "set importance_correction truncate, and importance_cap",
    "actor_rollout_ref.actor.clip_ratio": "set epsilon",
    "actor_rollout_ref.actor.clip_ratio_low": "set epsilon",
    "actor_rollout_ref.actor.clip_ratio_high": "set epsilon_high",
    "actor_rollout_ref.actor.clip_ratio_c": "set delta",
    "actor_rollout_ref.actor.policy_loss": "set loss_type and importance_sampling_level",
    "actor_rollout_ref.actor.loss_agg_mode": "set loss_type: dapo is token-mean, grpo seq-mean-token-mean",
    "actor_rollout_ref.actor.entropy_coeff": ENTROPY,
    "actor_rollout_ref.actor.use_kl_loss": "set beta; 0 is without",
    "actor_rollout_ref.actor.kl_loss_coef": "set beta",
    "actor_rollout_ref.actor.kl_loss_type": "the KL term is k3 (low_var_kl); set beta",
    "actor_rollout_ref.actor.grad_clip": "set max_grad_norm",
    "actor_rollout_ref.actor.fsdp_config": "set zero_stage",
    "actor_rollout_ref.actor.strategy": "set zero_stage",
    "actor_rollout_ref.actor.checkpoint": "set checkpointing_steps",
    "actor_rollout_ref.actor": WHOLE_MEMORY,
    "actor_rollout_ref.ref": "the reference is the starting model; set beta",
    "actor_rollout_ref": "set model, num_generations and learning_rate",
    "algorithm.adv_estimator": "set scale_rewards: group is grpo, none is Dr. GRPO's, loo is rloo; there is no critic",
    "algorithm.norm_adv_by_std_in_grpo": "set scale_rewards: group divides by the deviation, none does not",
    "algorithm.use_kl_in_reward": "the KL term is in the loss; set beta",
    "algorithm.kl_ctrl": "set beta",
    "algorithm.kl_penalty": "the KL term is k3 (low_var_kl); set beta",
    "algorithm.filter_groups": "set refill: groups without spread are drawn anew; dgs prunes what stays without",
    "algorithm.rollout_correction": CORRECTION,
    "algorithm.rollout_is": CORRECTION,
    "algorithm.rollout_is_threshold": "set importance_cap",
    "algorithm": "advantages are within groups; set scale_rewards",
    "data.train_batch_size": "set prompts_per_step",
    "data.gen_batch_size": "set prompts_per_step",
    "data.val_batch_size": "set eval_samples",
    "data.train_files": "set data",
    "data.val_files": "set eval_data of recipes/corl.py; a table's split test is held out by itself",
    "data.max_response_length": "set max_completion_length",
    "data.max_prompt_length": "prompts are taken whole, up to the model's positions; shorten them in data",
    "data.seed": "set seed",
    "data": "columns are told by their names (docs/data.md); set data",
    "trainer.total_training_steps": "set max_steps",
    "trainer.total_epochs": "set max_steps",
    "trainer.experiment_name": "set run_name",
    "trainer.project_name": "the project's name is syncr1; set run_name",
    "trainer.logger": "set report_to",
    "trainer.nnodes": "set nodes",
    "trainer.n_gpus_per_node": "set ranks_per_node",
    "trainer.save_freq": "set checkpointing_steps",
    "trainer.test_freq": "set eval_steps",
    "trainer.val_before_train": "the starting model is always scored; set eval_samples",
    "trainer.log_val_generations": "set log_completions and sample_steps",
    "trainer.default_local_dir": "set output_dir",
    "trainer.resume_mode": "set resume_from_checkpoint",
    "trainer.resume_from_path": "set resume_from_checkpoint",
    "trainer.max_actor_ckpt_to_keep": "set save_total_limit",
    "trainer.rollout_data_dir": "samples/ has them; set sample_steps",
    "trainer.validation_data_dir": "samples/ has them; set sample_steps",
    "trainer": "max_steps, output_dir, run_name, report_to, nodes and eval_steps say what a run does",
    "critic": NO_CRITIC,
    "reward_model": "set judge_url and judge_model, or name it in reward_funcs",
    "reward": "set judge_url and judge_model, or name it in reward_funcs",
    "custom_reward_function": "set reward_funcs: verl@file.py:function takes verl's own signature",
    "ray_kwargs": NO_SERVERS,
    "global_profiler": "seconds of every stage are in metrics.jsonl; leave it out",
    "hydra": "there is no hydra here; set output_dir",
}
"""verl's configuration by its dotted path; a path that is not here has the remedy of the longest one above it."""

RENAMED: Mapping[str, str] = VERL | DIFFUSERS | TRL
"""Flags and YAML keys of a training."""

OF_EVALUATION: Mapping[str, str] = {
    **_all("set model", "model_name_or_path", "pretrained_model_name_or_path", "pretrained", "checkpoint"),
    **_all("set data", "dataset_name", "dataset"),
    **_all("set limit", "num_items", "eval_samples", "num_samples"),
    **_all("set benchmark", "benchmarks", "eval_tasks"),
    **_all("set cfg_weight", "eval_cfg_weight", "guidance_scale", "cfg_scale"),
    **_all("set max_completion_length", "max_new_tokens", "max_tokens"),
    **_all("set images_per_prompt", "num_generations", "num_images_per_prompt", "n"),
    **_all("set batch_size", "per_device_eval_batch_size", "eval_batch_size"),
    **_all("set output_dir", "output_path"),
    **_all("set bf16", "dtype", "torch_dtype", "mixed_precision"),
}
"""Flags and YAML keys of recipes/evaluate.py."""

VALUES: Mapping[tuple[str, str], str] = {
    ("loss_type", "gspo"): "GSPO is importance_sampling_level sequence with loss_type grpo",
    ("loss_type", "gspo_token"): "GSPO is importance_sampling_level sequence with loss_type grpo",
    ("loss_type", "ppo"): "PPO's clipped loss is grpo with scale_rewards as it is; there is no critic",
    ("loss_type", "vanilla"): "verl's vanilla with token-mean is dapo",
    ("loss_type", "drgrpo"): "take dr_grpo, with scale_rewards none",
    ("loss_type", "rloo"): "take grpo, with scale_rewards loo",
    ("loss_type", "reinforce"): "take grpo, with num_iterations 1",
    ("loss_type", "gmpo"): "not there; importance_sampling_level sequence is nearest",
    ("importance_sampling_level", "sequence_token"): "take sequence: its gradient is the same",
    ("scale_rewards", "true"): "TRL's True is group",
    ("scale_rewards", "false"): "TRL's False is none",
    ("scale_rewards", "std"): "take group",
    ("resume_from_checkpoint", "true"): "take latest",
    ("resume_from_checkpoint", "false"): "leave it out",
    ("resume_from_checkpoint", "auto"): "take latest",
    ("lr_scheduler_type", "cosine_with_restarts"): "take cosine",
    ("lr_scheduler_type", "polynomial"): "take linear",
    ("lr_scheduler_type", "inverse_sqrt"): "take constant_with_warmup or cosine",
    ("lr_scheduler_type", "warmup_stable_decay"): "take constant_with_warmup",
    ("lr_scheduler_type", "cosine_warmup_with_min_lr"): "take cosine_with_min_lr",
    ("lr_scheduler_type", "reduce_lr_on_plateau"): "take constant_with_warmup; eval_steps shows a plateau",
    ("dgs", "true"): "take variance_mass",
    ("dgs", "false"): "take none",
    ("report_to", "null"): "take none",
    ("report_to", "mlflow"): "take tensorboard, trackio or wandb; metrics.jsonl has everything",
    ("report_to", "swanlab"): "take tensorboard, trackio or wandb; metrics.jsonl has everything",
    ("report_to", "comet_ml"): "take tensorboard, trackio or wandb; metrics.jsonl has everything",
    ("report_to", "console"): "lines are printed always; take none",
    ("credit", "both"): "take shared or per_segment",
}
"""(setting, value in lower case, - as _) -> what it is called here."""


def remedy_of(name: str, renamed: Mapping[str, str] = RENAMED) -> str | None:
    """What to set instead of a name from elsewhere; None for one that nobody is known to use.

    >>> remedy_of("actor_rollout_ref.rollout.gpu_memory_utilization") == OWN_ROLLOUTS
    True
    """
    paths = list(accumulate(name.split("."), lambda above, part: f"{above}.{part}"))
    return next((renamed[path] for path in reversed(paths) if path in renamed), None)


def remedy_of_value(name: str, value: object) -> str | None:
    """What a value from elsewhere, or one in a list, is called here; None for one that is not known."""
    values = value if isinstance(value, list | tuple) else [value]
    found = (VALUES.get((name, str(one).strip().lower().replace("-", "_"))) for one in values)
    return next((remedy for remedy in found if remedy), None)
