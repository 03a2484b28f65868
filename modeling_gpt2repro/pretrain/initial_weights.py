"""What a run starts from: a checkpoint, the model of --init_from, or nothing."""

from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from modeling_gpt2repro.data.tokenizer import tokenizer_sha256
from modeling_gpt2repro.hub.conversion import load_checkpoint, load_checkpoint_config, load_gpt2
from modeling_gpt2repro.hub.model_card import FROM_SCRATCH, Origin, derived_origin
from modeling_gpt2repro.modeling_gpt2repro import GPT2ReproForCausalLM
from modeling_gpt2repro.runtime.collectives import call_main_process_first, run_on_main_and_broadcast
from modeling_gpt2repro.runtime.command_line import InputErrors
from modeling_gpt2repro.runtime.progress import escape_controls
from modeling_gpt2repro.training import checkpoints
from modeling_gpt2repro.training.arguments import TrainArguments
from modeling_gpt2repro.training.validate import check_sizes

SHAPE = ("n_layer", "n_head", "n_embd", "initializer_range")


@dataclass(frozen=True)
class InitialWeights:
    """What a run starts from."""

    checkpoint: Path | None  # the folder to resume from; None for a new run
    model: GPT2ReproForCausalLM | None  # the weights of the checkpoint or of `--init_from`; None for fresh ones
    tokenizer: PreTrainedTokenizerBase | None  # that of `--init_from`
    origin: Origin  # where they come from, for the model card


def load_initial_weights(args: TrainArguments, accelerator: Accelerator) -> InitialWeights:
    """Load the checkpoint to resume from, or else the model of `--init_from`, if there is either.

    Raises:
        ValueError: If it is damaged, not a GPT-2, untied although its config says tied, or of another shape than the
            arguments' (see `take_shape`).
    """
    checkpoint = find_checkpoint(args, accelerator)
    model, tokenizer, origin = None, None, FROM_SCRATCH
    if checkpoint is not None:
        with checkpoints.raise_if_corrupt(checkpoint):
            model = load_checkpoint(checkpoint)
    elif args.init_from:
        model, tokenizer = call_main_process_first(accelerator, lambda: load_gpt2(args.init_from))
        origin = derived_origin("A GPT-2 fine-tuned from", args.init_from)
    if model is not None:
        take_shape(args, model, source=str(checkpoint or args.init_from))
        model = model.float()  # whatever it was saved in: bf16 has 8 bits, too few to add a small update to a weight
    return InitialWeights(checkpoint, model, tokenizer, origin)


def find_checkpoint(args: TrainArguments, accelerator: Accelerator) -> Path | None:
    """The folder that `--resume_from_checkpoint` names, every file of it verified; damaged ones are reported."""
    output_dir = Path(args.output_dir)
    checkpoint, damaged = run_on_main_and_broadcast(
        accelerator,
        lambda: checkpoints.find_resume_checkpoint(args.resume_from_checkpoint, output_dir, load_checkpoint_config),
    )
    for sentence in damaged:
        accelerator.print(escape_controls(sentence))
    if checkpoint is not None and not checkpoint.is_dir():  # this is another machine, with a cache of its own
        checkpoint = checkpoints.open_named_checkpoint(args.resume_from_checkpoint, load_checkpoint_config)
    return checkpoint


def take_shape(args: TrainArguments, model: GPT2ReproForCausalLM, source: str):
    """Take the shape and context that the arguments leave open from the loaded model.

    Raises:
        ValueError: If the arguments name another shape, or a context longer than the model's.
    """
    shape = {name: getattr(model.config, name) for name in SHAPE}
    for name, size in {**shape, "block_size": model.config.n_positions}.items():
        if getattr(args, name) is None:
            setattr(args, name, size)
    if any(getattr(args, name) != size for name, size in shape.items()):
        flags = " ".join(f"--{name} {size}" for name, size in shape.items())
        raise ValueError(f"{source} has another shape than was asked for: give {flags}.")
    if args.block_size > model.config.n_positions:
        raise ValueError(
            f"block_size ({args.block_size}) must be at most the {model.config.n_positions} positions of {source}."
        )
    InputErrors(check_sizes(args)).raise_if_any()


def check_tokenizer(
    args: TrainArguments, tokenizer: PreTrainedTokenizerBase, init_tokenizer: PreTrainedTokenizerBase | None
):
    """Compare the tokenizers of the data and of `--init_from`.

    Raises:
        ValueError: If they give different ids.
    """
    if init_tokenizer is not None and tokenizer_sha256(init_tokenizer) != tokenizer_sha256(tokenizer):
        raise ValueError(
            f"init_from ({args.init_from}) has another tokenizer than the data: prepare the data with --tokenizer "
            f"{args.init_from}."
        )
