"""Configuration of the GPT-2 reproduction: the shape of the network, under GPT-2's field names."""

from typing import TYPE_CHECKING

import transformers

# Before the imports below, which older versions lack: a person who loads the model then reads what to install.
if tuple(int(number) for number in transformers.__version__.split(".")[:2]) < (5, 5):
    raise ImportError(
        f"gpt2repro models need transformers 5.5.0 or newer, this is {transformers.__version__}: "
        "pip install --upgrade transformers"
    )

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.utils import logging

if TYPE_CHECKING:
    # Never run, but read by transformers: a configuration file counts as the same code as another folder's only if the
    # files that it imports are the same, too. Without this line, the second of two folders whose modeling files differ
    # would run the first one's.
    from .modeling_gpt2repro import GPT2ReproModel  # noqa: F401

logger = logging.get_logger(__name__)
# Keyword arguments that transformers itself passes to a config in addition to its fields.
NOT_FIELDS = {"attn_implementation", "auto_map", "model_type", "name_or_path", "num_labels", "output_attentions"}
NOT_FIELDS |= {"experts_implementation", "quantization_config", "torch_dtype", "transformers_weights"}
# Where the Auto classes find the code of a model on the Hub: file.class.
AUTO_MAP = {
    "AutoConfig": "configuration_gpt2repro.GPT2ReproConfig",
    "AutoModel": "modeling_gpt2repro.GPT2ReproModel",
    "AutoModelForCausalLM": "modeling_gpt2repro.GPT2ReproForCausalLM",
    "AutoModelForQuestionAnswering": "modeling_gpt2repro.GPT2ReproForQuestionAnswering",
    "AutoModelForSequenceClassification": "modeling_gpt2repro.GPT2ReproForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_gpt2repro.GPT2ReproForTokenClassification",
}


@strict
class GPT2ReproConfig(PreTrainedConfig):
    """Shape and initialization of a GPT-2; the defaults are the 124M model (Radford et al. 2019, table 2).

    There is no dropout: a model of this size that sees each token once does not overfit, and the lecture has none.

    Args:
        vocab_size: Number of token ids V, without padding: 50,257 for GPT-2's BPE.
        n_positions: Longest context in tokens.
        n_embd: Width C of the residual stream; a multiple of `n_head`.
        n_layer: Number of blocks.
        n_head: Number of attention heads H, each of size C / H.
        layer_norm_epsilon: Added to the variance in every LayerNorm, so that constant inputs divide by no zero.
        initializer_range: Standard deviation of all weights at initialization; projections into the residual stream
            are scaled down further.
        position_initializer_range: The same for the position embedding: 0.01 in GPT-2's code, 0.02 in build-nanogpt.

    Raises:
        ValueError: If a field does not exist, or if config.json belongs to another kind of model. Unknown fields of a
            config.json, where other libraries store some of their own, are kept, with a warning.
        huggingface_hub.errors.StrictDataclassError: If a field has the wrong type or the shape is impossible, with the
            value and the limit.
    """

    model_type = "gpt2repro"
    _auto_class = "AutoConfig"  # `save_pretrained` then copies this file next to the weights
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {  # transformers' names for GPT-2's
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    vocab_size: int = 50257  # 256 bytes, 50,000 merges and <|endoftext|>
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    position_initializer_range: float = 0.01
    use_cache: bool = True
    bos_token_id: int | None = 50256  # <|endoftext|>, which separates documents
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True  # transformers has no default: without this field the head would be untied

    def __post_init__(self, **kwargs):
        if kwargs.get("model_type", self.model_type) != self.model_type:
            raise ValueError(
                f"this is the config of a {kwargs['model_type']!r} model, not {self.model_type!r}: convert a stock "
                "GPT-2 with python -m modeling_gpt2repro.hub.conversion --from NAME --to DIR."
            )
        from_file = kwargs.pop("_from_file", False)
        unknown = [name for name in kwargs if name not in NOT_FIELDS | set(self.attribute_map) and name[:1] != "_"]
        fields = ", ".join(sorted(GPT2ReproConfig.__annotations__))
        if unknown and not from_file:
            raise ValueError(f"{', '.join(unknown)}: no such field in GPT2ReproConfig; it has {fields}.")
        if unknown:
            logger.warning(f"config.json has {', '.join(unknown)}, kept but not used; GPT2ReproConfig uses {fields}.")
        if type(self) is GPT2ReproConfig:  # a subclass ships code of its own
            # All classes: transformers records only the one that is saved, and the others could not be loaded.
            kwargs["auto_map"] = dict(AUTO_MAP)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """Build from the contents of a config.json, whose unknown fields are kept; see the class for the exceptions."""
        return super().from_dict({**config_dict, "_from_file": True}, **kwargs)

    @classmethod
    def from_json_file(cls, json_file: str):
        """Build from a config.json, whose unknown fields are kept; see the class for the exceptions."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

    def validate_architecture(self):
        """Check the shape; called by `@strict` after `__init__`, and by `save_pretrained`."""
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1.")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head}).")


__all__ = ["GPT2ReproConfig"]
