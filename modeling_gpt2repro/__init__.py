"""GPT-2, reproduced: importing this package registers the model with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_gpt2repro import GPT2ReproConfig
from .modeling_gpt2repro import GPT2ReproForCausalLM, GPT2ReproModel, GPT2ReproPreTrainedModel

AutoConfig.register("gpt2repro", GPT2ReproConfig, exist_ok=True)
AutoModel.register(GPT2ReproConfig, GPT2ReproModel, exist_ok=True)
AutoModelForCausalLM.register(GPT2ReproConfig, GPT2ReproForCausalLM, exist_ok=True)

__all__ = ["GPT2ReproConfig", "GPT2ReproForCausalLM", "GPT2ReproModel", "GPT2ReproPreTrainedModel"]
