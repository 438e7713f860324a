"""Rows of `mistakes.py` about checkpoints in DeepSeek's layout, their conversion, and downloads that were cut off."""

from __future__ import annotations

import json

from mistake import GENERATION, LLAMA, OFFLINE, PROMPTS, Mistake, both, deepseek, model, text

DEEPSEEK = [
    Mistake("JanusFlow", "sync_r1.py --model m", "got m, JanusFlow", deepseek(config={"vision_gen_enc_config": {}})),
    Mistake("DeepSeek-VL", "corl.py --model m", "got m, DeepSeek-VL", deepseek(without=GENERATION)),
    Mistake(
        "DeepSeek's layout, quantised",
        "convert.py --model m --output out",
        "quantised by bitsandbytes",
        deepseek(config={"quantization_config": {"quant_method": "bitsandbytes"}}),
    ),
    Mistake("a pickle that was cut off", "sync_r1.py --model m", "which is cut off", deepseek(weights="cut")),
    Mistake("a shard of pickles missing", "sample.py --model m", "1 of 3 shards missing", deepseek(weights="missing")),
    Mistake("a pickle that git-lfs has", "sync_r1.py --model m", "git lfs pull", deepseek(weights="pointer")),
    Mistake(
        "DeepSeek's layout without a file",
        "evaluate.py --model m",
        "DeepSeek's preprocessor_config.json",
        deepseek(without_files=("preprocessor_config.json",)),
    ),
    Mistake(
        "DeepSeek's pickles to merge, one missing",
        "merge.py --base m --models m m --output out",
        "expected whole files of torch.save, got 1 of 3 shards missing",
        deepseek(weights="missing"),
        lines=2,
    ),
    Mistake(
        "a base that a later merge cannot have",
        "corl.py --merge_base m",
        "merge_base: expected whole files of torch.save, got 1 of 3 shards missing",
        deepseek(weights="missing"),
    ),
    Mistake(
        "a base to merge against, out of reach", "corl.py --merge_base no/where", "merge_base: expected", env=OFFLINE
    ),
    Mistake("nothing to convert", "convert.py", "model: expected a folder or a hub name, got none", lines=2),
    Mistake("a conversion over files", "convert.py --model m --output m", "got m with files", deepseek()),
    Mistake("a conversion of a llama", "convert.py --model m --output out", "got model_type 'llama' in m", model()),
    Mistake(
        "a base in the wrong layout",
        "convert.py --model m --base m --output out",
        "base: expected DeepSeek's layout",
        model({"model_type": "janus"}),
    ),
    Mistake(
        "another revision, out of reach",
        "convert.py --model org/name@v1 --output out",
        "`hf download org/name --revision v1`",
        env=OFFLINE,
    ),
    Mistake(
        "half of a download",
        "sync_r1.py --model org/name",
        "a download that was cut off (model.safetensors is missing)",
        text(**{"hub___models--org--name___snapshots___0___config__json": json.dumps(LLAMA)}),
        env=OFFLINE,
    ),
    Mistake(
        "a pickle that runs a program",
        "sync_r1.py --model m --data rows.jsonl --prompts_per_step 2",
        "would call posix.mkdir; nothing of it was run",
        both(deepseek(weights="hostile"), text(rows__jsonl=PROMPTS)),
        needs_torch=True,
    ),
    Mistake(
        "a pickle that runs a program, looked at",
        "sync_r1.py --model m --data rows.jsonl --prompts_per_step 2 --dry_run",
        "would call posix.mkdir; nothing of it was run",
        both(deepseek(weights="hostile"), text(rows__jsonl=PROMPTS)),
        needs_torch=True,
    ),
    Mistake(
        "a tensor that its configuration does not have",
        "convert.py --model m --output out",
        "1 unknown (language_model.adapter)",
        deepseek(weights="unknown"),
        needs_torch=True,
    ),
    Mistake(
        "a tensor missing",
        "sync_r1.py --model m --data rows.jsonl --prompts_per_step 2",
        "1 missing (gen_embed.weight)",
        both(deepseek(weights="without one"), text(rows__jsonl=PROMPTS)),
        needs_torch=True,
    ),
    Mistake(
        "a tensor of another shape",
        "sample.py --model m --prompt hello",
        "1 of another shape (gen_embed.weight: [3, 8] for [64, 8])",
        deepseek(weights="shape"),
        needs_torch=True,
    ),
    Mistake(
        "a layout that it is in",
        "convert.py --model m --output out --to deepseek",
        "to: expected transformers, got deepseek, whose layout m has already; use it as it is",
        deepseek(),
    ),
]
