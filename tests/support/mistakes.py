"""What users get wrong, by kind: a command, the files that it finds, and words of the one line that it ends with.

`TABLE` is run by `tests/methods/test_mistakes.py` (each in a process of its own where torch is not needed to know it,
with a torch that cannot be imported) and, cold and with a clock, by `tests/campaigns/test_mistakes_cold.py`.
"""

from __future__ import annotations

import os
import shutil

from mistake import (
    LFS,
    LLAMA,
    OFFLINE,
    PROMPTS,
    REWARD,
    Mistake,
    both,
    model,
    program,
    taken_port,
    text,
    trained_run,
    whole_model,
)
from mistakes_deepseek import DEEPSEEK
from mistakes_show_o import SHOW_O

__all__ = ["REWARD", "TABLE", "WITH_A_MODEL", "Mistake", "model", "program", "text"]

FLAGS = [
    Mistake("a misspelt flag", "sync_r1.py --lerning_rate 3", "did you mean --learning_rate?"),
    Mistake("a number out of range", "sync_r1.py --num_generations 1", "num_generations: expected at least 2, got 1"),
    Mistake(
        "three at once",
        "sync_r1.py --lr 3 --num_generations 1 --seed x",
        "seed: expected an integer",
        lines=3,
    ),
    Mistake("neither on nor off", "sync_r1.py --bf16 maybe", "bf16: expected true or false, got 'maybe'"),
    Mistake("more than a float holds", "sync_r1.py --learning_rate 1e400", "at most 1.8e308"),
    Mistake("no number", "sync_r1.py --learning_rate nan", "a finite number"),
    Mistake("a share of nothing", "sync_r1.py --top_p 0", "top_p: expected more than 0 and at most 1, got 0"),
    Mistake("fewer than no ids", "sample.py --image_top_k -1", "image_top_k: expected at least 0, got -1"),
    Mistake("none of the choices", "sync_r1.py --zero_stage 7", "zero_stage: expected one of 0, 1, 2, 3"),
    Mistake("half a seed", "sync_r1.py --seed 1.5", "seed: expected an integer"),
    Mistake("a flag without its value", "sync_r1.py --max_steps --seed 1", "expected a value after --max_steps"),
    Mistake("a word alone", "sync_r1.py stray", "a word without a setting"),
    Mistake("a dash from a text processor", "sync_r1.py —seed 3", "did you mean --seed?", lines=2),
    Mistake("a name from TRL", "sync_r1.py --epsilon_low .1", "set epsilon"),
    Mistake("a turn that there is not", "sync_r1.py --drawing_turn sync_r2", "correct the name, or add a field"),
    Mistake("a field of no turn", "sync_r1.py --drawing_turn '{answer}'", "got {answer} in '{answer}'"),
    Mistake("a brace left open", "evaluate.py --drawing_turn '{text'", "close every brace"),
    Mistake("a turn without a field", "sample.py --drawing_turn 'a photo'", "or a template with {prompt}"),
    Mistake(
        "a fit that there is not", "sync_r1.py --picture_fit stretch", "picture_fit: expected one of processor, cr"
    ),
    Mistake("an argument without a value", "sync_r1.py --chat_template_kwargs thinking", "expected NAME=VALUE, got"),
    Mistake("nobody's argument", "sample.py --chat_template_kwargs tokenize=true", "got one that is set here"),
    Mistake("settings that exclude each other", "sync_r1.py --dgs top_k", "dgs_keep"),
    Mistake("a preview by a CLIP that is not named", "sync_r1.py --preview_score clip", "expected a CLIP"),
    Mistake("a rule over two timeouts", "sync_r1.py --reward_timeout 9000", "expected less than stage_timeout"),
    Mistake(
        "stale rollouts as if they were new", "sync_r1.py --rollout_staleness 1", "--importance_correction truncate"
    ),
    Mistake(
        "two steps behind", "corl.py --rollout_staleness 2", "rollout_staleness: expected at least 0 and at most 1"
    ),
    Mistake(
        "what one rank alone can do",
        "sync_r1.py --rollout_staleness 1 --importance_correction mask --zero_stage 3 --compile_decode --nodes 2",
        "zero_stage: expected 0, 1 or 2 with rollout_staleness 1",
        lines=3,
    ),
    Mistake(
        "the same of torchrun's ranks",
        "sync_r1.py --rollout_staleness 1 --importance_correction mask",
        "rollout_staleness: expected 0 on 2 ranks",
        env=(("WORLD_SIZE", "2"), ("RANK", "0")),
    ),
    Mistake("no settings file", "sync_r1.py --config no.yaml", "no.yaml"),
    Mistake("an empty settings file", "sync_r1.py --config a.yaml", "a file without any", text(a__yaml="# later\n")),
    Mistake("no YAML", "sync_r1.py --config a.yaml", "not plain YAML", text(a__yaml="a: b: c\n")),
    Mistake("a list for a mapping", "sync_r1.py --config a.yaml", "got list", text(a__yaml="- a\n- b\n")),
    Mistake("a key twice", "sync_r1.py --config a.yaml", "given twice (line 2)", text(a__yaml="seed: 1\nseed: 2\n")),
    Mistake("a tag of code", "sync_r1.py --config a.yaml", "not plain YAML", text(a__yaml="seed: !!python/none\n")),
    Mistake("too much in YAML", "sync_r1.py --config a.yaml", "at most 1.8e308", text(a__yaml="beta: 1e400\n")),
    Mistake(
        "file and flag",
        "sync_r1.py --config a.yaml --seed x",
        "did you mean beta?",
        text(a__yaml="betta: 1\n"),
        lines=2,
    ),
    Mistake("a folder for a file", "sync_r1.py --config .", "got ., a folder"),
    Mistake("the tiny base in no steps", "tiny_base.py --steps 0", "steps: expected at least 1"),
]
MODELS = [
    Mistake("an empty folder", "sync_r1.py --model m", "no config.json", model(None, weights="none", tokenizer=False)),
    Mistake("a configuration that is no JSON", "sync_r1.py --model m", "no JSON", model("{")),
    Mistake("pickled weights", "sync_r1.py --model m", "convert it with save_pretrained", model(weights="pickled")),
    Mistake("a download that was cut off", "sync_r1.py --model m", "the download was cut off", model(weights="cut")),
    Mistake("a header of nonsense", "sync_r1.py --model m", "is no safetensors'", model(weights="no header")),
    Mistake("a shard missing", "sync_r1.py --model m", "1 of 2 shards missing", model(weights="shards")),
    Mistake("a pointer of git-lfs", "sync_r1.py --model m", "git lfs pull", model(weights="pointer")),
    Mistake("no tokenizer", "sync_r1.py --model m", "expected a tokenizer", model(tokenizer=False)),
    Mistake("another kind of model", "sync_r1.py --model m", "model_type 't5'", model({"model_type": "t5"})),
    Mistake(
        "quantised weights",
        "sync_r1.py --model m",
        "quantised by awq",
        model(LLAMA | {"quantization_config": {"quant_method": "awq"}}),
    ),
    Mistake("llama.cpp's format", "sync_r1.py --model m", "m.Q4.gguf", model(weights="gguf")),
    Mistake(
        "an adapter alone",
        "evaluate.py --model m",
        "merge it into its base",
        both(model(None), text(m___adapter_config__json="{}")),
    ),
    Mistake(
        "a pipeline of diffusers",
        "sync_r1.py --model m",
        "a pipeline of diffusers",
        both(model(None), text(m___model_index__json="{}")),
    ),
    Mistake("a run's folder", "sync_r1.py --model run", "did you mean run/checkpoints/last?", trained_run("run")),
    Mistake(
        "a turn to draw in, for a model of words",
        "sync_r1.py --model m --drawing_turn t2i_r1",
        "drawing_turn: expected none for m, a llama",
        model(),
    ),
    Mistake("a file for a model", "sync_r1.py --model m.safetensors", "not a folder", text(m__safetensors="x")),
    Mistake("a path that is not there", "sync_r1.py --model runs/typo", "not a folder", text(runs___x="")),
    Mistake(
        "a cache that is a file",
        "sync_r1.py",
        "SYNCR1_CACHE: expected a folder",
        text(afile=""),
        env=(("SYNCR1_CACHE", "afile"),),
    ),
    Mistake("the hub out of reach", "sync_r1.py --model org/name", "does not answer", env=OFFLINE),
    Mistake(
        "no network wanted", "sync_r1.py --model org/name", "HF_HUB_OFFLINE", env=(*OFFLINE, ("HF_HUB_OFFLINE", "1"))
    ),
    Mistake("a longer text than the toy's positions", "sync_r1.py --max_completion_length 5000", "the 512 positions"),
    Mistake(
        "a longer text than positions", "sync_r1.py --model m --max_completion_length 5000", "2048 positions", model()
    ),
    *DEEPSEEK,
    *SHOW_O,
    Mistake("a model larger than the disk", "sync_r1.py --model m", "GiB of free space", model(weights="huge")),
]
DATA = [
    Mistake("a name nearly right", "sync_r1.py --data row.jsonl", "mean rows.jsonl?", text(rows__jsonl=PROMPTS)),
    Mistake("data that are not there", "corl.py --data nowhere.jsonl", "which is not there"),
    Mistake("an empty file", "sync_r1.py --data rows.jsonl", "got an empty file", text(rows__jsonl="")),
    Mistake("an archive", "sync_r1.py --data rows.zip", "the suffix '.zip'", text(rows__zip="PK")),
    Mistake("a folder of nothing", "sync_r1.py --data d", "without any of these", text(d___a___b__png="x")),
    Mistake(
        "the folder above", "sync_r1.py --data d", "did you mean d/unify?", text(d___unify___concept___train___c___x="")
    ),
    Mistake("data that git-lfs has", "sync_r1.py --data rows.jsonl", "git lfs pull", text(rows__jsonl=LFS)),
    Mistake("twelve prompts and a step of 16", "sync_r1.py --data rows.jsonl", "at most 12", text(rows__jsonl=PROMPTS)),
    Mistake(
        "twelve samples and a step of 16",
        "corl.py --data rows.jsonl --prompts_per_step 16",
        "at most 12, the rows",
        text(rows__jsonl=PROMPTS),
    ),
    Mistake("a data set out of reach", "corl.py --data org/name", "hf download --repo-type dataset", env=OFFLINE),
    Mistake("a split out of reach", "corl.py --data org/name#dev", "hf download --repo-type dataset", env=OFFLINE),
    Mistake(
        "a folder of pictures that is not there",
        "corl.py --data rows.jsonl --prompts_per_step 1 --image_folder photos",
        "image_folder: expected a folder of pictures, got photos, which is not there",
        text(rows__jsonl=PROMPTS),
    ),
    Mistake("data to evaluate on", "evaluate.py --data d.jsonl", "which is not there"),
    Mistake(
        "a row that is no JSON",
        "sync_r1.py --data rows.jsonl --prompts_per_step 1",
        "rows.jsonl, line 2",
        text(rows__jsonl='{"prompt": "a"}\n{"prompt"\n'),
    ),
    Mistake(
        "more prompts a step than the world has",
        "sync_r1.py --prompts_per_step 100000",
        "lower prompts_per_step",
    ),
    Mistake(
        "a parquet file that is none",
        "sync_r1.py --data rows.parquet",
        "rows.parquet",
        text(rows__parquet="PAR0"),
    ),
]
REWARDS = [
    Mistake("a reward's name", "corl.py --reward_funcs acuracy", "did you mean accuracy?"),
    Mistake("a reward's name in a plan", "corl.py --reward_funcs acuracy --dry_run", "did you mean accuracy?"),
    Mistake("no file of rewards", "corl.py --reward_funcs no.py:good", "no file no.py"),
    Mistake("a server's reward unnamed", "corl.py --reward_funcs unirl@https://host:8080", "as in #pickscore"),
    Mistake("a server of no codebase", "corl.py --reward_funcs https://host:8080#clip", "expected the codebase whose"),
    Mistake("no such module", "corl.py --reward_funcs no_such:good", "no module 'no_such'"),
    Mistake(
        "a reward with a slip of syntax", "corl.py --reward_funcs r.py:good", "at line 1", text(r__py="def good(:\n")
    ),
    Mistake("another function", "corl.py --reward_funcs r.py:god", "did you mean good?", text(r__py=REWARD)),
    Mistake(
        "a reward's own needs",
        "corl.py --reward_funcs r.py:good",
        "pip install no_such_package",
        text(r__py=f"import no_such_package\n\n\n{REWARD}"),
    ),
    Mistake("one weight for two rewards", "corl.py --reward_funcs tim format --reward_weights 1", "one per reward"),
    Mistake("a judge by FTP", "sync_r1.py --judge_url ftp://host/v1 --judge_model m", "got 'ftp://host/v1'"),
    Mistake("a port that there is not", "sync_r1.py --judge_url http://host:99999/v1 --judge_model m", "host or port"),
    Mistake("a judge without a name", "sync_r1.py --judge_url https://host/v1", "judge_model: expected"),
    Mistake("a judge in the open", "sync_r1.py --judge_url http://host/v1 --judge_model m", "plain http"),
    Mistake(
        "a key that is not set",
        "sync_r1.py --judge_url https://h/v1 --judge_model m --judge_key_env NO_KEY",
        "judge_key_env: expected",
    ),
    Mistake("a judge without an address", "corl.py --reward_funcs judge", "judge_url: expected an address"),
    Mistake("an image reward's name", "corl.py --reward_funcs genevla", "did you mean geneval?"),
    Mistake(
        "an image reward's pickle",
        "corl.py --reward_funcs hps --reward_models hps=HPS_v2.1_compressed.pt",
        "save it as safetensors",
    ),
    Mistake("a checkpoint of no reward", "sync_r1.py --reward_funcs text --reward_models clip=a/b", "name its reward"),
    Mistake("a reward without a checkpoint", "sync_r1.py --reward_funcs orm", "expected orm=FOLDER"),
]
PLACES = [
    Mistake("a file for the run's folder", "sync_r1.py --output_dir f", "expected a folder", text(f="")),
    Mistake("a file above the run's folder", "sync_r1.py --output_dir f/run", "is a file", text(f="")),
    Mistake("a folder that cannot be written", "sync_r1.py --output_dir /proc/run", "change its permissions"),
    Mistake(
        "a slip in the name of a run to resume",
        "sync_r1.py --output_dir runs/snyc --resume_from_checkpoint latest",
        "did you mean runs/sync?",
        trained_run("runs___sync"),
    ),
    Mistake("a run that is not there", "sync_r1.py --resume_from_checkpoint nowhere", "no folder"),
    Mistake(
        "prompts that three ranks cannot share",
        "sync_r1.py --ranks_per_node 3",
        "prompts_per_step: expected a multiple of the 3 ranks, got 16",
    ),
    Mistake(
        "a model to merge out of reach",
        "merge.py --base org/w --models org/a org/b --output o",
        "org/a",
        lines=3,
        env=OFFLINE,
    ),
    Mistake("a list of machines", "sync_r1.py --hostfile hosts", "hostfile"),
    Mistake("a benchmark that nobody has", "evaluate.py --benchmark geneva", "did you mean geneval"),
    Mistake("a benchmark read as something else", "evaluate.py --benchmark pope --data_form table", "leave it out"),
    Mistake(
        "a benchmark without its files",
        "evaluate.py --benchmark wise",
        "git clone https://github.com/PKU-YuanGroup/WISE",
    ),
    Mistake("pictures that are nowhere", "evaluate.py --benchmark pope --image_folder i", "a folder of pictures"),
    Mistake("a baseline that nothing scores", "evaluate.py --baseline --stage generate", "set --stage score"),
    Mistake("a GPU that nobody has", "sync_r1.py --dry_run --gpu h1000", "did you mean h100"),
    Mistake("nothing to score", "evaluate.py --stage score --output_dir e", "run --stage generate first"),
    Mistake("nothing to merge", "merge.py --output o", "expected two or more folders", lines=2),
    Mistake(
        "half a model to merge",
        "merge.py --base m --models m n --output o",
        "the download was cut off",
        both(model(weights="cut"), lambda folder: shutil.copytree(folder / "m", folder / "n")),
        lines=3,
    ),
    Mistake("a result over another", "merge.py --base m --models m m --output m", "expected a new or empty", model()),
    Mistake("a node's agent by hand", "-m syncr1.engine.processes.nodes", "--hostfile FILE"),
    Mistake(
        "a reward's process by hand",
        "-m syncr1.engine.rewards.yours.worker",
        "isolated@FILE:FUNCTION",
        needs_torch=True,
    ),
]
GARBAGE = "\x01\x02 no line of it is JSON\n" * 9
SECRET = "Name: vault\nDriver: disk\nPassword: hunter2\nseed: swordfish\n"
RECIPES = [
    Mistake("a list without values", "sample.py --compare", "expected values after --compare"),
    Mistake("prompts without words", "sample.py --prompt --seed 1", "expected values after --prompt"),
    Mistake("a folder of prompts", "sample.py --prompts_file d", "got d, a folder", text(d___x="")),
    Mistake("a photo that is not there", "sample.py --prompt a --image no.png", "got no.png, which is not there"),
    Mistake("one model to compare", "sample.py --compare a", "expected at least 2 checkpoints"),
    Mistake("samples into a file", "sample.py --output_dir f", "expected a folder", text(f="")),
    Mistake("samples where nothing can be written", "sample.py --output_dir /proc/s", "change its permissions"),
    Mistake("scores where nothing can be written", "evaluate.py --output_dir /proc/e", "change its permissions"),
    Mistake("a base where nothing can be written", "tiny_base.py --output_dir /proc/b", "change its permissions"),
    Mistake(
        "a merge where nothing can be written",
        "merge.py --base m --models m m --output /proc/o",
        "output: expected a folder that can be written",
        model(),
    ),
    Mistake(
        "a merge into a file", "merge.py --base m --models m m --output f", "got f, a file", both(model(), text(f=""))
    ),
    Mistake("no data to check", "check_data.py", "data: expected a folder, a file or a hub name"),
    Mistake("data to check that are not there", "check_data.py --data no.jsonl", "which is not there"),
    Mistake("no run", "report.py", "runs: expected a run's folder"),
    Mistake("three runs", "report.py a b c", "got 3"),
    Mistake("a run that is a file", "report.py f", "got f, a file", text(f="")),
    Mistake("a folder that is no run", "report.py d", "which is none", text(d___x="")),
    Mistake(
        "a slip at a page", "report.py run --outptu x", "did you mean --output?", text(run___config__yaml="a: 1\n")
    ),
    Mistake(
        "a page for one run", "report.py run --output p.html", "expected two runs", text(run___config__yaml="a: 1\n")
    ),
    Mistake("garbage for metrics", "report.py g", "metrics.jsonl without a line", text(g___metrics__jsonl=GARBAGE)),
    Mistake("an installer's flag", "install.py --vnev x", "unrecognized arguments: --vnev"),
    Mistake("a set of versions", "install.py --versions eldest", "invalid choice: 'eldest'"),
    Mistake("an installer's half", "install.py --triton 3.6", "go together"),
]
KINDS = [
    Mistake("a folder for a reward", "corl.py --reward_funcs r.py:f", "r.py is a folder", text(r__py___x="")),
    Mistake("a folder for settings", "sync_r1.py --config c.yaml", "got c.yaml, a folder", text(c__yaml___x="")),
    Mistake("a folder for a hostfile", "sync_r1.py --nodes 2 --hostfile h", "got h, a folder", text(h___x="")),
    Mistake("a pipe for data", "sync_r1.py --data p.jsonl", "got p.jsonl, a pipe", lambda f: os.mkfifo(f / "p.jsonl")),
    Mistake("a pipe for a run", "report.py p", "got p, a pipe", lambda folder: os.mkfifo(folder / "p")),
    Mistake(
        "a link to nothing",
        "sample.py --prompts_file l",
        "a link to what is not there",
        lambda folder: os.symlink("gone", folder / "l"),
    ),
    Mistake("somebody's keys for settings", "sync_r1.py --config s.conf", "none of its", text(s__conf=SECRET)),
    Mistake("somebody's keys for hosts", "sync_r1.py --nodes 2 --hostfile s", "without slots=", text(s=SECRET)),
    Mistake(
        "a key for the name of its variable",
        "sync_r1.py --judge_url https://h/v1 --judge_model m --judge_key_env sk-swordfish-1",
        "not shown here",
    ),
]
MACHINE = [
    Mistake(
        "a disk that is full while a page is written",
        "report.py run",
        "expected free space, got File too large",
        text(run___config__yaml="seed: 0\n", run___metrics__jsonl='{"reward": 0.5, "loss": 0.1}\n' * 99),
        file_size=4096,
    ),
    Mistake(
        "a port that somebody has",
        "sync_r1.py --max_steps 1",
        "MASTER_PORT: expected a free port",
        needs_torch=True,
        env=taken_port(),
    ),
]
"""What the machine has not; what is left of memory, descriptors and disks stands in tests/methods/test_reasons.py."""
TABLE = (*FLAGS, *MODELS, *DATA, *REWARDS, *PLACES, *RECIPES, *KINDS, *MACHINE)

