"""Chat templates: messages to the text of a conversation, with what in it is special and what the assistant wrote.

`ChatTemplate` checks the messages, marks special tokens that users have spelt (`marks`), and has the template
rendered in the sandbox (`sandbox`). It makes no ids: `ChatEncoder` does. `LlamaTokenizer.apply_chat_template`
calls both. Nothing here adds a start token; templates write their own.
"""

import datetime
import functools
import json
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from kllama.errors import CheckpointError
from kllama.text.chat.marks import CUT, Unmarked, clean_text, marker_of, split_marks, strip_marks
from kllama.text.chat.messages import copy_dicts, copy_json, copy_messages
from kllama.text.chat.sandbox import CompiledTemplate

BUILT_IN = ("llama2", "llama3", "llama3.1", "chatml", "vicuna", "mistral")
FOLDER = Path(__file__).with_name("templates")
# The arguments of `render`, which `variables` may not replace.
ARGUMENTS = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token")
# For finding what the assistant wrote by rendering the beginnings of a conversation, all of them together.
MAX_SECONDS = 5

Spans = list[tuple[int, int]]


class RenderedChat(NamedTuple):
    """A conversation as text, and what stands where in it: character ranges, ascending, without overlap."""

    text: str
    special_spans: Spans  # special tokens that the template wrote; all other spellings of one are text
    assistant_spans: Spans | None  # what the assistant wrote; None where it was not asked for


class ChatTemplate:
    r"""Render conversations by a Jinja template.

    The environment is that of Hugging Face: `trim_blocks`, `lstrip_blocks`, `break` and `continue`, `generation`
    blocks, a `tojson` that escapes nothing for HTML, `raise_exception` and `strftime_now`. The template is a file's
    content and not trusted: it has a closed list of operations, and its cost is bounded.

    Args:
        source: Jinja text, or the name of a built-in template: `"llama2"`, `"llama3"`, `"llama3.1"`, `"chatml"`,
            `"vicuna"` (1.1 and 1.5) or `"mistral"` (Instruct v0.3).

    Raises:
        ValueError: `source` is neither.
        CheckpointError: the template is not valid, too large, or uses what templates do not have here.

    Example:
    ```python
    template = ChatTemplate("chatml")
    template.render([{"role": "user", "content": "Hi"}], add_generation_prompt=True).text
    # "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ```
    """

    def __init__(self, source: str):
        if not isinstance(source, str):
            raise TypeError(f"chat_template = {source!r}; expected a str.")
        if source in BUILT_IN:
            source = (FOLDER / f"{source}.jinja").read_text(encoding="utf-8")
        elif "{" not in source:
            raise ValueError(f"chat_template = {source[:80]!r}; expected Jinja text, or one of {', '.join(BUILT_IN)}.")
        self.source = clean_text(source)
        self._compiled = CompiledTemplate(self.source)

    def render(
        self,
        messages: Sequence[Mapping],
        *,
        tools: Sequence[Mapping] | None = None,
        documents: Sequence[Mapping] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        bos_token: str = "",
        eos_token: str = "",
        variables: Mapping | None = None,
        special_tokens: Collection[str] = (),
        find_assistant: bool = False,
    ) -> RenderedChat:
        """Return a conversation as text.

        Args:
            messages: one conversation, `{"role", "content", ...}` each. Nothing of the caller's is changed. A content
                that is a list of text parts is joined, whatever the template expects.
            tools: JSON schemas of the functions that the model may call.
            documents: what the model is to answer from.
            add_generation_prompt: bool. End with what opens an answer of the assistant.
            continue_final_message: bool. End with the content of the last message, its turn left open.
            bos_token: str. What the template writes as its start token.
            eos_token: str. What the template writes as its end token.
            variables: further variables of the template, JSON values.
            special_tokens: the spellings that are special. In the strings of the caller they are text, in those that
                the template writes they are not. Only a template that puts one together around a whole string of the
                caller's, or out of pieces of one, could still make a token of it.
            find_assistant: bool. Find what the assistant wrote.

        Returns:
            The text, where the template wrote special tokens, and where the assistant wrote. What the assistant wrote
            is what `generation` blocks enclose. Without them it is what an answer adds to the text of the messages
            before it with their generation prompt, up to the special token that ends its turn.

        Raises:
            TypeError: an argument is of the wrong type.
            ValueError: the messages have the wrong form, the template refuses them, or never mentions the tools, tool
                calls or documents that they come with; a key spells a special token; or the template does not show
                where the assistant wrote.
            CheckpointError: the template fails, or is too expensive; or the special tokens are too long, or have
                white space at an end.
        """
        if add_generation_prompt and continue_final_message:
            raise ValueError("add_generation_prompt = continue_final_message = True; expected one of them at most.")
        for name, token in (("bos_token", bos_token), ("eos_token", eos_token)):
            if not isinstance(token, str):
                raise TypeError(f"{name} = {token!r}; expected a str.")
        marker = marker_of(tuple(special_tokens))

        def mark(text, is_name):
            marked = marker.mark(clean_text(text), edges=not is_name)
            if is_name and marked != text:
                raise ValueError(
                    f"key {text!r}: it spells a special token of the tokenizer, so the chat template could not look it "
                    "up; expected another key."
                )
            return marked

        conversation = _Conversation(
            self._compiled,
            marker,
            copy_messages(messages, mark),
            {
                "tools": copy_dicts(tools, "tools", mark),
                "documents": copy_dicts(documents, "documents", mark),
                "bos_token": bos_token,
                "eos_token": eos_token,
                **_copy_variables(variables, mark),
            },
            datetime.datetime.now(),  # one time for all renderings of this call
        )
        self._refuse_what_it_drops(conversation.messages, conversation.variables)
        whole = conversation.render(add_generation_prompt, continue_final_message)
        spans = None
        if find_assistant and self._compiled.uses_generation:
            spans = whole.spans
        elif find_assistant:
            spans = conversation.find_assistant(whole, ends_with_message=not add_generation_prompt)
        return RenderedChat(whole.text, whole.tokens, spans)

    def _refuse_what_it_drops(self, messages: list[dict], variables: dict) -> None:
        """Raise a ValueError for what the template never mentions, and so would leave out without a word."""
        for name in ("tools", "documents"):
            if variables[name] and name not in self.source:
                raise ValueError(f"{name}: the chat template knows none; expected None, or another template.")
        calls = [index for index, message in enumerate(messages) if message.get("tool_calls")]
        if calls and "tool_calls" not in self.source:
            raise ValueError(
                f"messages[{calls[0]}]['tool_calls']: the chat template knows no tool calls; expected a content alone, "
                "or another template."
            )


