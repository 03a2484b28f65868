"""Flags of nanoGPT, build-nanogpt and transformers' Trainer that this project names differently, and what to use."""

AT_LAUNCH = "chosen at launch: accelerate launch {} train_accelerate.py ..."

FLAG_HINTS: dict[tuple[str, ...], str] = {
    # Length and batch, which are given in tokens here.
    ("epochs", "num_epochs"): "use --num_train_epochs for prepared data, or --train_tokens for a length in tokens.",
    ("max_steps", "max_iters", "num_steps", "num_iterations", "lr_decay_iters"): (
        "give the length in tokens with --train_tokens, which is steps * tokens_per_step."
    ),
    ("batch", "batch_size", "train_batch_size", "micro_batch_size"): (
        "use --per_device_train_batch_size for the sequences in one forward on one device, or --tokens_per_step for "
        "the batch of an optimizer step."
    ),
    ("total_batch_size", "global_batch_size"): "use --tokens_per_step, in tokens over all processes.",
    ("eval_batch_size",): "use --per_device_eval_batch_size.",
    ("auto_find_batch_size",): "use --find_batch_size.",
    ("gradient_accumulation_steps", "grad_accum_steps"): (
        "it follows from --tokens_per_step / (--per_device_train_batch_size * --block_size * processes)."
    ),
    # Optimization.
    ("lr", "max_lr"): "use --learning_rate.",
    ("min_lr",): "use --final_learning_rate_ratio, a fraction of --learning_rate.",
    ("lr_scheduler", "lr_schedule", "decay_lr"): "use --lr_scheduler_type: cosine, linear, wsd or constant.",
    ("warmdown_iters", "cooldown_steps"): "use --cooldown_tokens with --lr_scheduler_type wsd.",
    ("warmup_steps", "warmup_iters", "warmup_ratio"): "use --warmup_tokens, which is steps * tokens_per_step.",
    ("beta1", "beta2"): "use --adam_beta1 and --adam_beta2.",
    ("grad_clip", "clip_grad", "grad_clip_norm"): "use --max_grad_norm.",
    ("optim", "optimizer_type", "optimizer_name"): (
        "use --optimizer adamw or --optimizer muon; --recipe also sets a learning rate and a schedule that go with it."
    ),
    ("muon", "use_muon"): "use --recipe muon.",
    ("muon_lr", "adam_lr", "embed_lr"): "use --learning_rate, which is that of all parameters.",
    # Model.
    ("model", "model_name_or_path", "model_type", "pretrained"): (
        "use --init_from for weights to start from, or --preset for a size, such as gpt2-350m."
    ),
    ("context_length", "max_seq_length", "max_length", "seq_len", "sequence_length"): "use --block_size.",
    ("dropout",): "GPT-2 is trained without dropout here, as in the lecture.",
    ("bias",): "the layers always have biases, as in GPT-2.",
    ("flash", "use_flash_attention"): "use --attn_implementation sdpa or --attn_implementation flash_attention_2.",
    # Data.
    ("dataset", "data"): "use --dataset_name for a Hub dataset, or --shards for a folder of prepare_data.py.",
    ("data_dir", "data_root", "input_bin", "train_file"): "prepare it with prepare_data.py and give --shards FOLDER.",
    ("tokenizer_name",): "use --tokenizer.",
    ("overfit_single_batch", "overfit_batches"): "use --overfit_one_batch.",
    # Run, logging, checkpoints.
    ("config",): (
        "use --preset for hyperparameters; hardware is chosen by accelerate launch --config_file, before the script."
    ),
    ("out_dir", "log_dir", "logging_dir", "save_dir"): "use --output_dir.",
    ("resume", "resume_from"): "use --resume_from_checkpoint latest.",
    ("wandb", "wandb_log", "wandb_project", "wandb_run_name", "use_wandb"): "use --report_to wandb.",
    ("tensorboard",): "use --report_to tensorboard.",
    ("log_interval", "log_every"): "use --logging_steps.",
    ("eval_interval", "eval_every", "eval_strategy", "evaluation_strategy"): "use --eval_steps.",
    ("eval_iters",): "use --eval_tokens, in tokens.",
    ("save_interval", "save_every", "save_strategy", "always_save_checkpoint"): "use --save_steps.",
    ("dry_run",): "use --preflight.",
    ("patience_seconds",): "use --hub_wait_seconds.",
    # Hardware: precision, devices and processes are accelerate's.
    ("fp16", "bf16", "dtype", "precision", "mixed_precision"): (
        f"precision is {AT_LAUNCH.format('--mixed_precision bf16')}"
    ),
    ("device", "cpu", "use_cpu", "no_cuda"): f"GPUs are used where there are any; a CPU is {AT_LAUNCH.format('--cpu')}",
    ("num_processes", "nproc_per_node", "world_size", "multi_gpu", "n_gpu"): (
        f"the number of processes is {AT_LAUNCH.format('--num_processes 8')}"
    ),
    ("config_file", "fsdp", "deepspeed", "backend"): (
        f"hardware is {AT_LAUNCH.format('--config_file accelerate_configs/8xa100.yaml')}"
    ),
    ("compile",): "use --torch_compile.",
}
