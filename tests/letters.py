"""A vocabulary of five tokens, whose rows can be written down: a = 0, b = 1, c = 2, <s> = 3, </s> = 4."""

from kllama.text.tokenizer import LlamaTokenizer

# `<s>`, an `a` for each tool, what the user says as it is, and what the assistant says as `c ... </s>`.
CHAT_TEMPLATE = """
{{- bos_token }}
{%- for tool in tools or [] %}a{% endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {{- "c" }}{% generation %}{{ message.content + eos_token }}{% endgeneration %}
    {%- else %}
        {{- message.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}c{% endif -%}
"""


def letters(**kwargs) -> LlamaTokenizer:
    """Build the tokenizer. The id that fills rows, 0, is a real token."""
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "added_tokens": [{"id": 3, "content": "<s>", **added}, {"id": 4, "content": "</s>", **added}],
        "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2}, "merges": []},
    }
    return LlamaTokenizer(content, **{"start_token": "<s>", "end_token": "</s>", **kwargs})


def chat_letters() -> LlamaTokenizer:
    """Build the tokenizer with a chat template."""
    return letters(chat_template=CHAT_TEMPLATE)
