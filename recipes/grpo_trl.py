"""TRL's GRPOTrainer with its head and loss on this package's kernels: a tiny Llama learns to write the letter a.

python recipes/grpo_trl.py
"""

import syncr1.engine.compat  # noqa: F401

from datasets import Dataset  # type: ignore[import-untyped, unused-ignore]
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from syncr1.kernels.trl import patch_grpo_trainer

LETTERS = {token: index for index, token in enumerate(["<pad>", "</s>", *"abcdefgh"])}


def share_of_a(completion_ids: list[list[int]], **_: object) -> list[float]:
    return [ids.count(LETTERS["a"]) / len(ids) for ids in completion_ids]


text = Tokenizer(models.WordLevel(LETTERS, unk_token="<pad>"))
text.pre_tokenizer = pre_tokenizers.Split("", "isolated")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=text, pad_token="<pad>", eos_token="</s>")
model = LlamaForCausalLM(LlamaConfig(vocab_size=10, hidden_size=32, intermediate_size=64, num_hidden_layers=2))
prompts = Dataset.from_dict({"prompt": ["abc", "fgh", "dea", "hhb"] * 16})
config = GRPOConfig(
    "runs/grpo_trl",
    max_steps=20,
    per_device_train_batch_size=16,
    max_completion_length=12,
    learning_rate=1e-2,
    logging_steps=1,
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
    use_cpu=True,
    bf16=False,
)

patch = patch_grpo_trainer()  # the only line that plain TRL does not have
trainer = GRPOTrainer(model, share_of_a, config, prompts, processing_class=tokenizer)
trainer.remove_callback(PrinterCallback)
trainer.train()

steps = [entry for entry in trainer.state.log_history if "reward" in entry]
for entry in (steps[0], steps[-1]):
    print(f"step {entry['step']:2}: loss {entry['loss']:7.4f}, share of the letter a {entry['reward']:.3f}")
print(f"calls of the head: {dict(patch.counts)}")
