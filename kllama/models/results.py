"""What `generate` gives: texts, or ids with their mask, and on request all there is to tell about them.

It writes no tokens and checks no arguments. `models/generating.py` calls it.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from kllama.models.generate_options import SettledCall


class Continued(NamedTuple):
    """Rows that were continued, one for each sequence of each prompt: b0s0, b0s1, b1s0, ...

    Attributes:
        token_ids: int32 (B, S); what lies behind a row's length means nothing.
        lengths: int32 (B,), of prompt and new tokens.
        log_probs: float32 (B, S), NaN where there is none; None where nobody asked.
        finish_reasons: `"stop"` or `"length"` for each row.
        num_dropped: for each row how many characters at the end of its text a stop string cuts off.
        acceptance_rate: which share of the drafted tokens was taken; NaN without drafts.
    """

    token_ids: np.ndarray
    lengths: np.ndarray
    log_probs: np.ndarray | None
    finish_reasons: list[str]
    num_dropped: list[int]
    acceptance_rate: float = math.nan


def finish_call(call: SettledCall, continued: Continued):
    """Turn rows that were continued into what the caller gets."""
    prompts, options = call.prompts, call.options
    token_ids, padding_mask, log_probs = _arrays(call, continued)
    outputs = {"token_ids": token_ids, "padding_mask": padding_mask}
    if options.return_dict:
        outputs |= {"log_probs": log_probs, "finish_reasons": continued.finish_reasons}
        if options.prompt_lookup_num_tokens is not None:
            outputs["acceptance_rate"] = continued.acceptance_rate
    if prompts.finish_text is None:
        return outputs
    texts = _texts(prompts, token_ids, padding_mask, continued.num_dropped)
    if prompts.is_single and len(texts) == 1:
        texts = texts[0]
    return {"texts": texts, **outputs} if options.return_dict else texts


def _arrays(call, continued):
    """Give ids, mask and log-probabilities (B, S), without the prompts where they are not asked for."""
    prompts, options = call.prompts, call.options
    strips = prompts.is_chat if options.strip_prompt is None else options.strip_prompt
    lengths = np.repeat(prompts.lengths, options.num_return_sequences)
    starts = lengths if strips else np.zeros_like(lengths)
    is_filled = options.max_length is None and options.max_new_tokens is None  # ids keep the width that they came with
    width = prompts.width if is_filled and prompts.width else max(1, *(continued.lengths - starts), 0)
    columns = np.minimum(starts[:, None] + np.arange(width), max(continued.token_ids.shape[1] - 1, 0))
    padding_mask = np.arange(width) < (continued.lengths - starts)[:, None]
    token_ids = np.where(padding_mask, _take(continued.token_ids, columns), 0).astype("int32")
    if continued.log_probs is None:
        return token_ids, padding_mask, None
    return token_ids, padding_mask, np.where(padding_mask, _take(continued.log_probs, columns), np.float32(np.nan))


def _take(array, columns):
    return np.take_along_axis(array, columns, axis=1) if len(array) else np.zeros(columns.shape, array.dtype)


def _texts(prompts, token_ids, padding_mask, num_dropped):
    if not len(token_ids):
        return []
    texts = prompts.finish_text({"token_ids": token_ids, "padding_mask": padding_mask})
    return [text[: max(0, len(text) - dropped)] for text, dropped in zip(texts, num_dropped, strict=True)]


def join_results(results: list):
    """Join what `generate` gave for each batch of a dataset: a list of texts, or dicts with arrays of one width."""
    if not any(isinstance(result, Mapping) for result in results):
        return [text for result in results for text in ([result] if isinstance(result, str) else result)]
    width = max(result["token_ids"].shape[1] for result in results)
    return {name: _join([result[name] for result in results], width) for name in results[0]}


def _join(parts: list, width: int):
    if isinstance(parts[0], np.ndarray):
        empty = np.nan if parts[0].dtype.kind == "f" else 0
        padded = [np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=empty) for part in parts]
        return np.concatenate(padded)
    if isinstance(parts[0], str | list):
        return [value for part in parts for value in ([part] if isinstance(part, str) else part)]
    return parts
