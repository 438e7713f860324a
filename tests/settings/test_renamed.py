"""renamed.py and habits.py: whoever comes from TRL, verl or diffusers is told in one line what is meant here."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import yaml

from syncr1.engine.corl.config import CorlConfig
from syncr1.engine.errors import ConfigError
from syncr1.engine.methods.evaluation_config import EvaluateConfig
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.settings.flags import parse
from syncr1.engine.settings.habits import of_override
from syncr1.engine.settings.renamed import DIFFUSERS, OF_EVALUATION, RENAMED, TRL, VALUES, VERL
from syncr1.engine.settings.rules import hub_problems
from syncr1.engine.settings.schema import choices, settings_of, unknown_name
from syncr1.engine.settings.yaml_files import from_yaml

OURS = {setting.name: setting for config in (CorlConfig, SyncR1Config) for setting in settings_of(config)}

DREAMBOOTH = """pretrained_model_name_or_path revision variant tokenizer_name instance_data_dir class_data_dir
instance_prompt class_prompt with_prior_preservation prior_loss_weight num_class_images output_dir seed resolution
center_crop train_text_encoder train_batch_size sample_batch_size num_train_epochs max_train_steps checkpointing_steps
checkpoints_total_limit resume_from_checkpoint gradient_accumulation_steps gradient_checkpointing learning_rate scale_lr
lr_scheduler lr_warmup_steps lr_num_cycles lr_power dataloader_num_workers use_8bit_adam adam_beta1 adam_beta2
adam_weight_decay adam_epsilon max_grad_norm push_to_hub hub_token hub_model_id logging_dir allow_tf32 report_to
mixed_precision prior_generation_precision local_rank enable_xformers_memory_efficient_attention rank
pre_compute_text_embeddings tokenizer_max_length text_encoder_use_attention_mask validation_images validation_prompt
num_validation_images validation_epochs class_labels_conditioning"""
TEXT_TO_IMAGE = """dataset_name dataset_config_name train_data_dir image_column caption_column max_train_samples
cache_dir random_flip snr_gamma prediction_type noise_offset"""

VERL_EXAMPLE = """
algorithm.adv_estimator=grpo data.train_files=$HOME/data/gsm8k/train.parquet
data.val_files=$HOME/data/gsm8k/test.parquet
data.train_batch_size=1024 data.max_prompt_length=512 data.max_response_length=1024 data.filter_overlong_prompts=True
data.truncation='error' actor_rollout_ref.model.path=Qwen/Qwen2-7B-Instruct actor_rollout_ref.actor.optim.lr=1e-6
actor_rollout_ref.model.use_remove_padding=True actor_rollout_ref.actor.ppo_mini_batch_size=256
actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=40 actor_rollout_ref.actor.use_kl_loss=True
actor_rollout_ref.actor.kl_loss_coef=0.001 actor_rollout_ref.actor.kl_loss_type=low_var_kl
actor_rollout_ref.actor.entropy_coeff=0 actor_rollout_ref.model.enable_gradient_checkpointing=True
actor_rollout_ref.actor.fsdp_config.param_offload=False actor_rollout_ref.rollout.tensor_model_parallel_size=2
actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.n=5 +actor_rollout_ref.ref.fsdp_config.param_offload=True
algorithm.use_kl_in_reward=False trainer.critic_warmup=0 trainer.logger=['console','wandb']
trainer.project_name='verl_grpo_example_gsm8k' trainer.experiment_name='qwen2_7b' trainer.n_gpus_per_node=8
trainer.nnodes=1 trainer.save_freq=20 trainer.test_freq=5 trainer.total_epochs=15"""
"""verl's examples/grpo_trainer/run_qwen2-7b.sh."""


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, config: type = SyncR1Config) -> list[str]:
    with pytest.raises(SystemExit) as caught:
        parse(config, list(arguments))
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()


def test_every_argument_of_trl_is_ours_or_has_a_remedy() -> None:
    trl = pytest.importorskip("trl")
    import transformers

    classes = (trl.GRPOConfig, transformers.TrainingArguments, trl.ModelConfig, trl.ScriptArguments)
    theirs = {field.name for kind in classes for field in dataclasses.fields(kind)}
    assert len(theirs) > 190
    assert sorted(theirs - OURS.keys() - RENAMED.keys()) == []


