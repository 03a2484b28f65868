"""Look into the weights of a model: the shape, mean and spread of each kind of tensor, and a picture of its positions.

    python -m modeling_gpt2repro.evaluation.weights runs/quickstart
    python -m modeling_gpt2repro.evaluation.weights openai-community/gpt2 --compare runs/gpt2-124m --output weights.png

Tensors of the same name in different blocks are one kind, written h.*.attn.c_attn.weight.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from modeling_gpt2repro.runtime.command_line import (
    InputErrors,
    arg,
    check_limits,
    exit_on_input_error,
    parse_command_line,
)

from .load_model import find_model, load_causal_lm, model_problem, output_problem

FORMATS = (".png", ".svg")


@dataclass
class WeightsArguments:
    """Which models to look into."""

    flag_hints: ClassVar[Mapping[tuple[str, ...], str]] = {
        ("model_name_or_path", "pretrained", "checkpoint", "run"): "give MODEL without a flag.",
        ("picture", "plot", "figure", "out"): "use --output, a .png or .svg file.",
    }

    model: str = arg(
        positional=True,
        help="The folder of a run (its final model, or else its last checkpoint), the folder of any causal language "
        "model, or a model on the Hub.",
    )
    compare: str | None = arg(
        default=None, help="A second model, whose numbers are shown beside. If not given, there is none."
    )
    output: str | None = arg(
        default=None, help="Picture to draw, a .png or .svg file. If not given, the numbers are printed only."
    )
    trust_remote_code: bool = arg(default=False, help="Let a model's repository run its own Python code.")

    def __post_init__(self):
        InputErrors([*check_limits(self), *self._check_inputs()]).raise_if_any()

    def _check_inputs(self) -> Iterator[str]:
        if self.model is None:
            yield "MODEL is missing: give the folder of a run or of a model, or the name of a model on the Hub."
        yield from filter(None, (model_problem(folder, flag) for flag, folder in self.models()))
        if self.output is not None and Path(self.output).suffix not in FORMATS and not os.path.isdir(self.output):
            yield f"--output {self.output} must be a .png or .svg file."
        elif self.output is not None:
            yield from filter(None, (output_problem(self.output),))

    def models(self) -> Iterator[tuple[str, str]]:
        """Of each model the flag that it was given with, and its folder or Hub id."""
        for flag, name in (("MODEL", self.model), ("--compare", self.compare)):
            if name is not None:
                yield flag, find_model(name)


@dataclass(frozen=True)
class TensorKind:
    """A tensor, or those of the same name and shape in different blocks, from the first block to the last."""

    name: str
    shape: tuple[int, ...]
    means: tuple[float, ...]  # one of each block
    stds: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.means) / len(self.means)

    @property
    def std(self) -> float:
        """Standard deviation of all entries of all blocks around their common mean."""
        squares = [std**2 + mean**2 for mean, std in zip(self.means, self.stds, strict=True)]
        return max(0.0, sum(squares) / len(squares) - self.mean**2) ** 0.5


def main(argv: list[str] | None = None) -> None:
    args = parse_command_line(WeightsArguments, argv, description=__doc__)
    disable_progress_bar()
    with exit_on_input_error():
        models = {}
        for flag, folder in args.models():
            models[folder], _ = load_causal_lm(folder, trust_remote_code=args.trust_remote_code, flag=flag)
        print("\n".join(table(models)))
        if args.output is not None:
            from modeling_gpt2repro.runs.plots import save_figure

            from .weights_figure import plot_weights  # matplotlib, which the table does without

            try:
                print(f"\n{save_figure(plot_weights(models), Path(args.output), dpi=100)}")
            except OSError as error:
                raise ValueError(
                    f"--output {args.output} cannot be written ({error.strerror}): give another."
                ) from None


@torch.no_grad()
def tensor_kinds(model: PreTrainedModel) -> list[TensorKind]:
    """The kinds of a model's tensors, in their order; a tied tensor once."""
    found: dict[tuple, list[tuple[float, float]]] = {}
    for name, parameter in model.named_parameters():
        kind = (re.sub(r"\.\d+(?=\.|$)", ".*", name), tuple(parameter.shape))
        entries = parameter.double()
        found.setdefault(kind, []).append((entries.mean().item(), entries.std(correction=0).item()))
    return [TensorKind(*kind, *zip(*numbers, strict=True)) for kind, numbers in found.items()]


def tied_tensors(model: PreTrainedModel) -> dict[str, str]:
    """Name of a tensor -> the name under which `tensor_kinds` has it: {'lm_head.weight': 'transformer.wte.weight'}."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: names[parameter] for name, parameter in every if names[parameter] != name}


def table(models: Mapping[str, PreTrainedModel]) -> list[str]:
    """Lines: the models by name, then for each kind of tensor a line of each model that has it."""
    letters = dict(zip(models, "AB", strict=False)) if len(models) > 1 else dict.fromkeys(models, "")
    lines = []
    for name, model in models.items():
        num_tensors = sum(1 for _ in model.parameters())
        lines.append(f"{letters[name]:2}{name}: {model.num_parameters():,} parameters in {num_tensors} tensors".strip())
    rows: dict[str, list[tuple[str, str]]] = {}
    for name, model in models.items():
        for kind in tensor_kinds(model):
            rows.setdefault(kind.name, []).append((letters[name], numbers(kind)))
        for tied, original in tied_tensors(model).items():
            rows.setdefault(tied, []).append((letters[name], f"{'the same tensor as ' + original:>48}"))
    width = max(map(len, rows)) + 3
    lines += ["", f"{'tensor':{width}}{'shape':>20}{'mean':>10}{'std':>9}{'first block':>14}{'last block':>12}"]
    for kind_name, of_models in rows.items():
        names = [kind_name, *[""] * len(of_models)]
        lines += [f"{n:{width - 2}}{letter:2}{text}" for n, (letter, text) in zip(names, of_models, strict=False)]
    return lines


def numbers(kind: TensorKind) -> str:
    """The columns of a kind: shape, mean, standard deviation, and that of its first and its last block."""
    count = f"{len(kind.stds)} x " if len(kind.stds) > 1 else ""
    mean = round(kind.mean, 4) + 0.0  # which is 0, not -0
    text = f"{count + shape_text(kind.shape):>20}{mean:10.4f}{kind.std:9.4f}"
    return text + (f"{kind.stds[0]:14.4f}{kind.stds[-1]:12.4f}" if count else "")


def shape_text(shape: Sequence[int]) -> str:
    """(50257, 768) -> '(50257, 768)'; (768,) -> '(768)'."""
    return f"({', '.join(map(str, shape))})"


if __name__ == "__main__":
    main()
