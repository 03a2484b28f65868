"""Presets: named overrides of the defaults in `TrainArguments`, which are GPT-2 124M on 10 B tokens."""

# Shapes: GPT-2 (Radford et al. 2019, table 2), with heads of 64 channels: n_head = n_embd / 64.
# Learning rates: GPT-3 (Brown et al. 2020, table 2.1), of the model nearest in size.
# Micro-batches: smaller as the model grows, for memory; results do not depend on them, and --find_batch_size finds the
# largest that fits.
PRESETS: dict[str, dict] = {
    "gpt2-124m": {},
    "gpt2-350m": {
        "output_dir": "runs/gpt2-350m",
        "n_layer": 24,
        "n_head": 16,
        "n_embd": 1024,
        "learning_rate": 3e-4,  # GPT-3 Medium, 350M
        "per_device_train_batch_size": 16,
    },
    "gpt2-774m": {
        "output_dir": "runs/gpt2-774m",
        "n_layer": 36,
        "n_head": 20,
        "n_embd": 1280,
        "learning_rate": 2.5e-4,  # GPT-3 Large, 760M
        "per_device_train_batch_size": 8,
    },
    "gpt2-1558m": {
        "output_dir": "runs/gpt2-1558m",
        "n_layer": 48,
        "n_head": 25,
        "n_embd": 1600,
        "learning_rate": 2e-4,  # GPT-3 XL, 1.3B
        "per_device_train_batch_size": 4,
    },
    # Minutes on two CPU cores, with nothing to download. Values were found by trial; docs/first-model.md says why.
    "quickstart": {
        "output_dir": "runs/quickstart",
        "dataset_name": "stories",
        "tokenizer_vocab_size": 1536,  # nearly every word is one token
        "hellaswag": "none",  # it would be downloaded
        "n_layer": 4,
        "n_head": 2,
        "n_embd": 128,
        "block_size": 224,  # one whole story
        "initializer_range": 0.05,  # 0.02 * sqrt(768 / 128): words must differ enough for attention to find them again
        "recipe": "muon",  # AdamW needs more steps to keep the names apart
        "train_tokens": 1_433_600,  # 800 steps
        "tokens_per_step": 1792,  # 8 stories: on a CPU many small updates achieve more than a few large ones
        "warmup_tokens": 153_600,
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-3,  # the smaller the model, the larger the rate (GPT-3, table 2.1)
        "validation_share": 0.05,
        "eval_tokens": 28_672,  # 128 stories
        "logging_steps": 50,
        "eval_steps": 100,
        "num_samples": 1,
        "sample_tokens": 210,  # to the end of a story
        "save_steps": 400,  # once in the middle
        "torch_compile": False,  # on a GPU neither: the run is too short
    },
    # A few megabytes of text, prepared with a tokenizer of its own: --shards FOLDER. Minutes on a laptop or one GPU.
    "own-text": {
        "output_dir": "runs/own-text",
        "hellaswag": "none",  # a model of this size is at chance
        "n_layer": 4,
        "n_head": 4,
        "n_embd": 256,
        "block_size": 256,
        "train_tokens": None,
        "num_train_epochs": 4.0,  # worth nearly as much as new text (Muennighoff et al. 2023, arXiv:2305.16264)
        "tokens_per_step": 2048,  # 8 sequences: 366,000 tokens, read four times, are 715 steps
        "warmup_tokens": None,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "eval_tokens": 65_536,
        "eval_steps": None,
        "num_samples": 2,
        "save_steps": None,
        "torch_compile": False,  # a run of minutes is too short to make up for the compilation
    },
}

# Defaults with --init_from. Epochs, rate and 8 sequences a step are those of transformers' `TrainingArguments` (5.23),
# with which its examples fine-tune GPT-2.
FINE_TUNING: dict[str, float | None] = {
    "n_layer": None,  # this and the next four are taken from the model; None below: derived from the size of the data
    "n_head": None,
    "n_embd": None,
    "initializer_range": None,
    "block_size": None,
    "train_tokens": None,
    "num_train_epochs": 3.0,
    "tokens_per_step": 8192,  # 8 sequences of GPT-2's 1,024 tokens
    "learning_rate": 5e-5,
    "warmup_tokens": None,
    "eval_steps": None,
    "save_steps": None,
}
