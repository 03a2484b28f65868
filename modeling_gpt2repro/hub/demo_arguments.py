"""Arguments of `python -m modeling_gpt2repro.hub.demo`, and their checks."""

from collections.abc import Iterator
from dataclasses import dataclass

from modeling_gpt2repro.evaluation.load_model import best_device, device_problem, find_model, model_problem
from modeling_gpt2repro.runtime.command_line import InputErrors, arg, check_limits


@dataclass
class DemoArguments:
    """Which models the page shows, and where it is served."""

    model: str = arg(
        positional=True,
        help="Model that continues the text: the folder of a run (its final model, or else its last checkpoint), the "
        "folder of any causal language model, or a model on the Hub.",
        group="models",
    )
    model2: str | None = arg(positional=True, help="A second one, shown beside it. If not given, there is none.")
    trust_remote_code: bool = arg(default=False, help="Let a model's repository run its own Python code.")
    dtype: str = arg(
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="Precision of the weights and the forward.",
        group="hardware",
    )
    device: str | None = arg(
        default=None,
        help="'cuda', 'cuda:1', 'mps' or 'cpu'. If not given, the first of cuda, mps and cpu that exists.",
    )
    port: int = arg(default=7860, minimum=1, below=65536, help="The page is at http://127.0.0.1:PORT.", group="page")

    def __post_init__(self):
        self.device = self.device or best_device()
        InputErrors([*check_limits(self), *self._check_inputs()]).raise_if_any()

    def _check_inputs(self) -> Iterator[str]:
        if self.model is None:
            yield "MODEL is missing: give the folder of a run or of a model, or the name of a model on the Hub."
        yield from filter(None, (model_problem(find_model(name), flag) for flag, name in self.models()))
        yield from filter(None, (device_problem(self.device),))

    def models(self) -> list[tuple[str, str]]:
        """Of each model where it was given, and its name."""
        given = {"MODEL": self.model, "MODEL2": self.model2}
        return [(flag, name) for flag, name in given.items() if name is not None]