def test_every_argument_of_diffusers_and_verl_is_ours_or_has_a_remedy() -> None:
    assert sorted({*DREAMBOOTH.split(), *TEXT_TO_IMAGE.split()} - OURS.keys() - RENAMED.keys()) == []
    for line in VERL_EXAMPLE.split():
        problem = of_override(line, SyncR1Config)
        assert problem is not None and "unknown here; " in problem and "did you mean" not in problem, line


@pytest.mark.parametrize("table", [TRL, DIFFUSERS, VERL, RENAMED], ids=["trl", "diffusers", "verl", "all"])
def test_remedies_name_settings_that_there_are(table: dict[str, str]) -> None:
    """`set X`, and every word with an underscore, is a setting, a value of one, or an environment variable."""
    values = {str(choice) for setting in OURS.values() for choice in choices(setting.type)}
    known = OURS.keys() | values | {"HF_TOKEN", "TRACKIO_SPACE_ID", "CUDA_VISIBLE_DEVICES", "sync_r1", "low_var_kl"}
    known |= {"dry_run"}
    for name, remedy in table.items():
        assert not remedy.endswith(".") and len(remedy) < 110, name
        words = {word for word in re.findall(r"\w+", remedy) if "_" in word and word.strip("_")}
        assert words <= known, (name, words - known)
        for listed in re.findall(r"\bset (\w+)", remedy):
            assert listed in OURS or listed == "TRACKIO_SPACE_ID", (name, listed)


def test_a_name_that_is_ours_needs_no_remedy_and_no_value_is_renamed_that_works() -> None:
    """`think_instruction` and the like are CoRL's alone, so a Sync-R1 run may need their remedy."""
    common = {setting.name for setting in settings_of(SyncR1Config)} & {s.name for s in settings_of(CorlConfig)}
    assert sorted(RENAMED.keys() & common - {"data"}) == []
    assert sorted(OF_EVALUATION.keys() & {setting.name for setting in settings_of(EvaluateConfig)}) == []
    for (name, value), remedy in VALUES.items():
        assert value not in choices(OURS[name].type) and value == value.lower() and "-" not in value, name
        assert remedy


@pytest.mark.parametrize(
    ("arguments", "name", "remedy"),
    [
        (["--save_steps", "50"], "--save_steps", "set checkpointing_steps"),
        (["--max_prompt_length", "512"], "--max_prompt_length", "shorten them in data"),
        (["--lr", "1e-5"], "--lr", "set learning_rate"),
        (["--bs=8"], "--bs", "set prompts_per_step (groups) and max_tokens_per_microbatch (memory)"),
        (["--loss_type", "gspo"], "loss_type", "GSPO is importance_sampling_level sequence with loss_type grpo"),
        (["--loss-type=GSPO"], "loss_type", "GSPO is importance_sampling_level sequence with loss_type grpo"),
        (["--bf16", "maybe"], "bf16", ""),
        (["--report_to", "mlflow"], "report_to", "tensorboard, trackio or wandb; metrics.jsonl has everything"),
        (["--resume_from_checkpoint", "True"], "resume_from_checkpoint", ""),
        (["actor_rollout_ref.rollout.n=8"], "actor_rollout_ref.rollout.n", "set num_generations"),
        (["++trainer.test_freq=5"], "trainer.test_freq", "set eval_steps"),
        (["algorithm/adv_estimator=grpo"], "algorithm.adv_estimator", "there is no critic"),
        (["max_steps=5"], "max_steps", "write --max_steps 5"),
        (["lr=1e-5"], "lr", "set learning_rate"),
        (["--seed=1", "lr=1e-5"], "lr", "set learning_rate"),
        (["--seed", "1", "lr=1e-5"], "lr", "set learning_rate"),
        (["--instance_data_dir", "photos"], "--instance_data_dir", "photos of each concept and what is asked of it"),
        (["--train-batch-size", "1"], "--train_batch_size", "max_tokens_per_microbatch (memory)"),
        (["--enable_xformers_memory_efficient_attention"], "--enable_xformers", "the engine's own; leave it out"),
        (["--hub_token", "hf_x"], "--hub_token", "and is written nowhere"),
        (["--vllm_mode", "colocate"], "--vllm_mode", "in the trainer's process; leave it out"),
        (["--warmup_ratio", "0.1"], "--warmup_ratio", "set warmup_steps, a number of steps"),
    ],
)
def test_habits_are_told_what_to_write(
    arguments: list[str], name: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line.strip().partition(": ") for line in refused(capsys, *arguments)]
    found = [line for line in lines if name in line[0] or line[0].startswith(name) or name in line[2]]
    assert any("".join(line).endswith(remedy) for line in found), lines
    assert not any("Traceback" in line[0] for line in lines) and len(lines) <= 4


