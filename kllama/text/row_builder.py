"""Samples to rows of ids: start and end tokens around them, and what the loss counts in them.

It neither cuts nor pads. The preprocessor calls it, eagerly and from a TensorFlow graph.
"""

import dataclasses

import keras_hub
import numpy as np

from kllama.text.rows import Row
from kllama.text.samples import Samples
from kllama.text.tokenizer import LlamaTokenizer


@dataclasses.dataclass(frozen=True)
class RowBuilder:
    """Make rows of samples.

    Attributes:
        tokenizer: a `LlamaTokenizer`, or, for all but conversations, any of KerasHub's.
        add_start_token: whether a start token is put before texts and prompts.
        add_end_token: whether an end token is put after texts and responses.
        loss_on: which tokens count: `"all"`, `"replies"`, or `"auto"` for replies where there are any.
    """

    tokenizer: keras_hub.tokenizers.Tokenizer
    add_start_token: bool
    add_end_token: bool
    loss_on: str

    def training_rows(self, samples: Samples) -> list[Row]:
        """Give the rows to train on."""
        if samples.kind == "messages":
            return self._chat_rows(samples)
        if samples.kind == "prompts":
            return self._reply_rows(samples)
        if self.loss_on == "replies":
            raise ValueError(
                "loss_on = 'replies' with plain texts, which have none; expected prompts with responses, or messages. "
                "Pass loss_on='auto' to count all tokens of a text."
            )
        return [self._row([], ids, counts_all=True) for ids in self._tokenize(samples.columns["texts"])]

    def prompt_rows(self, samples: Samples) -> list[list[int]]:
        """Give the ids to continue."""
        if samples.kind == "messages":
            return [ids for ids, _ in self._render(samples, add_generation_prompt=True)]
        if samples.kind == "texts":
            start = self._start_ids()
            return [[*start, *ids] for ids in self._tokenize(samples.columns["texts"])]
        raise TypeError("x has prompts and responses; expected prompts alone, as a str or a list of str, or messages.")

    def _reply_rows(self, samples):
        prompts, responses = (self._tokenize(samples.columns[name]) for name in ("prompts", "responses"))
        counts_all = self.loss_on == "all"
        return [self._row(prompt, reply, counts_all) for prompt, reply in zip(prompts, responses, strict=True)]

    def _row(self, prompt, reply, counts_all):
        start, end = self._start_ids(), self._end_ids()
        before, after = [*start, *prompt], [*reply, *end]
        return Row(before + after, [counts_all] * len(before) + [True] * len(after), len(start), len(end))

    def _chat_rows(self, samples):
        rows = self._render(samples, return_assistant_mask=self.loss_on != "all")
        return [
            Row(ids, [True] * len(ids) if mask is None else mask, num_start=self.num_start_tokens(ids))
            for ids, mask in rows
        ]

    def num_start_tokens(self, ids: list[int]) -> int:
        """Give 1 if a row begins with the start token, whoever wrote it, else 0."""
        return int(len(ids) > 0 and ids[0] == self.tokenizer.start_token_id)

    def _render(self, samples, return_assistant_mask=False, **options) -> list[tuple]:
        """Let the chat template write each conversation; give its ids, and its mask or None."""
        if not isinstance(self.tokenizer, LlamaTokenizer):
            raise TypeError(f"tokenizer = {self.tokenizer!r}; messages need a LlamaTokenizer.")
        options["return_assistant_mask"] = return_assistant_mask
        rows = []
        for index, (messages, tools) in enumerate(
            zip(samples.columns["messages"], samples.columns["tools"], strict=True)
        ):
            try:
                outputs = self.tokenizer.apply_chat_template(messages, tools=tools, **options)
            except (TypeError, ValueError) as error:
                error.add_note(f"It is conversation {index} of the batch.")
                raise
            ids, mask = outputs if return_assistant_mask else (outputs, None)
            rows.append((np.asarray(ids).tolist(), mask if mask is None else np.asarray(mask).tolist()))
        return rows

    def _tokenize(self, texts):
        return [list(ids) for ids in self.tokenizer.tokenize(texts)] if texts else []

    def _start_ids(self):
        return self._boundary("start_token", self.tokenizer.start_token_id) if self.add_start_token else []

    def _end_ids(self):
        return self._boundary("end_token", self.tokenizer.end_token_id) if self.add_end_token else []

    def _boundary(self, name, token_id):
        if token_id is None:
            raise ValueError(
                f"add_{name} = True, but {name} of the tokenizer = None; expected a token. Pass {name}= to the "
                f"tokenizer, or add_{name}=False to the preprocessor."
            )
        return [token_id]
