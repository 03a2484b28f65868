"""GPT-2 from scratch, as a transformers model: the network of Radford et al. 2019, "Language Models are Unsupervised
Multitask Learners" (below: the paper), from attention up to the language-modeling head; then what its users need.

Shapes: B batch, T sequence, C channels (`n_embd`), H heads (`n_head`), D = C / H head size, V vocabulary,
S keys (T plus the tokens in the cache).
"""

import math

import torch
from torch import Tensor, nn
from transformers import AutoModel, Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers import modeling_layers as layers
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_gpt2repro import GPT2ReproConfig


# transformers 5.5 searches this file for this name before it allows another attention implementation.
def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """softmax(query key^T / sqrt(D) + mask) value, step by step; sdpa and flash-attention fuse the same steps.

    query (B, H, T, D), key and value (B, H, S, D) -> attention output (B, T, H, D), attention weights (B, H, T, S).
    """
    attn_weights = query @ key.transpose(-2, -1) * scaling  # (B, H, T, S)
    if attention_mask is not None:
        attn_weights = attn_weights + attention_mask  # (B, 1, T, S): 0, or a huge negative number to hide a key
    # In fp32 even under bf16, whose 8 significant bits are too few for a sum over a thousand keys.
    attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    return (attn_weights @ value).transpose(1, 2), attn_weights  # (B, T, H, D)


class GPT2ReproAttention(nn.Module):
    """Causal self-attention with H heads: each token gathers information from itself and the tokens before it."""

    def __init__(self, config: GPT2ReproConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx  # the cache stores keys and values by layer
        self.head_dim = config.n_embd // config.n_head
        # 1 / sqrt(D), because a dot product of D components of variance 1 has variance D: it would saturate softmax.
        self.scaling = self.head_dim**-0.5  # Vaswani et al. 2017, 3.2.1
        self.is_causal = True  # for transformers' sdpa and flash-attention, which then need no mask
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k and v in one matmul
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.c_proj.writes_to_residual_stream = True  # see `_init_weights`

    def forward(self, hidden_states: Tensor, attention_mask=None, past_key_values: Cache | None = None, **kwargs):
        """(B, T, C) -> attention output (B, T, C), and weights (B, H, T, S) if the implementation returns them."""
        B, T, C = hidden_states.shape
        q, k, v = self.c_attn(hidden_states).split(C, dim=-1)  # (B, T, C) each
        q, k, v = (x.view(B, T, -1, self.head_dim).transpose(1, 2) for x in (q, k, v))  # (B, H, T, D) each
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)  # (B, H, S, D)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attn_output, attn_weights = attention(self, q, k, v, attention_mask, scaling=self.scaling, **kwargs)
        return self.c_proj(attn_output.reshape(B, T, C)), attn_weights  # (B, T, H, D) -> (B, T, C): heads side by side


