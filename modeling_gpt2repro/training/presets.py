"""Presets: overrides of the arguments' defaults, by name. The defaults themselves are GPT-2 124M on 10 B tokens.

Shapes: Radford et al. 2019, table 2 (heads of 64). Learning rates: GPT-3, table 2.1, the size nearest by.
"""

PRESETS: dict[str, dict] = {
    "gpt2-124m": {},
    "gpt2-350m": {
        "output_dir": "runs/gpt2-350m",
        "n_layer": 24,
        "n_head": 16,
        "n_embd": 1024,
        "learning_rate": 3e-4,
        "per_device_train_batch_size": 16,
    },
    "gpt2-774m": {
        "output_dir": "runs/gpt2-774m",
        "n_layer": 36,
        "n_head": 20,
        "n_embd": 1280,
        "learning_rate": 2.5e-4,
        "per_device_train_batch_size": 8,
    },
    "gpt2-1558m": {
        "output_dir": "runs/gpt2-1558m",
        "n_layer": 48,
        "n_head": 25,
        "n_embd": 1600,
        "learning_rate": 2e-4,
        "per_device_train_batch_size": 4,
    },
    # Minutes on two CPU cores, with nothing to download. Chosen by trying; README, "The quickstart".
    "quickstart": {
        "output_dir": "runs/quickstart",
        "dataset_name": "python-prose",
        "tokenizer_vocab_size": 2048,
        "hellaswag": "none",
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 128,
        "block_size": 128,
        "train_tokens": 2_867_200,
        "tokens_per_step": 1024,
        "warmup_tokens": 172_032,
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-3,
        "validation_share": 0.05,
        "eval_tokens": 65_536,
        "logging_steps": 1,  # a CPU is not waited for
        "eval_steps": 200,
        "num_samples": 2,
        "save_steps": 1400,
        "torch_compile": False,
    },
}