@pytest.mark.parametrize(
    ("arguments", "field", "expected"),
    [
        (["--bf16", "True"], "bf16", True),
        (["--bf16=true"], "bf16", True),
        (["--bf16", "1", "--seed", "1"], "bf16", True),
        (["--bf16", "False"], "bf16", False),
        (["--no_bf16", "false"], "bf16", True),
        (["--no-share-prefix"], "share_prefix", False),
        (["--share_prefix", "no"], "share_prefix", False),
        (["--log_completions", "off"], "log_completions", False),
        (["--bf16", "--seed", "3"], "bf16", True),
        (["--report_to", "none"], "report_to", ("none",)),
        (["--report-to", "tensorboard"], "report_to", ("tensorboard",)),
        (["--run_name", "lr=1e-5"], "run_name", "lr=1e-5"),
        (["--run-name=seed=1"], "run_name", "seed=1"),
        (["--lora_target_modules", "q_proj", "v_proj"], "lora_target_modules", ("q_proj", "v_proj")),
        (["--epsilon", "0.1"], "epsilon", 0.1),
    ],
)
def test_spellings_that_mean_the_same_are_taken(arguments: list[str], field: str, expected: object) -> None:
    assert getattr(parse(SyncR1Config, arguments), field) == expected


def test_a_file_of_trls_or_verls_gets_its_remedies() -> None:
    text = "learning_rate: 1e-6\nper_device_train_batch_size: 8\nsave-steps: 50\nbf16: true\n"
    with pytest.raises(ConfigError) as caught:
        from_yaml(SyncR1Config, text)
    assert [line.split("; ")[-1][:12] for line in str(caught.value).splitlines()] == ["set prompts_", "set checkpoi"]
    deep: dict[str, Any] = {"actor_rollout_ref": {"rollout": {"n": 8, "mode": "async"}, "hybrid_engine": True}}
    deep["actor_rollout_ref"]["actor"] = {"optim": {"lr": 1e-6}, "profiler": {"tool_config": {"nsys": {"discrete": 1}}}}
    with pytest.raises(ConfigError) as caught:
        from_yaml(SyncR1Config, yaml.safe_dump(deep | {"trainer": {"balance_batch": True}}))
    told = str(caught.value)
    assert (
        "rollout.n: expected a setting's name, got one that is unknown here; set num_generations" in told
        and "optim.lr: expected a setting's name, got one that is unknown here; set learning_rate" in told
    )
    assert "trainer: expected a setting's name, got one that is unknown here" in told and len(told.splitlines()) == 3


def test_evaluation_has_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    lines = refused(capsys, "--num_items", "5", "--max_new_tokens", "9", "--bf16", "True", config=EvaluateConfig)
    assert [line.split("; ")[-1] for line in lines if "; " in line] == ["set limit", "set max_completion_length"]
    assert "did you mean" in unknown_name("sampled_text", EvaluateConfig)


@pytest.mark.parametrize(
    "name",
    [
        "a",
        "a/b",
        "org/my.model_1-x",
        "-a",
        "a-",
        "a/b/c",
        "a..b",
        "a--b",
        "a.git",
        "caf\u00e9",
        "a b",
        "a" * 97,
        "a/" + "b" * 96,
    ],
)
def test_a_repositorys_name_is_what_the_hubs_library_takes(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    class Asked:
        hub_model_id = name

    try:
        validate_repo_id(name)
    except HFValidationError:
        assert len(hub_problems(Asked)) == 1
    else:
        assert hub_problems(Asked) == []
