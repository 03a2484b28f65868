"""A conversation in turns, as the chat template of a tokenizer writes it, within the context of a model."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_gpt2repro.storage.retry import describe_error

from .load_model import max_context

REPLY_SHARE = 16  # a reply begins only where 1/16 of the context is left for it: 64 of GPT-2's 1,024 tokens


class Conversation:
    """The user's messages and the model's replies; the oldest turns are left out once they do not fit any more."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        """Raises ValueError if the tokenizer has no chat template."""
        if not tokenizer.chat_template:
            raise ValueError(
                f"--chat {model.name_or_path}: its tokenizer has no chat template, so it has not learned to answer; "
                "fine-tune it on conversations (examples/chat.py), or leave out --chat."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.messages: list[dict[str, str]] = []
        self.turns_left_out = 0

    def ask(self, text: str) -> list[int]:
        """Ids of the conversation with this message, up to where the model replies.

        Raises:
            ValueError: If the message alone is too long, or the chat template fails. It is then not part of the
                conversation.
        """
        context = max_context(self.model)
        most = context - context // REPLY_SHARE if context else None
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self.render(messages)
        left_out = 0
        while most and len(ids) > most and len(messages) > 1:
            messages = messages[2:]  # a message and its reply
            left_out += 1
            ids = self.render(messages)
        if most and len(ids) > most:
            raise ValueError(
                f"the message has {len(ids):,} tokens, and of the context of {context:,} it may take {most:,}: "
                "shorten it."
            )
        self.messages = messages
        self.turns_left_out += left_out
        return ids

    def reply(self, ids: list[int]):
        """Add what the model has written."""
        content = self.tokenizer.decode(ids, skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": content})

    def render(self, messages: list[dict[str, str]]) -> list[int]:
        try:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
        except Exception as error:  # a template is a program that came with the model, and may raise anything
            raise ValueError(
                f"--chat {self.model.name_or_path}: its chat template cannot write the conversation "
                f"({describe_error(error)}): correct it, or leave out --chat."
            ) from error
