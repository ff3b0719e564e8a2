"""The files of a tokenizer for Hugging Face: `AutoTokenizer` gives our ids, start token included, and we read them."""

import json

import pytest
import tokenizers

from kllama.checkpoints.huggingface.writing import write_json
from kllama.errors import CheckpointError
from kllama.text.chat.template import BUILT_IN
from kllama.text.formats.gguf_pre_tokenizers import PRE_TOKENIZERS
from kllama.text.formats.rules import build_encoder, byte_characters, byte_level
from kllama.text.huggingface_export import write_tokenizer
from kllama.text.preprocessor import LlamaCausalLMPreprocessor
from kllama.text.tokenizer import LlamaTokenizer

pytestmark = pytest.mark.backend_independent

# Vocabularies under the assets, and whether texts begin with the start token.
VOCABULARIES = [
    ("models/stories260K", True),
    ("models/stories260K", False),
    ("models/stories15M", True),
    ("models/smollm2-135m-instruct", False),
    ("tokenizers/llama3_2", True),
    ("tokenizers/gpt2", False),
]
SPECIAL = ["<s>", "</s>", "<|begin_of_text|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>", "[INST]"]
TURNS = [
    {"role": "user", "content": "  Hi there "},
    {"role": "assistant", "content": "½ é\n"},
    {"role": "user", "content": "Bye."},
]
CHATS = [
    (TURNS, {}),
    (TURNS, {"add_generation_prompt": True}),
    ([{"role": "system", "content": "Be brief."}, *TURNS], {"add_generation_prompt": True}),
    (TURNS[:2], {"continue_final_message": True}),
]
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def auto_tokenizer():
    return pytest.importorskip("transformers", reason="transformers is not installed").AutoTokenizer


@pytest.fixture(scope="module")
def texts(assets):
    """Texts in which no special token is spelt: transformers takes it for the token, as `parse_special` does."""
    recorded = json.loads((assets / "goldens" / "tokenizers" / "mixed_text.json").read_text())["texts"]
    return [text for text in recorded if not any(token in text for token in SPECIAL)]


def tiny(**arguments) -> LlamaTokenizer:
    """Train a vocabulary on three words, with the tokens <s> and </s>."""
    return LlamaTokenizer.train(["once upon a time"], 266, **arguments)


def encode(tokenizer, texts, **options) -> list[list[int]]:
    return tokenizer(texts, **options)["input_ids"]


def read(auto_tokenizer, folder) -> tuple:
    """Read a directory with transformers, and with kllama."""
    return auto_tokenizer.from_pretrained(folder), LlamaTokenizer.from_preset(folder)


def check_chats(theirs, back, tokenizer) -> None:
    """Compare the texts of conversations."""
    for turns, options in CHATS:
        text = tokenizer.apply_chat_template(turns, tokenize=False, **options)
        assert theirs.apply_chat_template(turns, tokenize=False, **options) == text
        assert back.apply_chat_template(turns, tokenize=False, **options) == text


