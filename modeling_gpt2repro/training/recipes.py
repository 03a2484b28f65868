"""Recipes: optimizer, schedule and rate together, to reach the loss of the lecture's recipe with fewer tokens.

| recipe     | blocks' matrices | rate, times the preset's | warm-up at 124M | after it         | tokens |
|------------|------------------|--------------------------|-----------------|------------------|--------|
| lecture    | AdamW            | 1 (6e-4 at 124M)         | 375 M tokens    | cosine, to 0.1 x | 10 B   |
| fast-adamw | AdamW            | 3                        | 131 M tokens    | line, to 0       | 0.65 x |
| muon       | Muon             | 3                        | 131 M tokens    | line, to 0       | 0.42 x |

The tokens are predictions for GPT-2 124M, from runs of models that differ a little (see `source`); nobody has published
these recipes on GPT-2 itself. The model is the same with all three.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

GPT2_SMALL = {"n_layer": 12, "n_head": 12, "n_embd": 768}  # the size that the sources are about
SHORT_WARMUP = 250 * 2**19 / 375e6  # of the lecture's warm-up: 250 steps, 131 M tokens


@dataclass(frozen=True)
class Recipe:
    """How a run differs from its preset, and why."""

    source: str
    expected_tokens: float  # to the lecture's final loss at 124M, as a share of its 10 B
    defaults: Mapping[str, str] = field(default_factory=dict)
    rate_factor: float = 1.0  # on the preset's learning rate
    # Preset -> its own factor: what is right at 124M is too much for a model of a million parameters, or too little.
    preset_rate_factors: Mapping[str, float] = field(default_factory=dict)
    warmup_factor: float = 1.0  # on the preset's warm-up


RECIPES = {
    "lecture": Recipe(source="Karpathy's lecture, after GPT-3, appendix B", expected_tokens=1.0),
    # 6.44 B tokens gave the loss that llm.c's GPT-2 124M has after 9.9 B with 6e-4: rate 1.8e-3, 256 steps of warm-up,
    # a line to 0 at the end; GELU, learned positions, tied embedding, but RMSNorm and no biases.
    "fast-adamw": Recipe(
        source="modded-nanogpt@7a8ace2a, README and run.sh",
        expected_tokens=0.65,
        defaults={"lr_scheduler_type": "linear"},
        rate_factor=3.0,
        preset_rate_factors={"quickstart": 1.0, "own-text": 1.0},  # in the quickstart 2 x is worse than 1 x
        warmup_factor=SHORT_WARMUP,
    ),
    # 3.25 B tokens where AdamW took 5.0 B, another 0.65, with 0.2 * 1.8e-3 * sqrt(max(rows, columns)); also with rotary
    # positions.
    "muon": Recipe(
        source="modded-nanogpt, records/track_1_short/2024-10-10_Muon",
        expected_tokens=0.42,
        defaults={"optimizer": "muon", "lr_scheduler_type": "linear"},
        rate_factor=3.0,
        preset_rate_factors={"quickstart": 2.0},
        warmup_factor=SHORT_WARMUP,
    ),
}


def recipe_defaults(values: Mapping) -> dict:
    """The defaults of the other flags that a recipe replaces.

    Args:
        values: Name -> value so far of all flags, with the preset's defaults, and the recipe that was chosen.
    """
    recipe = RECIPES.get(values["recipe"])
    if recipe is None or recipe is RECIPES["lecture"]:  # an unknown one is reported with the other errors
        return {}
    warmup_tokens = values["warmup_tokens"]
    factor = recipe.preset_rate_factors.get(values["preset"], recipe.rate_factor)
    return {
        **recipe.defaults,
        "learning_rate": float(f"{values['learning_rate'] * factor:.6g}"),  # 0.0018, not 0.0017999999999999997
        "warmup_tokens": None if warmup_tokens is None else round(warmup_tokens * recipe.warmup_factor),
    }


def describe_recipe(name: str, preset: str, shape: Mapping[str, int], fine_tuned: bool) -> str:
    """The recipe, its source and what to expect; or that there is no source for what the run does."""
    recipe = RECIPES[name]
    if name == "lecture":
        return f"{name} ({recipe.source})"
    if fine_tuned:
        return f"{name}; no source has tried it in fine-tuning"
    if preset in recipe.preset_rate_factors:
        factor = recipe.preset_rate_factors[preset]
        return f"{name}; with {factor:g} x the usual rate, for models as small as that of the preset {preset}"
    if shape != GPT2_SMALL:
        return f"{name}; no source has tried it at this size, so {recipe.rate_factor:g} x the usual rate is a guess"
    tokens = f"{recipe.expected_tokens:g} x the tokens for the loss of the lecture's recipe"
    return f"{name} ({recipe.source}); predicted, not measured: {tokens}"
