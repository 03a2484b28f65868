"""Train a GPT-2 from scratch: Karpathy's "Let's reproduce GPT-2 (124M)" with Accelerate.

    accelerate launch --config_file accelerate_configs/cpu.yaml train_accelerate.py --preset quickstart
    accelerate launch --config_file accelerate_configs/8xa100.yaml train_accelerate.py

The first takes minutes on a laptop and downloads nothing. The second reproduces GPT-2 124M on 10 B tokens of
FineWeb-Edu. Both end with a folder that `from_pretrained` and `pipeline` load.

Three files matter: this one, the model (modeling_gpt2repro/modeling_gpt2repro.py), and the order of the data
(modeling_gpt2repro/data/batches/shuffled.py).
"""

import time
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2repro.data.batches.build import TrainingData
from modeling_gpt2repro.data.batches.read_ahead import ReadAhead
from modeling_gpt2repro.evaluation.generation import sample_continuations
from modeling_gpt2repro.evaluation.hellaswag.metrics import evaluate_hellaswag
from modeling_gpt2repro.evaluation.hellaswag.samples import write_scores
from modeling_gpt2repro.evaluation.hellaswag.tokenize import HellaSwagTask
from modeling_gpt2repro.evaluation.stories import score_stories
from modeling_gpt2repro.evaluation.validation import validation_loss, validation_numbers
from modeling_gpt2repro.pretrain import setup
from modeling_gpt2repro.pretrain.attention import set_attention
from modeling_gpt2repro.pretrain.batch_size import apply_batch_size_finder
from modeling_gpt2repro.pretrain.certify import certify
from modeling_gpt2repro.pretrain.checkpointing import Checkpointer, unsharded_model, unwrapped_model
from modeling_gpt2repro.pretrain.initial_weights import check_tokenizer, load_initial_weights
from modeling_gpt2repro.pretrain.messages import end_message, explain_oom, warn_of_slow_cpu
from modeling_gpt2repro.pretrain.open_data import load_data, set_lengths
from modeling_gpt2repro.pretrain.preflight import preflight
from modeling_gpt2repro.runs.config import make_writable
from modeling_gpt2repro.runs.figures import plot_loss
from modeling_gpt2repro.runs.folder import HELLASWAG_FILE, LOSS_PICTURE
from modeling_gpt2repro.runs.logger import RunLogger
from modeling_gpt2repro.runs.metrics import StepMetrics
from modeling_gpt2repro.runtime.accelerator import build_accelerator, restored_settings
from modeling_gpt2repro.runtime.command_line import (
    InputErrors,
    exit_message_to_launcher,
    exit_on_input_error,
    parse_command_line,
)
from modeling_gpt2repro.runtime.fsdp import full_tensor
from modeling_gpt2repro.runtime.hardware import to_device
from modeling_gpt2repro.runtime.loss import ModelWithLoss
from modeling_gpt2repro.runtime.precision import update_loss_scale
from modeling_gpt2repro.runtime.signals import StopSignal
from modeling_gpt2repro.storage.lock import FolderLock
from modeling_gpt2repro.training.arguments import TrainArguments
from modeling_gpt2repro.training.optimization import build_optimizer, scheduled_learning_rate, set_learning_rate
from modeling_gpt2repro.training.outliers import OutlierDetector
from modeling_gpt2repro.training.presets import PRESETS
from modeling_gpt2repro.training.state import TrainState, is_due


def main(argv: list[str] | None = None):
    """One training run, from the command line to a folder that generates text."""
    args = parse_command_line(TrainArguments, argv, PRESETS, __doc__)  # default < preset < recipe < flag
    # The lock is held until the run ends: two in one folder would mix their files.
    with FolderLock(Path(args.output_dir)) as lock, exit_message_to_launcher(), restored_settings():
        train(args, lock)


