"""Texts and conversations to token ids and back, beside the event loop."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from porter.serve.errors import ApiError
from porter.serve.protocol import ChatFields, Message

T = TypeVar("T")


class Tokenizing:
    """The model's tokenizer, used by one thread: it need not be safe for more, and a long text holds up nobody else.

    `chat_template` takes the place of the tokenizer's own.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template or getattr(tokenizer, "chat_template", None)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text."""
        return await self._run(self._encode, text, add_special_tokens)

    async def encode_chat(self, chat: ChatFields) -> list[int]:
        """The token ids of a conversation, written out with the chat template."""
        if self._chat_template is None:
            raise ApiError(400, "this model has no chat template; use /v1/completions", param="messages")
        return await self._run(self._encode_chat, chat)

    async def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        return await self._run(self._decode, list(token_ids), skip_special_tokens)

    def token_strings(self, token_ids: list[int]) -> list[str]:
        """How the vocabulary spells each token."""
        strings: list[str] = self._tokenizer.convert_ids_to_tokens(token_ids)
        return strings

    async def _run(self, call: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            token_ids: list[int] = self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        except (TypeError, UnicodeError):
            raise ApiError(400, "the text holds half a surrogate pair, which is no character") from None
        return token_ids

    def _encode_chat(self, chat: ChatFields) -> list[int]:
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                [_plain(message) for message in chat.messages],
                chat_template=self._chat_template,
                tokenize=False,
                add_generation_prompt=chat.add_generation_prompt,
                continue_final_message=chat.continue_final_message,
                **(chat.chat_template_kwargs or {}),
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise ApiError(400, f"the chat template refuses the messages: {error}", param="messages") from None
        return self._encode(text, add_special_tokens=False)

    def _decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))


def _plain(message: Message) -> dict[str, str]:
    content = message.content
    if isinstance(content, list):
        content = "\n".join(part.text for part in content)
    named = {} if message.name is None else {"name": message.name}
    return {"role": message.role, "content": content or "", **named}
