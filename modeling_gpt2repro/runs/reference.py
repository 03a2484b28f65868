"""Is a loss curve normal? A run's validation loss against published runs of GPT-2 124M on FineWeb-Edu.

Losses are nats per token; t is a place in training, in tokens. The curves, each with its source, are in
reference_curves.json.

mean       m(t) of the n = 4 published runs that differ by no more than noise; linear in log t between their points.
noise      sd(t)^2 = 0.006^2 + (4 steps * slope of m)^2. Early, runs differ in time: 4 steps sooner or later. Late, they
           differ in loss. Both were fitted to the four runs; a fifth (pull request 30 of build-nanogpt) agrees.
interval   m(t) +- [q(n-1) sd(t) sqrt(1 + 1/n) + 0.01]: where 95 % of further runs lie, q(n-1) being the 0.975 quantile
           of Student's t (https://en.wikipedia.org/wiki/Prediction_interval), because 4 runs do not tell their spread
           well. The 0.01 is for the text: the lecture validates on 20 batches, whose size depends on the GPUs.
shift      t* - t with m(t*) = the run's loss: how many tokens ahead the run is.
fault      A published run with one thing wrong deviates from m by f(t). A run with deviation d(t) has the same fault if
           d = k f fits: mean of [d - k f]^2 / [sd^2 (2 + 1/n) + (0.15 k f)^2] below 2.2, the 95 % point for 5
           evaluations. k, a free factor, is how strong the fault is, 0.15 how far two instances may differ in shape.
"""

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from modeling_gpt2repro.storage.hub_files import is_on_hub
from modeling_gpt2repro.storage.json_files import is_size, read_json_object, require

CURVES_FILE = Path(__file__).with_name("reference_curves.json")
# Nats per token of OpenAI's GPT-2 124M on the validation shard of build-nanogpt, on which the curves are (its
# play.ipynb). A run on another split is compared after subtracting GPT-2's loss there from its own.
GPT2_LOSS = 3.2924
GPT2_NAMES = ("openai-community/gpt2", "gpt2")
GPT2_LABEL = "GPT-2 124M"  # in a run's baselines.json
GPT2_SCORE_FILE = "gpt2_validation.json"  # the --output of evaluation.validation, see `gpt2_score_file`

NORMAL = ("lecture-agndm", "lecture-csabapalfi", "agndm-shuffled", "agndm-half_dataset")
T_QUANTILE = {2: 4.303, 3: 3.182}  # 0.975, by degrees of freedom
LOSS_SD = 0.006
STEPS_SD = 4
TOLERANCE = 0.01
UNKNOWN_SPLIT = 0.05  # wider by this where GPT-2's loss on the split is not known; a guess
FIT_LIMIT = 2.2
SHAPE_SD = 0.15
FIRST, LAST = 250 * 2**19, 2500 * 2**19  # tokens between which faults differ in shape; before, all curves look alike
DECIDED = 0.25  # of the training, after which a published run kept its distance from the mean, within KEPT of it
KEPT = 0.3
SETTING = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "init_from": None}
RECIPE = {
    "tokens_per_step": 2**19,
    "train_tokens": 10_000_000_000,
    "learning_rate": 6e-4,
    "warmup_tokens": 375_000_000,
    "lr_scheduler_type": "cosine",
    "final_learning_rate_ratio": 0.1,
    "optimizer": "adamw",
    "weight_decay": 0.1,
    "document_mask": False,
}


@dataclass(frozen=True)
class Fault:
    """Something wrong with a run, which published runs had."""

    name: str
    curves: tuple[str, ...]  # of reference_curves.json; of several, the mean shape counts
    advice: str
    sign: int = 1  # -1: better than normal
    # Of the deviation, as a multiple of the published one: a model can be of any size, but not have two warm-ups less.
    strength: tuple[float, float] = (0.5, 1.5)
    # Loss before the first step and its spread over seeds (0.022 of four, for ours). What exceeds ln(50257) = 10.82 is
    # the variance of the logits, halved, and that is proportional to the model's width.
    first_loss: tuple[float, float] = (10.957, 0.025)
    same_end: bool = True  # whether the published run was trained as long, so that it shows what to expect at the end