class TestIds:
    @pytest.mark.parametrize("name, add_start_token", VOCABULARIES)
    def test_equal_ours(self, auto_tokenizer, assets, texts, tmp_path, name, add_start_token):
        tokenizer = LlamaTokenizer.from_preset(assets / name)
        preprocessor = LlamaCausalLMPreprocessor(tokenizer, add_start_token=add_start_token, add_end_token=False)
        preprocessor.export_to_transformers(tmp_path / "out")
        rows = preprocessor.prompt_rows(texts)
        assert len(rows) > 100 and (rows[0][0] == tokenizer.start_token_id) == add_start_token

        theirs = auto_tokenizer.from_pretrained(tmp_path / "out")
        assert encode(theirs, texts) == rows
        assert theirs.decode(rows[0], skip_special_tokens=True) == tokenizer.detokenize(rows[0][add_start_token:])
        assert (theirs.bos_token, theirs.eos_token) == (tokenizer.start_token, tokenizer.end_token)
        for token in tokenizer.special_tokens[:20]:
            assert encode(theirs, token, add_special_tokens=False) == [tokenizer.token_to_id(token)]

        back = LlamaCausalLMPreprocessor.from_preset(tmp_path / "out")
        assert back.add_start_token == add_start_token and back.prompt_rows(texts) == rows
        for attribute in ("start_token", "end_token", "pad_token", "special_token_ids", "chat_template"):
            assert getattr(back.tokenizer, attribute) == getattr(tokenizer, attribute)
        if tokenizer.chat_template is not None:
            check_chats(theirs, back.tokenizer, tokenizer)

    @pytest.mark.parametrize("start", [True, False])
    def test_a_tokenizer_alone_starts_texts_as_its_own_rules_do(self, auto_tokenizer, tmp_path, start):
        tokenizer = tiny(kind="byte_bpe")
        folder = tmp_path / "in"
        LlamaCausalLMPreprocessor(tokenizer, add_start_token=start).export_to_transformers(folder)
        LlamaTokenizer.from_preset(folder).export_to_transformers(tmp_path / "out")
        theirs = auto_tokenizer.from_pretrained(tmp_path / "out")
        assert encode(theirs, "once") == [0] * start + tokenizer("once").tolist()

    @pytest.mark.parametrize("options", [{"legacy": False}, {"add_prefix_space": False}])
    def test_options_of_sentencepiece(self, auto_tokenizer, assets, texts, tmp_path, options):
        tokenizer = LlamaTokenizer(assets / "models" / "stories260K" / "tokenizer.model", **options)
        tokenizer.export_to_transformers(tmp_path / "out")
        theirs = auto_tokenizer.from_pretrained(tmp_path / "out")
        assert encode(theirs, texts, add_special_tokens=False) == tokenizer(texts)
        assert LlamaTokenizer.from_preset(tmp_path / "out")(texts) == tokenizer(texts)

    def test_a_space_before_the_text_of_a_lone_byte_level_rule(self, auto_tokenizer, assets, tmp_path):
        """transformers 4 sets it to what tokenizer_config.json says, and to false where that is silent."""
        tokenizer = LlamaTokenizer(assets / "tokenizers" / "gpt2", add_prefix_space=True)
        tokenizer.export_to_transformers(tmp_path / "out")
        assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["add_prefix_space"] is True
        assert encode(auto_tokenizer.from_pretrained(tmp_path / "out"), "once") == tokenizer("once").tolist()

    def test_added_tokens_keep_their_flags(self, auto_tokenizer, tmp_path):
        tokenizer = tiny()
        tokenizer.add_tokens(["pon a", "é è"])
        tokenizer.add_tokens(["<|x|>"], special=True)
        tokenizer.export_to_transformers(tmp_path / "out")
        theirs = auto_tokenizer.from_pretrained(tmp_path / "out")
        assert encode(theirs, "upon a é è") == tokenizer("upon a é è").tolist()
        assert encode(theirs, "<|x|>") == [tokenizer.token_to_id("<|x|>")]
        assert LlamaTokenizer.from_preset(tmp_path / "out").special_tokens == tokenizer.special_tokens

    def test_named_tokens_keep_their_flags(self, auto_tokenizer, tmp_path):
        """Here one that swallows the space before it; transformers makes a plain one of a token without flags."""
        encoder = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, " ": 2}, []))
        encoder.add_special_tokens([tokenizers.AddedToken("</s>", lstrip=True, normalized=True)])
        tokenizer = LlamaTokenizer(encoder, end_token="</s>", parse_special=True)
        tokenizer.export_to_transformers(tmp_path / "out")
        assert encode(auto_tokenizer.from_pretrained(tmp_path / "out"), "a </s> b") == [0, 3, 2, 1]
        assert tokenizer("a </s> b").tolist() == [0, 3, 2, 1]

    def test_no_token_types(self, auto_tokenizer, tmp_path):
        """Version 4 gives them where the settings do not say otherwise."""
        tiny().export_to_transformers(tmp_path / "out")
        names = ["input_ids", "attention_mask"]
        assert list(auto_tokenizer.from_pretrained(tmp_path / "out")("once")) == names
        assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["model_input_names"] == names


class TestPadding:
    def test_a_pad_token_fills_rows(self, auto_tokenizer, tmp_path):
        tokenizer = tiny(special_tokens=["<pad>"], pad_token="<pad>")
        tokenizer.export_to_transformers(tmp_path / "out")
        theirs = auto_tokenizer.from_pretrained(tmp_path / "out")
        batch = theirs(["once", "once upon"], padding=True)
        num_padded = len(batch["input_ids"][1]) - len(tokenizer("once"))
        assert batch["input_ids"][0] == [*tokenizer("once").tolist(), *[tokenizer.pad_token_id] * num_padded]
        assert sum(batch["attention_mask"][0]) == len(tokenizer("once"))

    def test_an_ordinary_token_is_left_out(self, auto_tokenizer, tmp_path):
        """As special token it would be taken out of texts, which would then have other ids."""
        tokenizer = tiny(pad_token="o")
        with pytest.warns(UserWarning, match="pad_token = 'o' is left out"):
            tokenizer.export_to_transformers(tmp_path / "out")
        theirs = auto_tokenizer.from_pretrained(tmp_path / "out")
        assert theirs.pad_token is None and encode(theirs, "once upon") == tokenizer("once upon").tolist()

    def test_none_is_none(self, auto_tokenizer, tmp_path):
        tiny().export_to_transformers(tmp_path / "out")
        assert auto_tokenizer.from_pretrained(tmp_path / "out").pad_token is None
        assert LlamaTokenizer.from_preset(tmp_path / "out").pad_token is None