def gelu(x: Tensor) -> Tensor:
    """GELU in tanh form, as OpenAI's weights were trained: 0.5 x (1 + tanh u), u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    if not torch.compiler.is_compiling():
        return nn.functional.gelu(x, approximate="tanh")  # the exact form, by erf, differs by up to 5e-4
    # The same, because 1 + tanh u = 2 sigmoid(2u): in a fused CPU kernel, exp takes half the time of tanh.
    return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x))


class GPT2ReproMLP(nn.Module):
    """Two layers that process each position by itself, four times as wide in between (Vaswani et al. 2017, 3.3)."""

    def __init__(self, config: GPT2ReproConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.c_proj.writes_to_residual_stream = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.c_proj(gelu(self.c_fc(hidden_states)))  # (B, T, C) -> (B, T, 4 C) -> (B, T, C)


class GPT2ReproBlock(layers.GradientCheckpointingLayer):
    """Attention, in which tokens communicate, then the MLP, in which each computes by itself."""

    def __init__(self, config: GPT2ReproConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2ReproAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2ReproMLP(config)

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        """(B, T, C) -> (B, T, C). `hidden_states` must be passed by position: gradient checkpointing requires it."""
        # Pre-norm (paper, 2.3): each part reads a normalized copy of the residual stream and adds to the stream, which
        # is never normalized itself, so gradients flow unchanged from the loss down to the embeddings.
        attn_output, _ = self.attn(self.ln_1(hidden_states), **kwargs)
        hidden_states = hidden_states + attn_output
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class GPT2ReproPreTrainedModel(PreTrainedModel):
    """What all models of this family share: initialization, loading, and what transformers may do with them."""

    config: GPT2ReproConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "wte"
    supports_gradient_checkpointing = _can_compile_fullgraph = True
    _no_split_modules = ["GPT2ReproBlock"]  # kept on one device, because of its residual connections
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": GPT2ReproBlock, "attentions": GPT2ReproAttention}

    def __init__(self, config: GPT2ReproConfig):
        super().__init__(config)
        # The generic heads build their body with `AutoModel.from_config`. Registered here and not at import, because
        # the config's class is not the one imported above if both were loaded as remote code.
        if type(config).__name__ == GPT2ReproConfig.__name__:  # a subclass registers a model of its own
            AutoModel.register(type(config), GPT2ReproModel, exist_ok=True)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Initialize as GPT-2 does; std is `initializer_range`, 0.02 by default.

        | tensor                                     | distribution                                  |
        |--------------------------------------------|-----------------------------------------------|
        | wte (tied to lm_head), c_attn, c_fc        | normal(0, std)                                |
        | wpe                                        | normal(0, `position_initializer_range`), 0.01 |
        | c_proj of attention and MLP                | normal(0, std / sqrt(2 n_layer)) (paper, 2.3) |
        | every bias; every weight of a LayerNorm    | 0; 1                                          |
        """
        # Layer by layer: transformers does not call this for a block of remote code, which has no parameters itself.
        if isinstance(module, nn.Linear | nn.Embedding):
            std = getattr(module, "initializer_std", self.config.initializer_range)
            if getattr(module, "writes_to_residual_stream", False):
                # 2 n_layer outputs add up, and N independent terms deviate sqrt(N) times as much as one.
                std = std / math.sqrt(2 * self.config.n_layer)
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
        if getattr(module, "bias", None) is not None:
            init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """Load weights as `PreTrainedModel.from_pretrained` does, but raise ValueError if `ignore_mismatched_sizes`
        would skip a matrix of stock GPT-2, whose square ones would load transposed."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        transposed = sorted(str(key) for key, *_ in info["mismatched_keys"] if str(key).endswith(TRANSPOSED_IN_STOCK))
        if transposed:
            raise ValueError(f"{', '.join(transposed)}: of another shape than this model's; {CONVERT}")
        return (model, info) if output_loading_info else model


class GPT2ReproModel(GPT2ReproPreTrainedModel):
    """The network without a head: token ids in, final hidden states out."""

    _auto_class = "AutoModel"

    def __init__(self, config: GPT2ReproConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)  # learned: attention itself ignores the order
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
        """Return `last_hidden_state` (B, T, C), after the final norm, and `past_key_values` if `use_cache`.

        Args:
            input_ids: (B, T), or else `inputs_embeds`: (B, T, C).
            attention_mask: (B, S), 1 for tokens, 0 for padding on either side; None without padding.
            position_ids: (B, T). By default counted along the mask, so padding changes no result. If they restart
                within a sequence and neither mask nor cache is given, its parts do not attend to each other.

        Raises:
            ValueError: If neither or both inputs are given, an id is outside the vocabulary (detected on CPU only), the
                context is longer than `n_positions`, or an input is one that only stock GPT-2 has.
        """
        inputs_embeds = embed_inputs(self.wte, input_ids, inputs_embeds, kwargs)  # (B, T, C)
        context = {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values}
        positions = token_positions(self.config, inputs_embeds, **context)  # (B, T), or (1, T) if all rows agree
        kwargs |= attention_masking(self.config, inputs_embeds, positions, kwargs, **context)  # mask: (B, 1, T, S)
        if use_cache and past_key_values is None:  # after the mask: only without a cache are packed sequences separated
            past_key_values = DynamicCache(config=self.config)
        hidden_states = inputs_embeds + embed(self.wpe, positions, TOO_LONG)  # (B, T, C)
        for block in self.h:
            hidden_states = block(hidden_states, past_key_values=past_key_values, use_cache=use_cache, **kwargs)
        hidden_states = self.ln_f(hidden_states)
        return BaseModelOutputWithPast(hidden_states, past_key_values if use_cache else None)


class GPT2ReproForCausalLM(GPT2ReproPreTrainedModel, GenerationMixin):
    """GPT-2 with its language-modeling head."""

    _auto_class = "AutoModelForCausalLM"
    # Similar tokens should have similar rows in both (Press and Wolf 2017). It also saves 38.6M of 163M parameters.
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Return `logits` (B, T, V) for the next token, and `loss` in nats per token (a scalar) if labels were given.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds: See `GPT2ReproModel.forward`.
            labels: (B, T), the input ids themselves, shifted here. The last position and padding predict nothing.
            logits_to_keep: Compute logits for the last N positions only (0: all), or for those in a tensor: (N,) for
                every sequence, (B, N) for each one, or a boolean mask (B, T), which gives logits (N, V).
            kwargs: `shift_labels` (B, T), already shifted: the token after each position, all T of which are trained.
                `num_items_in_batch`, what the summed loss is divided by. `output_hidden_states`, `output_attentions`.
        """
        # Not a parameter: Trainer expects a column in each batch for every parameter with "label" in its name.
        shift_labels = kwargs.pop("shift_labels", None)
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "use_cache": use_cache}
        context = {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values}
        outputs = self.transformer(**inputs, **context, **kwargs)
        logits = self.lm_head(select_positions(outputs.last_hidden_state, logits_to_keep))  # (B, T, V)
        loss = None
        if shift_labels is None and labels is not None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]  # (B, T)
        if shift_labels is not None:
            shift_labels = ignore_padding(shift_labels, attention_mask, outputs.last_hidden_state, logits_to_keep)
            # loss = -1/N sum_bt log softmax(logits[b, t])[shift_labels[b, t]] in fp32, over the N labels that are not
            # -100. For gradient accumulation, `num_items_in_batch` replaces N. Expect ln V = 10.8 before training.
            loss = self.loss_function(
                logits=logits, labels=labels, shift_labels=shift_labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(loss, logits, outputs.past_key_values, outputs.hidden_states, outputs.attentions)


# --- Inputs, positions, masks -----------------------------------------------------------------------------------------
UNKNOWN_IDS = "input_ids range from {low} to {high}, outside a vocabulary of {limit}: was another tokenizer used?"
TOO_LONG = "the context of {length} tokens exceeds n_positions ({limit}): shorten the prompt or generate fewer tokens."


def embed_inputs(wte: nn.Embedding, input_ids: Tensor | None, inputs_embeds: Tensor | None, kwargs: dict) -> Tensor:
    unsupported = [name for name in ("token_type_ids", "encoder_hidden_states") if kwargs.get(name) is not None]
    if unsupported:
        raise ValueError(f"{', '.join(unsupported)}: this model has no such input; leave it out.")
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds.")
    return embed(wte, input_ids, UNKNOWN_IDS) if inputs_embeds is None else inputs_embeds


def embed(embedding: nn.Embedding, ids: Tensor, message: str) -> Tensor:
    try:
        return embedding(ids)  # (B, T, C)
    except IndexError as error:  # on CPU; a GPU stops with an assertion instead
        limit = embedding.weight.shape[0]
        raise ValueError(message.format(low=ids.min(), high=ids.max(), length=ids.max() + 1, limit=limit)) from error


def token_positions(config, inputs_embeds, attention_mask, position_ids, past_key_values) -> Tensor:
    """The given ids, or counted along the mask or after the cache: a mask [0, 0, 1, 1, 1] gives [0, 0, 0, 1, 2]."""
    T = inputs_embeds.shape[1]
    past = past_key_values.get_seq_length() if past_key_values is not None else 0
    length = past + T if isinstance(past, int) else 0  # a static cache counts on the GPU, which is not waited for
    is_counted = attention_mask is None and position_ids is None
    if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]  # (B, T)
    elif position_ids is None:
        position_ids = (torch.arange(T, device=inputs_embeds.device) + past).unsqueeze(0)  # (1, T)
    # A padded or packed sequence may exceed n_positions as long as its positions do not. Only then are they read, since
    # the CPU has to wait for the GPU, and never while compiling, since that would break the graph.
    if length > config.n_positions and not is_counted:
        length = 0 if torch.compiler.is_compiling() else int(position_ids.max()) + 1
    if length > config.n_positions:
        raise ValueError(TOO_LONG.format(length=length, limit=config.n_positions))
    return position_ids


