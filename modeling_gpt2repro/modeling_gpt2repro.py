"""GPT-2 from scratch, as a transformers model (Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners").

Shapes: B batch, T sequence, C channels (`n_embd`), H heads (`n_head`), D = C / H head size, V vocabulary,
S keys (T plus what the cache holds).
"""

import math

import torch
from torch import nn
from transformers import AutoModel, Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_gpt2repro import GPT2ReproConfig

# Trainer's label smoothing shifts the labels of the classes that stand here; of any other it would train a copier.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(GPT2ReproConfig.model_type, "GPT2ReproForCausalLM")


# Under this name older versions of transformers look for it in this file, before they let a model change its attention.
def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """softmax(q k' / sqrt(D) + mask) v, written out. The other implementations are transformers' own.

    Args:
        query: (B, H, T, D); key and value: (B, H, S, D).
        attention_mask: Additive, (B, 1, T, S), or None where every query sees every key.

    Returns:
        The mixed values (B, T, H, D) and the weights (B, H, T, S).
    """
    weights = query @ key.transpose(-2, -1) * scaling  # (B, H, T, S)
    if attention_mask is not None:
        weights = weights + attention_mask
    # In fp32 also under bf16: a sum over a thousand weights needs more than 8 bits.
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights  # (B, T, H, D)