class TestChatTemplates:
    @pytest.mark.parametrize("name", BUILT_IN)
    def test_built_in_ones_are_spelt_out(self, auto_tokenizer, tmp_path, name):
        tokenizer = tiny(chat_template=name)
        tokenizer.export_to_transformers(tmp_path / "out")
        check_chats(*read(auto_tokenizer, tmp_path / "out"), tokenizer)

    def test_several(self, auto_tokenizer, tmp_path):
        tools = {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]}
        tokenizer = tiny(chat_template={"default": TEMPLATE, "tool_use": "{{ tools | length }}" + TEMPLATE})
        tokenizer.export_to_transformers(tmp_path / "out")
        check_chats(*read(auto_tokenizer, tmp_path / "out"), tokenizer)
        text = tokenizer.apply_chat_template(TURNS, tokenize=False, **tools)
        assert text.startswith("1<s>")
        theirs, back = read(auto_tokenizer, tmp_path / "out")
        assert theirs.apply_chat_template(TURNS, tokenize=False, **tools) == text
        assert back.chat_template == tokenizer.chat_template

    @pytest.mark.parametrize("template", [TEMPLATE, {"default": TEMPLATE, "other": "{{ 1 }}"}])
    def test_older_versions_find_them_in_the_settings(self, auto_tokenizer, tmp_path, template):
        tokenizer = tiny(chat_template=template)
        tokenizer.export_to_transformers(tmp_path / "out")
        for file in [*(tmp_path / "out").glob("*.jinja"), *(tmp_path / "out").glob("*/*.jinja")]:
            file.unlink()
        check_chats(*read(auto_tokenizer, tmp_path / "out"), tokenizer)
        assert LlamaTokenizer.from_preset(tmp_path / "out").chat_template == template

    def test_a_name_that_leads_out_of_the_directory_is_refused(self, tmp_path):
        with pytest.raises(CheckpointError, match="plain file name"):
            tiny(chat_template={"../x": TEMPLATE}).export_to_transformers(tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


class TestBesideQwen2:
    """transformers 5 splits texts by Qwen2's rules beside a model of that type, whatever the files say."""

    def make(self, rules) -> LlamaTokenizer:
        characters = byte_characters()
        vocabulary = {characters[byte]: byte for byte in range(256)}
        rules = {"pre_tokenizer": rules.pre_tokenizer, "normalizer": rules.normalizer, "decoder": byte_level()}
        encoder = build_encoder(tokenizers.models.BPE(vocabulary, []), rules, ["<|endoftext|>"])
        return LlamaTokenizer(encoder, end_token="<|endoftext|>")

    def write(self, folder, tokenizer):
        folder.mkdir()
        write_json(folder / "config.json", {"model_type": "qwen2"})
        write_tokenizer(folder, tokenizer, add_start_token=False, model_type="qwen2")

    def test_its_own_rules(self, auto_tokenizer, tmp_path, recwarn, texts):
        tokenizer = self.make(PRE_TOKENIZERS["qwen2"])
        self.write(tmp_path / "out", tokenizer)
        assert [warning for warning in recwarn if warning.category is UserWarning] == []
        theirs = auto_tokenizer.from_pretrained(tmp_path / "out")
        assert type(theirs).__name__ == "Qwen2Tokenizer" and encode(theirs, texts) == tokenizer(texts)

    def test_other_rules_are_warned_of(self, tmp_path):
        with pytest.warns(UserWarning, match="not Qwen2's"):
            self.write(tmp_path / "out", self.make(PRE_TOKENIZERS["llama-bpe"]))


class TestArguments:
    def test_a_start_token_that_is_not_there(self, tmp_path):
        preprocessor = LlamaCausalLMPreprocessor(tiny(start_token=None), add_start_token=True)
        with pytest.raises(ValueError, match="add_start_token = True, but start_token"):
            preprocessor.export_to_transformers(tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_without_a_vocabulary(self, tmp_path):
        with pytest.raises(ValueError, match="expected a vocabulary"):
            LlamaTokenizer().export_to_transformers(tmp_path / "out")

    def test_overwrite(self, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").touch()
        with pytest.raises(ValueError, match="overwrite=True"):
            tiny().export_to_transformers(tmp_path / "out")
        tiny().export_to_transformers(tmp_path / "out", overwrite=True)
        assert not (tmp_path / "out" / "mine").exists()