def train(args: TrainArguments, lock: FolderLock):
    """Open everything, train, evaluate and save; `lock` is taken as soon as the processes can agree on it."""
    output_dir = Path(args.output_dir)
    with exit_on_input_error():
        accelerator = build_accelerator(
            num_processes=args.num_processes,
            torch_compile=args.torch_compile,
            deterministic=args.deterministic,
            attn_implementation=args.attn_implementation,
            report_to=args.report_to,
            output_dir=output_dir,
        )
        make_writable(output_dir)
        setup.lock_output_dir(args, accelerator, lock)
        warn_of_slow_cpu(args, accelerator)

        # Open everything that the arguments name before the first step, and report all problems at once.
        errors = InputErrors()
        uploads = errors.capture(setup.build_upload_queue, args, accelerator)
        start = errors.capture(load_initial_weights, args, accelerator)  # checkpoint, --init_from, or nothing
        examples = errors.capture(setup.load_hellaswag_examples, args, accelerator)
        data = errors.capture(load_data, args, accelerator, start)  # shards, a mix of them, or a stream
        errors.raise_if_any()
        set_lengths(args, accelerator, data)  # --num_train_epochs, of the data at hand

        # At initialization every token is about equally likely, so the first loss must be near ln(vocabulary): 10.82.
        torch.manual_seed(args.seed)  # equal weights on every process
        config = GPT2ReproConfig(
            vocab_size=len(data.tokenizer),
            n_positions=args.block_size,
            n_embd=args.n_embd,
            n_layer=args.n_layer,
            n_head=args.n_head,
            initializer_range=args.initializer_range,
            bos_token_id=data.tokenizer.bos_token_id,
            eos_token_id=data.tokenizer.eos_token_id,
        )
        model = GPT2ReproForCausalLM(config) if start.model is None else start.model
        check_tokenizer(args, data.tokenizer, start.tokenizer)
        attention = set_attention(args, accelerator, model, start.checkpoint)  # the fastest, where it is known
        optimizer = build_optimizer(  # decays matrices and embeddings, not biases and norms
            model,
            args.learning_rate,
            weight_decay=args.weight_decay,
            betas=(args.adam_beta1, args.adam_beta2),
            epsilon=args.adam_epsilon,
            optimizer=args.optimizer,
            device=accelerator.device,  # where the model will be
        )
        # Moves the model to its device; wraps it in DDP or FSDP, autocast to bf16, and torch.compile.
        model, optimizer = accelerator.prepare(ModelWithLoss(model), optimizer)
        model.train()
        if args.find_batch_size:
            apply_batch_size_finder(args, accelerator, model, optimizer, data.batches)
        accelerator.gradient_accumulation_steps, _ = data.batches.micro_batch_shape
        hellaswag = setup.prepare_hellaswag_task(
            accelerator, unwrapped_model(accelerator, model), data.tokenizer, examples
        )

        state = TrainState()
        detector = OutlierDetector(accelerator.device, args.skip_outliers)
        stop = StopSignal(on_stop=lock.announce_stop)
        reader = ReadAhead(data.batches, args.total_steps, is_stopping=stop.is_requested)
        stateful = {"progress": state, "data": reader, "guard": detector, "loss_scale": accelerator.scaler}
        checkpointer = Checkpointer(args, accelerator, model, optimizer, data, stateful, origin=start.origin)
        if start.checkpoint is not None:
            checkpointer.restore(start.checkpoint)
        if checkpointer.is_exported(with_hellaswag=hellaswag is not None) and not args.is_trial:
            exit_code = setup.leave_finished_run(args, accelerator, data, uploads, state)
            del model, optimizer, checkpointer
            return setup.shutdown(accelerator, exit_code)
        logger = setup.build_logger(args, accelerator, model, data, state, start.checkpoint, attention)

    if args.is_trial:
        # As a run does, so that what would end one as it begins ends this.
        with closing(reader), closing(logger), closing(uploads), stop, explain_oom(args):
            if args.certify:
                exit_code = certify(args, accelerator, model, optimizer, data, checkpointer, stop, train_step)
            else:
                exit_code = preflight(
                    args, accelerator, model, optimizer, data, hellaswag, checkpointer, logger, stop, train_step
                )
        del model, optimizer, checkpointer
        return setup.shutdown(accelerator, exit_code)

    with closing(reader), closing(logger), closing(uploads), stop, explain_oom(args):
        bytes_per_token = setup.validation_bytes_per_token(args, data)
        setup.log_run_summary(args, accelerator, model, optimizer, data, state.step, logger)
        first_step = state.step
        # What this step and the next train on must be in memory: a process that met an error in the middle of a step
        # would leave the others waiting. They all stop after this step instead.
        while state.step < args.total_steps and not stop.should_stop(reader.wait_for(state.step, logger.show_waiting)):
            # Once in a while: how good is it on text that it has not seen, and what does it write?
            if is_due(state.step, args.eval_steps):
                evaluate(args, accelerator, model, data, hellaswag, bytes_per_token, state.step, logger, stop)

            # Learning rate and data are functions of the step alone: a resumed run continues exactly where it was.
            learning_rate = scheduled_learning_rate(args.schedule, state.step)
            set_learning_rate(optimizer, learning_rate)
            metrics = train_step(
                accelerator,
                model,
                optimizer,
                reader.micro_batches(state.step),
                tokens_per_step=args.tokens_per_step,
                max_grad_norm=args.max_grad_norm,
                detector=detector,
            )
            state.advance(args.tokens_per_step)
            logger.log_step(state.step, metrics, learning_rate, reader.waited_seconds, reader.batch_hash)
            for message in uploads.poll():
                logger.print(message)

            # Once in a while: a checkpoint. The last one is written below.
            if is_due(state.step, args.save_steps) and state.step < args.total_steps:
                checkpointer.save(logger, uploads)

        checkpointer.save(logger, uploads, final=True)
        if state.step < args.total_steps:
            exit_code = setup.leave_stopped_run(args, accelerator, stop, state.step, state.step - first_step, logger)
        else:
            evaluate(args, accelerator, model, data, hellaswag, bytes_per_token, state.step, logger, stop)
            model_folder = checkpointer.export(logger, uploads)
            logger.print(end_message(args, state, model_folder, data.tokenizer))
            exit_code = uploads.push_final(model_folder, logger.print, lambda: stop.signal_name is not None)
    del model, optimizer, checkpointer
    setup.shutdown(accelerator, exit_code)


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    micro_batches: Iterable[dict[str, torch.Tensor]],
    *,
    tokens_per_step: int,
    max_grad_norm: float,
    detector: OutlierDetector,
) -> StepMetrics:
    """One optimizer step: add up the gradients of all micro-batches, clip their norm, and update the weights.

    Args:
        model: Prepared; its output has `.loss`, the sum over a micro-batch's tokens divided by `num_items_in_batch`.
        micro_batches: Keyword arguments of the model, `gradient_accumulation_steps` of the accelerator many.
        tokens_per_step: Over all processes and micro-batches.
        max_grad_norm: Gradients with a larger norm (over all parameters) are scaled down to it.
        detector: Decides from loss and gradient norm whether to skip the update.
    """
    # A batch of half a million tokens does not fit into memory, so its gradient is added up over micro-batches. Each
    # loss is a mean, and a sum of means is not the mean of the whole: the lecture divides by the number of
    # micro-batches. Accelerate does that in `backward`, and DDP averages over processes. Dividing here by the tokens
    # of an average micro-batch, not of this one, makes each token weigh the same when micro-batches are uneven.
    tokens_each = tokens_per_step / (accelerator.gradient_accumulation_steps * accelerator.num_processes)
    losses = []
    for micro_batch in micro_batches:
        micro_batch = {name: to_device(tensor, accelerator.device) for name, tensor in micro_batch.items()}  # (B, T)
        # DDP averages gradients over processes while `backward` computes them. Only the last micro-batch needs that:
        # `accumulate` turns it off (`no_sync`) for all others, which saves sending every gradient several times.
        with accelerator.accumulate(model):
            outputs = model(**micro_batch, num_items_in_batch=tokens_each, use_cache=False)
            accelerator.backward(outputs.loss)  # divides by the accumulation steps; gradients add up in .grad
            losses.append(outputs.loss.detach())
    assert accelerator.sync_gradients, "there must be as many micro-batches as accumulation steps"
    # A bad batch can give a huge gradient, which would throw the model off: scale the whole gradient down to norm 1.
    # In fp16 accelerate divides by the loss scale first. A single gradient that is infinite makes the norm infinite.
    grad_norm = full_tensor(accelerator.clip_grad_norm_(model.parameters(), max_grad_norm))
    loss = accelerator.reduce(torch.stack(losses).mean(), reduction="mean")
    skip = detector.should_skip(loss, grad_norm)
    step_unless(skip, optimizer)
    optimizer.zero_grad()
    fp16 = () if accelerator.scaler is None else update_loss_scale(accelerator.scaler, loss)
    # Still on the device: `.item()` here would make the host wait for the GPU in every step.
    return StepMetrics(loss, grad_norm, skip, *fp16)


