"""The half of the language model that writes: `generate`, `stream`, `chat`, and KerasHub's protocol beneath them.

The methods are thin: `generating.py` and `streaming.py` do the work. Nothing here trains, loads or saves. The base
class of `LlamaCausalLM`.
"""

import threading
from collections.abc import Callable, Iterator, Sequence

import keras_hub

from kllama.arguments import check_integer
from kllama.generation.programs import Programs
from kllama.models.continuation import run_sampler
from kllama.models.generate_arguments import is_auto, resolve_sampler
from kllama.models.generate_options import GenerateOptions
from kllama.models.generating import generate
from kllama.models.streaming import chat, stream

_MAKING = threading.Lock()  # threads that generate with one model share its programs


class GeneratingModel(keras_hub.models.CausalLM):
    """A causal language model that continues prompts.

    A subclass makes `backbone`, `preprocessor`, `generation_config` and `_prefix_caches` (a `PrefixCaches`), and sets
    `sampler`.
    """

    @property
    def sampler(self) -> keras_hub.samplers.Sampler:
        """The `keras_hub.samplers` object that `generate` draws with, for a choice of `"auto"` KerasHub's default.

        May be set to what `compile` takes.
        """
        return self._sampler

    @sampler.setter
    def sampler(self, choice):
        self._sampler = resolve_sampler("top_k" if is_auto(choice) else choice)
        self._sampler_choice = choice if isinstance(choice, str | dict) else self._sampler
        self.generate_function = None

    @property
    def _chosen_sampler(self) -> keras_hub.samplers.Sampler | None:
        """The sampler, or None where the choice was left to the checkpoint."""
        return None if is_auto(self._sampler_choice) else self.sampler

    def generate(
        self,
        inputs,
        max_length: int | None = None,
        stop_token_ids="auto",
        strip_prompt: bool | None = None,
        *,
        max_new_tokens: int | None = None,
        min_new_tokens: int = 0,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        sampler=None,
        stop_strings: str | Sequence[str] | None = None,
        logits_processors: Sequence[Callable] | None = None,
        seed: int | None = None,
        num_return_sequences: int = 1,
        prompt_lookup_num_tokens: int | None = None,
        return_dict: bool = False,
    ):
        """Continue prompts.

        A call's own `temperature`, `top_k`, `top_p`, `min_p` and `repetition_penalty` beat what its `sampler` says,
        which beats what `compile` chose, which beats the checkpoint's `generation_config`, which beats KerasHub's
        default (top-k with k = 5). All arguments are checked before anything runs.

        Args:
            inputs: a string or a list of strings; or `{"messages": ...}`, a conversation or a list of them (also
                without the key), which the chat template renders and the assistant answers; or
                `{"token_ids": (B, T), "padding_mask": (B, T)}`, whole numbers in lists or in arrays of any framework,
                padded on the left or on the right; or a `tf.data.Dataset` that gives batches of one of these, whose
                results are joined. The preprocessor's `truncate` says what becomes of text that is too long.
            max_length: the length, prompt included, at which a row ends. Defaults to the smaller of the preprocessor's
                `sequence_length` and the backbone's `max_sequence_length`; for token ids to their width T.
            stop_token_ids: ids that end a row. `"auto"` means the tokenizer's end token, the stop ids of
                `generation_config` and, in a conversation, the special token that ends the assistant's turn; None or
                an empty list means none.
            strip_prompt: whether to leave the prompt out of the result. None leaves a conversation out, and no other
                prompt.
            max_new_tokens: how many tokens to add to each row at most, instead of `max_length`.
            min_new_tokens: how many tokens to add before a stop token may come. A stop string ends a row all the same.
            temperature: at least 0; what logits are divided by. 0 takes the most likely token each time.
            top_k: sample among the k most likely tokens.
            top_p: sample among the fewest tokens whose probabilities sum to at least p, in (0, 1].
            min_p: sample among the tokens at least p times as probable as the most probable one, in [0, 1].
            repetition_penalty: greater than 0; what the positive logits of all tokens in prompt and answer so far are
                divided by, and the negative ones multiplied by. 1 changes nothing.
            sampler: a `keras_hub.samplers` object or its name, for this call instead of the one of `compile`. One with
                a loop of its own (beam search, say) belongs there.
            stop_strings: a string, or a list of up to 256, that ends a row as soon as its new text has it. The text is
                cut before it; the ids keep the tokens that it was found in. Needs a preprocessor.
            logits_processors: functions (token ids int32 (B, S), lengths int32 (B,), logits float32 (B, V)) -> logits,
                one after another, between the repetition penalty and the settings of sampling. What lies behind a
                row's length in its token ids means nothing.
            seed: non-negative integer below 2 ** 63. The same seed gives the same text on the same backend.
            num_return_sequences: how many texts to write for each prompt; more than one take sampling.
            prompt_lookup_num_tokens: how many tokens to draft from what stands in the text already, and to check in
                one pass of the model: faster where a text repeats itself, and the same text. None drafts none.
            return_dict: whether to give all there is to tell, as a dict.

        Returns:
            A string for a string, the answer for a conversation, a list of strings for a list of either; for token ids
            a dict of NumPy arrays `token_ids` (B, S) and `padding_mask` (B, S), padded on the right, where S is the
            width T that they came with, or with `max_length` or `max_new_tokens` the longest row.

            With several sequences it is a list even for one prompt, and the sequences of a prompt stand one after
            another.

            With `return_dict` it is a dict for text, too: the `texts` (or the one text), `token_ids`, `padding_mask`,
            `log_probs` float32 (B, S), `finish_reasons`, a list of `"stop"` (a stop token or a stop string) and
            `"length"`, and, with drafts, their `acceptance_rate`, NaN where nothing was drafted. The log-probability
            of a token is that under the softmax of the model's own logits, whatever was done to them for sampling; NaN
            at prompts, at padding and where the sampler runs a loop of its own.

        Raises:
            TypeError: for an argument of the wrong type.
            ValueError: for a value out of range, arguments that exclude each other, a prompt that is too long, text
                without a preprocessor, and what the compiled sampler's own loop cannot do.
            ResourceError: for rows whose keys and values do not fit into memory.
            NonFiniteError: for logits that are NaN.

        Example:

        ```python
        model.generate("Once upon a time", max_new_tokens=100, temperature=0.8, stop_strings=["The end"])
        ```
        """
        options = GenerateOptions(
            max_length=max_length,
            stop_token_ids=stop_token_ids,
            strip_prompt=strip_prompt,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            sampler=sampler,
            stop_strings=stop_strings,
            logits_processors=logits_processors,
            seed=seed,
            num_return_sequences=num_return_sequences,
            prompt_lookup_num_tokens=prompt_lookup_num_tokens,
            return_dict=return_dict,
        )
        return generate(self, inputs, options)

    def stream(self, inputs, **options) -> Iterator[str] | Iterator[int]:
        """Continue one prompt, and give the text while it is written.

        All arguments are checked before this returns; nothing runs before the first piece is asked for. To leave the
        loop is to stop the work. While a conversation is continued, the keys and values of what earlier calls have read
        of it are found again: see `kept_conversations`.

        Args:
            inputs: a string, a conversation or `{"token_ids": (1, T)}`, as for `generate`.
            **options: those of `generate`, but for `num_return_sequences` and `return_dict`. `strip_prompt` is True
                where it is not given.

        Returns:
            An iterator of pieces of text, each as soon as nothing can change it: never half a character, and nothing
            that may be the beginning of a stop string. Joined they are what `generate` gives. For token ids an iterator
            of ids. Where the text is not made by kllama's own loop and tokenizer (`compile(sampler="beam")`, a
            `call_with_cache` of your own), it comes in one piece.

        Raises:
            TypeError, ValueError: as `generate`, and for several prompts.

        Example:

        ```python
        for piece in model.stream("Once upon a time", max_new_tokens=100):
            print(piece, end="", flush=True)
        ```
        """
        return stream(self, inputs, options)

    def chat(self, messages, **options) -> str:
        """Answer a conversation. Nothing of it is remembered but what makes the next answer come sooner.

        Args:
            messages: a list of `{"role", "content"}`, or `{"messages": ...}` of one, with `"tools"` beside it if there
                are any.
            **options: those of `generate`, but for `strip_prompt`, `num_return_sequences` and `return_dict`.

        Returns:
            The assistant's answer.

        Raises:
            TypeError, ValueError: as `generate`, and for several conversations.

        Example:

        ```python
        messages = [{"role": "user", "content": "Who wrote Faust?"}]
        messages.append({"role": "assistant", "content": model.chat(messages)})
        messages.append({"role": "user", "content": "When?"})
        print(model.chat(messages))
        ```
        """
        return chat(self, messages, options)

    @property
    def kept_conversations(self) -> int:
        """How many conversations have their keys and values kept by `chat` and `stream`. Defaults to 2; 0 keeps none.

        They are used again for what the next call has in common with them, from its beginning, as long as no weight
        has changed since, and take 1 GiB at most. They are right to the last bits of a float: an answer may differ
        from that of a model that keeps none where two tokens are equally likely.
        """
        return self._prefix_caches.num_kept

    @kept_conversations.setter
    def kept_conversations(self, count: int):
        check_integer("kept_conversations", count, minimum=0)
        self._prefix_caches.limit(count)

    def forget_conversations(self) -> None:
        """Free the memory of the conversations that are kept."""
        self._prefix_caches.clear()

    def make_generate_function(self):
        """Create or return what `generate` runs: a `Programs`, or what a subclass makes here.

        It stands in `generate_function` until `compile`, a new sampler, another `call_with_cache` or new variables
        (those of LoRA, or quantised ones) call for another. Called on `{"token_ids", "padding_mask"}` it runs
        `generate_step`, as KerasHub's does.
        """
        with _MAKING:
            function = self.generate_function
            made_for = self.variables, self.call_with_cache
            if function is None or (isinstance(function, Programs) and not function.are_for(*made_for)):
                self.generate_function = None
                function = Programs(*made_for, super().make_generate_function())
                self.generate_function = function
            return function

    def generate_step(self, inputs, stop_token_ids=None):
        """Generate with the compiled sampler's own loop; KerasHub's protocol for samplers.

        Args:
            inputs: dict of `token_ids` int (B, S), the prompts padded on the right to the final length, and
                `padding_mask` (B, S).
            stop_token_ids: tuple of ids that end a row, or None.

        Returns:
            Dict of `token_ids` (B, S) and a bool `padding_mask` (B, S) that covers each row up to its stop token.
        """
        return run_sampler(self, inputs, stop_token_ids)

    def call_with_cache(self, token_ids, cache, cache_update_index, *, rope_length=None):
        """Run the model on new tokens of sequences whose earlier keys and values are in a cache.

        Args:
            token_ids: int (B, T), the new tokens.
            cache: float (B, L, 2, S, K, H): keys and values of each layer for S positions.
            cache_update_index: int or int32 scalar, the position of the first new token.
            rope_length: int32 scalar, the length that dynamic and longrope frequencies are to be those of: the length
                at which the cached keys were made. None takes that of this call.

        Returns:
            `(logits float32 (B, T, V), hidden states (B, T, D), updated cache)`.
        """
        hidden_states, cache = self.backbone.run_layers_with_cache(token_ids, cache, cache_update_index, rope_length)
        return self.backbone.token_embedding(hidden_states, reverse=True), hidden_states, cache

    def _build_cache(self, token_ids, num_slots: int | None = None, **rope_length):
        """Give the hidden states (B, T, D) of prompts (B, T), and the cache that holds their keys and values.

        The cache has as many slots as the prompts have positions, or more. The name is KerasHub's.
        """
        cache = self.backbone._empty_cache(token_ids, num_slots)
        if self._overrides("call_with_cache"):
            return self.call_with_cache(token_ids, cache, 0, **rope_length)[1:]
        return self.backbone.run_layers_with_cache(token_ids, cache, 0, **rope_length)

    def _overrides(self, name: str) -> bool:
        """Tell whether a subclass, or an attribute of this very model, stands in for a method of this class."""
        return name in vars(self) or getattr(type(self), name) is not getattr(GeneratingModel, name)