SHORT = "--model m --data rows.jsonl --prompts_per_step 4 --num_generations 2 --max_steps 1 --eval_samples 0"
WITH_A_MODEL = [
    Mistake(
        "a tokenizer of nonsense",
        f"sync_r1.py {SHORT}",
        "expected files that its library can read",
        whole_model(tokenizer__json='{"version": "1.0", "model": {"type": "nothing"}}'),
        needs_torch=True,
    ),
    Mistake(
        "layers that the model has not",
        f"sync_r1.py {SHORT} --lora_rank 2 --lora_target_modules wq",
        "lora_target_modules: expected some of down_proj",
        whole_model(),
        needs_torch=True,
    ),
    Mistake(
        "a captioner out of reach",
        f"corl.py {SHORT} --cycle_image none --spice_parser world --stage unified --max_completion_length 8",
        "captioner: expected a folder, or a name",
        whole_model(),
        needs_torch=True,
        env=OFFLINE,
    ),
    Mistake(
        "a reward of another length",
        f"corl.py {SHORT} --reward_funcs r.py:short --stage unified --cfg_weight 1 --max_completion_length 4",
        "expected 2 values, one per trajectory",
        both(
            whole_model(), text(r__py="def short(*, completions, **_):\n    return [1.0]\n\n\nshort.kind = 'image'\n")
        ),
        needs_torch=True,
    ),
]
"""Those that a model has to be read for."""