def step_unless(skip: torch.Tensor, optimizer: Optimizer):
    """Update the parameters, or leave them, their moments and the count of steps as they are.

    A fused optimizer reads the decision on the device, in the tensor `found_inf` that loss scaling uses after an
    overflow in fp16; for any other, the host waits for it here.
    """
    # Without accelerate's wrapper, which would leave the decision to fp16's scaler alone.
    unwrapped = getattr(optimizer, "optimizer", optimizer)
    if unwrapped.defaults.get("fused"):
        unwrapped.found_inf = skip.float()
        unwrapped.step()
    elif not skip:
        unwrapped.step()


def evaluate(
    args: TrainArguments,
    accelerator: Accelerator,
    model: nn.Module,
    data: TrainingData,
    hellaswag: HellaSwagTask | None,
    bytes_per_token: float,
    step: int,
    logger: RunLogger,
    stop: StopSignal,
):
    """Validation loss, HellaSwag, samples and loss.png of the model as it is; less if the run is to stop."""
    output_dir = Path(args.output_dir)
    with logger.untimed():
        started = time.perf_counter()
        # Without DDP and compile: each process evaluates its share at its own pace, on shapes that vary.
        module = unsharded_model(accelerator, model)
        batch_size = args.per_device_eval_batch_size or args.per_device_train_batch_size
        batches = data.validation_batches(args.eval_tokens, batch_size)
        with accelerator.autocast():
            loss, tokens = validation_loss(ModelWithLoss(module), batches, accelerator.device)
            stories = score_stories(module, data.tokenizer, data.stories, accelerator.device)  # {} for other data
        numbers = {**validation_numbers(loss, bytes_per_token), "validation_tokens": tokens, **stories}
        if hellaswag is not None and not stop.should_stop():
            accuracies, scores = evaluate_hellaswag(module, hellaswag)
            numbers |= accuracies
            if accelerator.is_main_process:
                path = output_dir / HELLASWAG_FILE
                logger.write_file(HELLASWAG_FILE, lambda: write_scores(path, scores, hellaswag.examples))
        numbers["evaluation_seconds"] = time.perf_counter() - started
        logger.log_evaluation(step, numbers)
        if args.num_samples and accelerator.is_main_process and stop.signal_name is None:
            with accelerator.autocast():
                samples = sample_continuations(
                    module,
                    data.tokenizer,
                    args.sample_prompts,
                    num_samples=args.num_samples,
                    max_new_tokens=args.sample_tokens,
                    seed=args.seed,
                )
            for prompt, texts in zip(args.sample_prompts, samples, strict=True):
                logger.log_samples(step, prompt, texts)
        if accelerator.is_main_process:
            logger.write_file(LOSS_PICTURE, lambda: plot_loss(output_dir))
        accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