SIZES = ("agndm-smaller", "agndm-bigger")  # 6 layers x 384 and 16 x 1024, equal in shape and opposite in sign
FAULTS = (
    Fault(
        "no warm-up", ("agndm-no_warmup",), "the learning rate must rise over the first 375 M tokens (warmup_tokens)"
    ),
    Fault(
        "warm-up too long",
        ("agndm-2.5_epoch_full",),
        "the lecture's takes 375 M tokens (warmup_tokens), 715 steps",
        same_end=False,
    ),
    Fault(
        "gradients not averaged over the GPUs under accumulation",
        ("wilsoncwu-unsynced",),
        "DDP must be asked to synchronize before the forward of the last micro-batch, not before its backward",
    ),
    Fault(
        "a smaller model",
        SIZES,
        "the reference has 12 layers, 12 heads and width 768",
        strength=(0.0, math.inf),
        first_loss=(10.89, 0.03),
    ),
    Fault(
        "a larger model",
        SIZES[::-1],
        "the reference has 12 layers, 12 heads and width 768",
        sign=-1,
        strength=(0.0, math.inf),
        first_loss=(11.04, 0.07),
    ),
    Fault(
        "other data",
        ("llmc-fineweb-classic",),
        "the reference is FineWeb-Edu with GPT-2's tokens; this is as FineWeb before it was filtered",
        strength=(0.0, 3.0),
        first_loss=(10.957, 0.05),
    ),
    Fault(
        "a faster recipe",
        ("fast-adamw-rotary-fineweb-classic",),
        "as with three times the learning rate and a warm-up of 256 steps",
        sign=-1,
        first_loss=(10.957, 0.05),
        same_end=False,
    ),
)


@dataclass(frozen=True)
class Curve:
    """A published run: what was run, where its log is, and its evaluations."""

    what: str
    source: str
    tokens: np.ndarray  # (n,), without the evaluation before the first step
    losses: np.ndarray  # (n,)
    first_loss: float | None
    hellaswag: float | None  # acc_norm, protocol completion, at the end


@lru_cache
def published_curves() -> dict[str, Curve]:
    """Name -> curve, all of reference_curves.json."""
    curves = {}
    for name, stored in read_json_object(CURVES_FILE).items():
        first = stored["validation_loss"][0]
        steps, losses = np.array(stored["validation_loss"], dtype=float)[first[0] == 0 :].T
        hellaswag = stored["hellaswag"][-1][1] if "hellaswag" in stored else None
        tokens = steps * stored["tokens_per_step"]
        first_loss = first[1] if first[0] == 0 else None
        curves[name] = Curve(stored["what"], stored["source"], tokens, losses, first_loss, hellaswag)
    return curves


