"""GPT-2, reproduced: importing this package registers the model with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_gpt2repro import GPT2ReproConfig
from .modeling_gpt2repro import (
    GPT2ReproForCausalLM,
    GPT2ReproForQuestionAnswering,
    GPT2ReproForSequenceClassification,
    GPT2ReproForTokenClassification,
    GPT2ReproModel,
    GPT2ReproPreTrainedModel,
)

AutoConfig.register("gpt2repro", GPT2ReproConfig, exist_ok=True)
for auto_class, model_class in {
    AutoModel: GPT2ReproModel,
    AutoModelForCausalLM: GPT2ReproForCausalLM,
    AutoModelForQuestionAnswering: GPT2ReproForQuestionAnswering,
    AutoModelForSequenceClassification: GPT2ReproForSequenceClassification,
    AutoModelForTokenClassification: GPT2ReproForTokenClassification,
}.items():
    auto_class.register(GPT2ReproConfig, model_class, exist_ok=True)

__all__ = [
    "GPT2ReproConfig",
    "GPT2ReproForCausalLM",
    "GPT2ReproForQuestionAnswering",
    "GPT2ReproForSequenceClassification",
    "GPT2ReproForTokenClassification",
    "GPT2ReproModel",
    "GPT2ReproPreTrainedModel",
]