@functools.lru_cache(maxsize=16)
def open_template(source: str) -> ChatTemplate:
    """Return the `ChatTemplate` of a source; the same one for the same source, as compiling takes some milliseconds."""
    return ChatTemplate(source)


class _Conversation:
    """One checked conversation with its template, of which beginnings can be rendered."""

    def __init__(self, compiled, marker, messages, variables, now):
        self.compiled = compiled
        self.marker = marker
        self.messages = messages
        self.variables = variables
        self.now = now

    def render(self, add_generation_prompt=False, continue_final_message=False) -> Unmarked:
        """Return the text of all messages without its marks, and what the marks showed."""
        if continue_final_message:
            text = self._run_left_open()
        else:
            text = self._run(self.messages, add_generation_prompt)
        return split_marks(text, self.marker)

    def _run_left_open(self):
        last = self.messages[-1]
        content = last.get("content")
        if not isinstance(content, str):
            raise ValueError(
                f"messages[{len(self.messages) - 1}]['content'] = {content!r}; expected a str, as "
                "continue_final_message = True continues it."
            )
        # The space behind the mark shows whether the template strips what it is given.
        text = self._run([*self.messages[:-1], {**last, "content": f"{content}{CUT} "}])
        if (place := text.rfind(CUT)) < 0:
            raise ValueError(
                "continue_final_message = True, but the chat template does not write the end of the last message; "
                "expected one that does."
            )
        is_stripped = text[place + 1 : place + 2] != " "
        stripped = content.rstrip()
        return text[:place].removesuffix(content[len(stripped) :] if is_stripped and stripped else "")

    def _run(self, messages, add_generation_prompt=False):
        variables = {**self.variables, "messages": messages, "add_generation_prompt": add_generation_prompt}
        return self.compiled.run(
            variables, len(json.dumps(variables, ensure_ascii=False)), self.now, self.marker.restore
        )

    def find_assistant(self, whole: Unmarked, ends_with_message: bool) -> Spans:
        """Return where the assistant wrote, from what each of its messages adds to the text.

        ```
        messages[:2] and generation prompt   <user>Hello<eot><assistant>
        messages[:3]                         <user>Hello<eot><assistant>Hi there<eot>
        the assistant wrote                                             Hi there<eot>
        ```
        """
        spans = []
        deadline = time.thread_time() + MAX_SECONDS
        for index, message in enumerate(self.messages):
            if message["role"] == "assistant":
                if time.thread_time() > deadline:
                    raise _no_spans(index, f"took more than {MAX_SECONDS} s up to there")
                is_whole = ends_with_message and index == len(self.messages) - 1
                try:
                    before = strip_marks(self._run(self.messages[:index], add_generation_prompt=True))
                    after = whole.text if is_whole else strip_marks(self._run(self.messages[: index + 1]))
                except CheckpointError:
                    raise
                except ValueError as error:
                    raise _no_spans(index, f"refuses the messages up to there: {error}") from error
                if not (after.startswith(before) and whole.text.startswith(after)):
                    raise _no_spans(index, "writes the messages up to there otherwise than in the whole conversation")
                spans.append((len(before), _end_of_turn(whole, len(before), len(after))))
        return spans


def _end_of_turn(whole, start, end):
    """Leave out white space behind the special token that ends the turn: the model does not write it."""
    closing = [stop for _, stop in whole.tokens if start < stop <= end]
    return closing[-1] if closing and not whole.text[closing[-1] : end].strip() else end


def _no_spans(index, reason):
    return ValueError(
        f"messages[{index}]: what the assistant wrote cannot be found: the chat template {reason}. Enclose it in the "
        "template in {% generation %} and {% endgeneration %}."
    )


def _copy_variables(variables, mark):
    if not isinstance(variables, Mapping | None):
        raise TypeError(f"variables = {variables!r}; expected a dict.")
    copied = copy_json(variables or {}, "variables", mark)
    if taken := sorted(copied.keys() & set(ARGUMENTS)):
        raise ValueError(f"variables[{taken[0]!r}]: an argument of its own; expected other names.")
    return copied


def suggest_template(special_tokens: Collection[str]) -> str | None:
    """Return the built-in template whose special tokens a vocabulary has, for the message of an error.

    The answer is a guess: several families share their tokens.
    """
    families = (
        ("llama3.1", {"<|start_header_id|>", "<|eot_id|>", "<|python_tag|>"}),
        ("llama3", {"<|start_header_id|>", "<|eot_id|>"}),
        ("chatml", {"<|im_start|>", "<|im_end|>"}),
        ("mistral", {"[INST]", "[/INST]"}),
        ("llama2", {"<s>", "</s>", "<unk>"}),
    )
    return next((name for name, tokens in families if tokens <= set(special_tokens)), None)
