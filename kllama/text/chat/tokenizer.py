"""Conversations of a tokenizer: messages to text or ids, by its chat template.

The templates are rendered by `template.py`, and what they write is encoded by `encoder.py`. `LlamaTokenizer` derives
from it.
"""

import reprlib
from collections.abc import Mapping, Sequence

import numpy as np

from kllama.arguments import check_flag
from kllama.errors import CheckpointError
from kllama.text.chat.template import BUILT_IN, ChatTemplate, open_template, suggest_template
from kllama.text.vocabulary_tokenizer import VocabularyTokenizer


class ChatTokenizer(VocabularyTokenizer):
    """The part of a tokenizer that writes conversations.

    Args:
        chat_template: Jinja text, the name of a built-in template, a dict of several by name, or None.
        **kwargs: arguments of `VocabularyTokenizer`.
    """

    def __init__(self, chat_template: str | Mapping[str, str] | None, **kwargs):
        super().__init__(**kwargs)
        self.chat_template = _checked_template(chat_template)

    def apply_chat_template(
        self,
        messages: Sequence,
        *,
        tools: Sequence[Mapping] | None = None,
        documents: Sequence[Mapping] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        return_assistant_mask: bool = False,
        variables: Mapping | None = None,
    ):
        """Write conversations as the model was trained to see them, by `chat_template`.

        A special token that is spelt in a message is text, whatever `parse_special` says; only the template writes
        special tokens. No start token is added to what the template writes.

        Args:
            messages: one conversation, a list of `{"role", "content"}`, with `"tool_calls"` where the assistant calls
                functions; or a list of conversations.
            tools: JSON schemas of the functions that the model may call.
            documents: what the model is to answer from, for templates that know them.
            add_generation_prompt: bool. End with what opens an answer of the assistant.
            continue_final_message: bool. End with the content of the last message, for the model to go on with it.
            tokenize: bool. Return ids; `False` returns the text.
            return_assistant_mask: bool. Return also which tokens the assistant wrote, the token that ends its turn
                included: what to train on. Only with `tokenize`.
            variables: further variables of the template, such as `{"date_string": "26 Jul 2024"}`.

        Returns:
            For one conversation an array of ids `(T,)`, or a str; a list of lists of ids, or of str, for several. With
            `return_assistant_mask` a pair of the ids and bools of the same form.

        Raises:
            TypeError: an argument is of the wrong type.
            ValueError: there is no template, the messages have the wrong form, or the template refuses them.
            CheckpointError: the template is damaged, fails, or is too expensive.

        Example:
        ```python
        ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
        ```
        """
        check_flag("tokenize", tokenize)
        check_flag("return_assistant_mask", return_assistant_mask)
        if return_assistant_mask and not tokenize:
            raise ValueError("return_assistant_mask = True with tokenize = False; expected ids to mask.")
        batched = isinstance(messages, list | tuple) and bool(messages) and isinstance(messages[0], list | tuple)
        template = self._compiled_chat_template(has_tools=bool(tools))
        chats = [
            template.render(
                conversation,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                bos_token=self.start_token or "",
                eos_token=self.end_token or "",
                variables=variables,
                special_tokens=self.special_tokens,
                find_assistant=return_assistant_mask,
            )
            for conversation in (messages if batched else [messages])
        ]
        if not tokenize:
            texts = [chat.text for chat in chats]
            return texts if batched else texts[0]
        ids, masks = zip(*map(self._loaded().chat_encoder.encode, chats), strict=True)
        if not batched:
            ids, masks = np.array(ids[0], self.compute_dtype), masks[0] and np.array(masks[0])
        else:
            ids, masks = list(ids), list(masks)
        return (ids, masks) if return_assistant_mask else ids

    def _compiled_chat_template(self, has_tools: bool) -> ChatTemplate:
        source = self.chat_template
        if isinstance(source, Mapping):
            source = source.get("tool_use" if has_tools and "tool_use" in source else "default")
        if source is None:
            fits = suggest_template(self.special_tokens)
            hint = f" The special tokens here are those of {fits!r}." if fits else ""
            names = ", ".join(BUILT_IN)
            raise ValueError(f"chat_template = None; expected Jinja text, or a built-in template: {names}.{hint}")
        return open_template(source)

    @property
    def turn_end_token_id(self) -> int | None:
        """The id of the special token with which `chat_template` ends what the assistant says.

        `None` where it ends it with none, or does not show what the assistant says.
        """
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            ids, mask = self.apply_chat_template(turns, return_assistant_mask=True)
        except CheckpointError:
            raise
        except ValueError:  # the template refuses these turns, or has no place for a mask
            return None
        last = int(ids[mask][-1]) if mask.any() else None
        return last if last in self.special_token_ids else None


def _checked_template(template):
    sources = template.values() if isinstance(template, Mapping) else [template]
    if not all(isinstance(source, str) for source in sources if template is not None):
        raise TypeError(f"chat_template = {reprlib.repr(template)}; expected a str, a dict of str by name, or None.")
    return dict(template) if isinstance(template, Mapping) else template