class Reference:
    """The mean of the published runs that are normal, its noise, and the faults' deviations from it."""

    def __init__(self, without: Sequence[str] = ()):
        """Args: without: Curves to leave out, to compare them with the rest."""
        self.curves = {name: curve for name, curve in published_curves().items() if name not in without}
        normal = [self.curves[name] for name in NORMAL if name in self.curves]
        self.count = len(normal)
        self.tokens = normal[0].tokens  # (n,), the same of all
        self.losses = np.mean([curve.losses for curve in normal], axis=0)
        self._slopes = np.abs(np.gradient(self.losses, self.tokens))
        self.hellaswag = self._fit_hellaswag()

    def mean(self, tokens: np.ndarray) -> np.ndarray:
        """m(t) for tokens (m,)."""
        return np.interp(np.log(tokens), np.log(self.tokens), self.losses)

    def sd(self, tokens: np.ndarray) -> np.ndarray:
        """Standard deviation of the loss of equivalent runs."""
        return np.hypot(LOSS_SD, STEPS_SD * 2**19 * np.interp(tokens, self.tokens, self._slopes))

    def half_width(self, tokens: np.ndarray) -> np.ndarray:
        """Of the interval in which 95 % of further runs lie."""
        return T_QUANTILE[self.count - 1] * self.sd(tokens) * math.sqrt(1 + 1 / self.count) + TOLERANCE

    def tokens_at(self, loss: float) -> float:
        """t* with m(t*) = loss; the first or the last tokens of the reference if it is above or below all of it."""
        return float(np.exp(np.interp(-loss, -self.losses, np.log(self.tokens))))

    def shape(self, fault: Fault, tokens: np.ndarray) -> tuple[np.ndarray, float] | None:
        """f(t) of a fault (m,), scaled to a root mean square of 1 at the steps 250, 500, 750 and 1000, and its scale.

        None without a curve.
        """
        shapes, scales = [], []
        grid = FIRST * np.arange(1, 5)
        for curve in (self.curves[name] for name in fault.curves if name in self.curves):
            at = curve.tokens[curve.tokens >= FIRST]
            deviation = curve.losses[curve.tokens >= FIRST] - self.mean(at)

            def interpolated(where: np.ndarray, at=at, deviation=deviation) -> np.ndarray:
                return np.interp(np.log(where), np.log(at), deviation)

            scale = math.sqrt(np.mean(interpolated(grid) ** 2))
            scale *= np.sign(interpolated(grid).sum()) * fault.sign
            shapes.append(interpolated(tokens) / scale)
            scales.append(abs(scale))
        return (np.mean(shapes, axis=0), scales[0]) if shapes else None

    def fit(
        self, fault: Fault, tokens: np.ndarray, deviation: np.ndarray, first_loss: float | None
    ) -> tuple[float, float] | None:
        """How badly a fault explains a run (the mean of squared errors in units of their variance), and k f(end).

        None if its sign or strength is not the fault's.
        """
        shaped = self.shape(fault, np.append(tokens, self.tokens[-1]))
        if shaped is None:
            return None
        shape, scale = shaped
        shape, end = shape[:-1], shape[-1]
        strength = (deviation * shape).sum() / (shape**2).sum()
        if not fault.strength[0] * scale < strength < fault.strength[1] * scale:
            return None
        expected = strength * shape
        variance = self.sd(tokens) ** 2 * (2 + 1 / self.count) + (SHAPE_SD * expected) ** 2
        errors = list((deviation - expected) ** 2 / variance)
        if first_loss is not None:
            errors.append(((first_loss - fault.first_loss[0]) / fault.first_loss[1]) ** 2)
        return float(np.mean(errors)), float(strength * end)

    def _fit_hellaswag(self) -> tuple[np.ndarray, float]:
        """Coefficients of a parabola through (loss, HellaSwag) at the end of the one-epoch runs, and its half-width."""
        ends = [c for c in self.curves.values() if c.hellaswag and c.first_loss and c.tokens[-1] <= self.tokens[-1]]
        losses = np.array([curve.losses[-1] for curve in ends])
        accuracies = np.array([curve.hellaswag for curve in ends])
        coefficients = np.polyfit(losses, accuracies, 2)
        residuals = accuracies - np.polyval(coefficients, losses)
        return coefficients, 2.5 * math.sqrt((residuals**2).sum() / (len(ends) - 3))  # 2.5: t of 6 degrees of freedom


def gpt2_score_file(shards: str | Path) -> Path:
    """Where the score of GPT-2 on these shards is: beside them, and of those on the Hub, in their folder of its cache.

    "hf://owner/name@main" -> ~/.cache/huggingface/hub/datasets--owner--name/gpt2_validation.json
    """
    if not is_on_hub(str(shards)):
        return Path(shards, GPT2_SCORE_FILE)
    name = re.sub(r"^hf://(datasets/)?|@.*|/$", "", str(shards))
    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="dataset"), GPT2_SCORE_FILE)


def gpt2_loss_of_shards(shards: str | Path, fingerprint: object) -> float | None:
    """GPT-2's loss on their validation split: published for build-nanogpt's own shards, else from GPT2_SCORE_FILE.

    Args:
        shards: Their folder, or their address on the Hub.
        fingerprint: Of the run's shards; a score of others does not count.
    """
    with suppress(OSError, ValueError):
        folder = Path(shards)
        if not (folder / "manifest.json").exists() and any(folder.glob("edufineweb_val_*.npy")):
            return GPT2_LOSS
        return read_gpt2_score(gpt2_score_file(shards), fingerprint)
    return None


def read_gpt2_score(path: Path, fingerprint: object = None) -> float:
    """The loss in a report of evaluation.validation.

    Raises:
        OSError: If the disk refuses the file.
        ValueError: If it is not a report of GPT-2, or on shards of another fingerprint.
    """
    report = read_json_object(path)
    results = report.get("results")
    loss = results.get("validation_loss") if type(results) is dict else None
    require(is_size(loss), "it has no validation_loss: it must be the --output of evaluation.validation")
    require(report.get("model") in GPT2_NAMES, f"its model is {report.get('model')}, not {GPT2_NAMES[0]}")
    require(not report.get("encoded_again"), "its loss is per token of GPT-2's, which the shards do not have")
    scored = report.get("shards_fingerprint")
    require(not isinstance(fingerprint, str) or scored == fingerprint, "it is of other shards than the run's")
    return loss