TOO_LONG = "the context of {} tokens is longer than n_positions ({}): shorten the prompt, or ask for fewer new tokens."
# Stock GPT-2 holds these as (inputs, outputs); `nn.Linear` is (outputs, inputs).
TRANSPOSED_IN_STOCK = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def gelu(x):
    """GPT-2's tanh form of GELU: 0.5 x (1 + tanh u) with u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    if not torch.compiler.is_compiling():
        return nn.functional.gelu(x, approximate="tanh")
    # The same by 1 + tanh u = 2 sigmoid(2u): in a fused kernel on a CPU, exp takes half the time of tanh.
    return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x))


def parts_of_packed_rows(position_ids, B: int) -> dict[str, torch.Tensor | int]:
    """Tell flash-attention, which takes no mask, where the parts of packed rows start, B rows of T tokens laid end to
    end. By itself transformers sees parts in a batch of one row only, and of that none before the first position 0.

    position_ids (B, T) or (1, T): [[0, 1, 0], [4, 5, 6]] -> starts and end [0, 2, 3, 6], longest part 3.
    """
    starts = position_ids.diff(prepend=position_ids[:, :1]).expand(B, -1) != 1  # (B, T)
    bounds = nn.functional.pad(starts.flatten().nonzero().flatten(), (0, 1), value=starts.numel()).int()
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def positions_to_keep(hidden_states, kept: int | torch.Tensor):
    """(B, T, C) -> (B, N, C): the last `kept` positions (0: all), those of every row (N,) or of each row (B, N); or
    (N, C), where a mask (B, T) is true."""
    if isinstance(kept, int):
        return hidden_states[:, slice(-kept, None)]
    if kept.ndim == 1:
        return hidden_states[:, kept]
    return hidden_states[kept] if kept.dtype == torch.bool else torch.take_along_dim(hidden_states, kept[..., None], 1)


def residual_projection(in_features: int, config: GPT2ReproConfig) -> nn.Linear:
    """The layer that writes into the residual stream: smaller at initialization, because 2 n_layer of them add up."""
    linear = nn.Linear(in_features, config.n_embd)
    linear.initializer_std = config.initializer_range / math.sqrt(2 * config.n_layer)
    return linear


class GPT2ReproAttention(nn.Module):
    """Causal self-attention with H heads."""

    def __init__(self, config: GPT2ReproConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.n_embd // config.n_head
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = residual_projection(config.n_embd, config)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, **kwargs):
        """hidden_states (B, T, C) -> mixed (B, T, C), weights (B, H, T, S) or None where they are not computed."""
        B, T, C = hidden_states.shape
        query, key, value = (
            part.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)
            for part in self.c_attn(hidden_states).split(C, dim=-1)  # (B, T, C) each
        )
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # (B, H, S, D)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        mixed, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        return self.c_proj(mixed.reshape(B, T, C)), weights


class GPT2ReproMLP(nn.Module):
    """Two layers, four times as wide in between, with GPT-2's tanh form of GELU."""

    def __init__(self, config: GPT2ReproConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = residual_projection(4 * config.n_embd, config)

    def forward(self, hidden_states):
        """(B, T, C) -> (B, T, C)."""
        return self.c_proj(gelu(self.c_fc(hidden_states)))


class GPT2ReproBlock(GradientCheckpointingLayer):
    """Attention, then MLP; each reads a normalized copy of the residual stream and adds to it (pre-norm)."""

    def __init__(self, config: GPT2ReproConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2ReproAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2ReproMLP(config)

    def forward(self, hidden_states, **kwargs):
        """(B, T, C) -> (B, T, C). `hidden_states` is positional because gradient checkpointing needs it so."""
        mixed, _ = self.attn(self.ln_1(hidden_states), **kwargs)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class GPT2ReproPreTrainedModel(PreTrainedModel):
    """What all models of this family share: loading, saving, initialization, attention implementations."""

    config: GPT2ReproConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "wte"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GPT2ReproBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": GPT2ReproBlock, "attentions": GPT2ReproAttention}

    def __init__(self, config: GPT2ReproConfig):
        super().__init__(config)
        if type(config).__name__ == GPT2ReproConfig.__name__:  # not a subclass, which has a model of its own
            AutoModel.register(type(config), GPT2ReproModel, exist_ok=True)  # where generic heads look for their body

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """Load weights as `PreTrainedModel.from_pretrained`, only never stock GPT-2's transposed ones.

        Raises:
            ValueError: If `ignore_mismatched_sizes` would skip a block's matrix: the square ones would be loaded as
                they are, that is, transposed.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        wrong = sorted(str(key) for key, *_ in info["mismatched_keys"] if str(key).endswith(TRANSPOSED_IN_STOCK))
        if wrong:
            raise ValueError(
                f"{', '.join(wrong)}: of another shape than this model's; convert a stock GPT-2 with "
                "python -m modeling_gpt2repro.hub.conversion --from NAME --to DIR."
            )
        return (model, info) if output_loading_info else model

    @torch.no_grad()
    def _init_weights(self, module):
        """Initialize as GPT-2 was; std is `initializer_range`, 0.02 unless the config says otherwise.

        | tensor                         | distribution                                                |
        |--------------------------------|-------------------------------------------------------------|
        | wte.weight (tied to lm_head)   | normal(0, std)                                              |
        | wpe.weight                     | normal(0, `position_initializer_range`), 0.01               |
        | c_attn.weight, c_fc.weight     | normal(0, std)                                              |
        | c_proj.weight (attn and mlp)   | normal(0, std / sqrt(2 n_layer)) (Radford et al. 2019, 2.3) |
        | every bias                     | 0                                                           |
        | ln_*.weight                    | 1                                                           |
        """
        # Layer by layer: transformers does not call this for modules without parameters of their own where the class
        # ships its code, so a block cannot set the weights of its layers here.
        if isinstance(module, nn.Linear | nn.Embedding):
            std = getattr(module, "initializer_std", self.config.initializer_range)
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
        if getattr(module, "bias", None) is not None:
            init.zeros_(module.bias)


class GPT2ReproModel(GPT2ReproPreTrainedModel):
    """The network without a head: ids in, final hidden states out."""

    _auto_class = "AutoModel"

    def __init__(self, config: GPT2ReproConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.wpe.initializer_std = config.position_initializer_range
        self.h = nn.ModuleList(GPT2ReproBlock(config, layer_idx) for layer_idx in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Run the blocks.

        Args:
            input_ids: (B, T); or `inputs_embeds`: (B, T, C).
            attention_mask: (B, S), 1 for tokens and 0 for padding on either side; None where there is no padding.
            position_ids: (B, T). Where not given they are counted along the attention mask, so that a padded row gives
                what it gives without padding. Where they restart inside a row, and neither mask nor cache is given, its
                parts do not see each other.
            past_key_values: Keys and values of the tokens before.

        Returns:
            `last_hidden_state` (B, T, C), after the final norm, and `past_key_values` if `use_cache`.

        Raises:
            ValueError: On neither or both inputs, ids outside the vocabulary (seen on a CPU), a context longer than
                `n_positions`, or inputs of stock GPT-2 that this model has not.
        """
        strange = [name for name in ("token_type_ids", "encoder_hidden_states") if kwargs.get(name) is not None]
        if strange:
            raise ValueError(f"{', '.join(strange)}: this model has no such input; leave it out.")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            try:
                inputs_embeds = self.wte(input_ids)  # (B, T, C)
            except IndexError as error:  # of a CPU; a GPU ends in an assertion
                raise ValueError(
                    f"input_ids from {input_ids.min()} to {input_ids.max()} leave the vocabulary, 0 to "
                    f"{self.wte.weight.shape[0] - 1}: was another tokenizer used?"
                ) from error
        T = inputs_embeds.shape[1]
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        # Plain causal attention goes without a mask, which would cost up to 1.4 times the time: sdpa knows `is_causal`.
        # Said here, because many versions of transformers build one under torch.compile.
        causal_mask = None
        counted = attention_mask is None and position_ids is None  # positions are those of the tokens
        if not (counted and past_key_values is None and self.config._attn_implementation == "sdpa"):
            causal_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        flash = is_flash_attention_requested(self.config)
        maybe_packed = position_ids is not None and attention_mask is None and past_key_values is None
        if flash and maybe_packed and kwargs.get("cu_seq_lens_q") is None:  # which a collator may have found before
            kwargs |= parts_of_packed_rows(position_ids, len(inputs_embeds))
        if use_cache and past_key_values is None:  # after the mask, which keeps packed rows apart only without a cache
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            if attention_mask is not None and attention_mask.ndim == 2:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]  # (B, T)
            else:
                position_ids = (torch.arange(T, device=inputs_embeds.device) + past).unsqueeze(0)  # (1, T)
        # Padding and packing may make a row longer than its positions: then the largest one decides, and is read, for
        # which a GPU has to wait. A static cache counts in a tensor there, which is left alone.
        limit, length = self.config.n_positions, past + T if isinstance(past, int) else 0
        if length > limit and not counted:
            length = 0 if torch.compiler.is_compiling() else int(position_ids.max()) + 1
        if length > limit:
            raise ValueError(TOO_LONG.format(length, limit))
        try:
            hidden_states = inputs_embeds + self.wpe(position_ids)  # (B, T, C)
        except IndexError as error:
            raise ValueError(TOO_LONG.format(int(position_ids.max()) + 1, limit)) from error
        for block in self.h:
            hidden_states = block(
                hidden_states,
                attention_mask=causal_mask,
                past_key_values=past_key_values,
                # Flash-attention has its parts; it would look for them again in every layer, for which a GPU waits.
                position_ids=None if flash else position_ids,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(hidden_states), past_key_values=past_key_values if use_cache else None
        )


class GPT2ReproForCausalLM(GPT2ReproPreTrainedModel, GenerationMixin):
    """GPT-2 with its language-modeling head, whose matrix is the token embedding."""

    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: GPT2ReproConfig):
        super().__init__(config)
        self.transformer = GPT2ReproModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_logits: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Predict the next token at every position.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds: See `GPT2ReproModel.forward`.
            labels: (B, T), the inputs themselves: they are shifted inside, so the last position predicts nothing.
            kwargs: `shift_labels` (B, T), the token after each position, already shifted: all T positions are trained.
                In both, -100 is left out of the loss. `num_items_in_batch`: what the summed loss is divided by in place
                of the number of its tokens. `output_hidden_states`, `output_attentions`.
            logits_to_keep: Compute logits of the last so many positions only (0: all), or of the positions in a tensor:
                of every row (N,), of each row (B, N), or where a mask (B, T) is true, which gives (N, V).
            return_logits: False leaves the logits out of the output, where only the loss is wanted: a wrapper that
                copies outputs to fp32, as accelerate's does, would otherwise copy B T V numbers for nothing.

        Returns:
            `loss` (a scalar in nats per token) where labels were given, `logits` (B, T, V), `past_key_values`.
        """
        # Not a parameter: Trainer takes each one with "label" in its name for a column that every batch must have.
        shift_labels = kwargs.pop("shift_labels", None)
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(positions_to_keep(outputs.last_hidden_state, logits_to_keep))  # (B, T, V)
        loss = None
        if shift_labels is not None:
            shift_labels = shift_labels.contiguous()  # a slice of rows is not, and the loss views it
        if labels is not None or shift_labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, shift_labels=shift_labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits if return_logits else None,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class GPT2ReproForSequenceClassification(GenericForSequenceClassification, GPT2ReproPreTrainedModel):
    """A class for a row: input_ids (B, T), labels (B,) -> logits (B, num_labels), read at the last token that is not
    `pad_token_id`."""

    _auto_class = "AutoModelForSequenceClassification"
    base_model_prefix = "transformer"


class GPT2ReproForTokenClassification(GenericForTokenClassification, GPT2ReproPreTrainedModel):
    """A class for each token: input_ids (B, T), labels (B, T) -> logits (B, T, num_labels)."""

    _auto_class = "AutoModelForTokenClassification"
    base_model_prefix = "transformer"


class GPT2ReproForQuestionAnswering(GenericForQuestionAnswering, GPT2ReproPreTrainedModel):
    """Where an answer starts and ends: input_ids (B, T), start_positions and end_positions (B,) -> start_logits and
    end_logits (B, T)."""

    _auto_class = "AutoModelForQuestionAnswering"
    base_model_prefix = "transformer"
    # The mixin looks for Llama's name of the embedding.
    get_input_embeddings = GPT2ReproPreTrainedModel.get_input_embeddings
    set_input_embeddings = GPT2ReproPreTrainedModel.set_input_embeddings


__all__ = [
    "GPT2ReproConfig",
    "GPT2ReproForCausalLM",
    "GPT2ReproForQuestionAnswering",
    "GPT2ReproForSequenceClassification",
    "GPT2ReproForTokenClassification",
    "GPT2ReproModel",
    "GPT2ReproPreTrainedModel",
]