def attention_masking(config, inputs_embeds, positions, kwargs, **context) -> dict[str, Tensor | int | None]:
    """Hide the future, padding and other packed sequences, in the form that the attention implementation reads."""
    given = [name for name, value in context.items() if value is not None]
    masking = {"attention_mask": None, "position_ids": positions}
    # For plain causal attention sdpa needs no mask, which costs up to 1.4 times the time. Decided here, because many
    # versions of transformers build one under torch.compile.
    if given or config._attn_implementation != "sdpa":
        masking["attention_mask"] = create_causal_mask(config=config, inputs_embeds=inputs_embeds, **context)
    if is_flash_attention_requested(config):  # reads where packed sequences begin in place of a mask
        masking["position_ids"] = None  # or every layer would search them for that, and wait for the GPU
        if given == ["position_ids"] and kwargs.get("cu_seq_lens_q") is None:  # unless a data collator found them
            masking |= packed_sequence_lengths(context["position_ids"], B=inputs_embeds.shape[0])
    return masking


def packed_sequence_lengths(position_ids: Tensor, B: int) -> dict[str, Tensor | int]:
    """Find packed sequences in B rows, laid end to end: [[0, 1, 0], [4, 5, 6]] -> bounds [0, 2, 3, 6], longest 3."""
    # transformers itself finds them in a batch of one row only, and none before the first position 0.
    starts = position_ids.diff(prepend=position_ids[:, :1]).expand(B, -1) != 1  # (B, T)
    bounds = nn.functional.pad(starts.flatten().nonzero().flatten(), (0, 1), value=starts.numel()).int()
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def select_positions(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """(B, T, C) -> (B, N, C), or (N, C) for a mask: `slice_logits_to_keep` of transformers, which is new in 5.23."""
    keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    if isinstance(keep, slice) or keep.ndim == 1:
        return hidden_states[:, keep]
    return hidden_states[keep] if keep.dtype == torch.bool else torch.take_along_dim(hidden_states, keep[..., None], 1)


def ignore_padding(labels: Tensor, attention_mask: Tensor | None, hidden_states: Tensor, logits_to_keep) -> Tensor:
    """Set the labels of padding to -100, which no loss counts: on the left, it would have to guess the first token."""
    if attention_mask is None or attention_mask.ndim != 2:
        return labels.contiguous()  # the loss calls view, which fails on a slice of longer sequences
    mask = attention_mask[:, -hidden_states.shape[1] :, None]  # (B, S) -> (B, T, 1), without the tokens in the cache
    mask = select_positions(mask, logits_to_keep).squeeze(-1)  # (B, T), or as the logits
    return labels.to(mask.device).masked_fill(mask == 0, -100).contiguous()


# --- What the ecosystem needs -----------------------------------------------------------------------------------------
TRANSPOSED_IN_STOCK = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # (inputs, outputs) there, in `nn.Linear` not
CONVERT = "convert a stock GPT-2 with python -m modeling_gpt2repro.hub.conversion --from NAME --to DIR."
# With label smoothing, Trainer shifts the labels of these classes only; any other would learn to copy its input.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(GPT2ReproConfig.model_type, "GPT2ReproForCausalLM")


class GPT2ReproForSequenceClassification(layers.GenericForSequenceClassification, GPT2ReproPreTrainedModel):
    """A class per sequence: labels (B,) -> logits (B, num_labels), at the last token that is not `pad_token_id`."""

    _auto_class = "AutoModelForSequenceClassification"
    base_model_prefix = "transformer"


class GPT2ReproForTokenClassification(layers.GenericForTokenClassification, GPT2ReproPreTrainedModel):
    """A class per token: labels (B, T) -> logits (B, T, num_labels)."""

    _auto_class = "AutoModelForTokenClassification"
    base_model_prefix = "transformer"


class GPT2ReproForQuestionAnswering(layers.GenericForQuestionAnswering, GPT2ReproPreTrainedModel):
    """Where an answer starts and ends: start_positions, end_positions (B,) -> start_logits, end_logits (B, T)."""

    _auto_class = "AutoModelForQuestionAnswering"
    base_model_prefix = "transformer"
    get_input_embeddings = GPT2ReproPreTrainedModel.get_input_embeddings  # the mixin looks for it under Llama's name
    set_input_embeddings = GPT2ReproPreTrainedModel.set_input_embeddings
