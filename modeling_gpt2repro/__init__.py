"""GPT-2, reproduced: importing this package registers the model with transformers' Auto classes.

Where GPT2REPRO_LAZY is set, as prepare_data.py sets it for itself and its workers, that waits until a name of the
package is asked for: preparing data needs neither the model nor torch, which take seconds and 300 MB a process.
"""

import os
from importlib import import_module

__all__ = [
    "GPT2ReproConfig",
    "GPT2ReproForCausalLM",
    "GPT2ReproForQuestionAnswering",
    "GPT2ReproForSequenceClassification",
    "GPT2ReproForTokenClassification",
    "GPT2ReproModel",
    "GPT2ReproPreTrainedModel",
]
AUTO_CLASSES = {
    "AutoModel": "GPT2ReproModel",
    "AutoModelForCausalLM": "GPT2ReproForCausalLM",
    "AutoModelForQuestionAnswering": "GPT2ReproForQuestionAnswering",
    "AutoModelForSequenceClassification": "GPT2ReproForSequenceClassification",
    "AutoModelForTokenClassification": "GPT2ReproForTokenClassification",
}


def __getattr__(name: str):
    """The package's names, on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    register()
    return globals()[name]


def register():
    """Import the model and tell the Auto classes of it."""
    import transformers

    model = import_module(".modeling_gpt2repro", __name__)
    globals().update({name: getattr(model, name) for name in __all__})
    transformers.AutoConfig.register("gpt2repro", model.GPT2ReproConfig, exist_ok=True)
    for auto_class, model_class in AUTO_CLASSES.items():
        getattr(transformers, auto_class).register(model.GPT2ReproConfig, getattr(model, model_class), exist_ok=True)


if not os.environ.get("GPT2REPRO_LAZY"):
    register()
