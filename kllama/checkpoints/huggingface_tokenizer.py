"""The tokenizer files of a Hugging Face directory: `tokenizer.json` and `tokenizer_config.json`.

Says with which arguments kllama's tokenizer and preprocessor do what those files say; builds neither. Called by
`checkpoints/huggingface.py`.
"""

from pathlib import Path

from kllama.checkpoints.config import token_ids
from kllama.checkpoints.reader import listed, read_json, shown
from kllama.errors import CheckpointError

TOKENIZER_LIMIT = 64 * 2**20


def tokenizer_config(path: Path, vocabulary_size: int, settings: dict, config: dict) -> dict:
    """Name the special tokens: as `tokenizer_config.json` does, else by the ids in `config.json`."""
    vocabulary = _read_vocabulary(path, vocabulary_size)
    tokens = {"pad_token": _token(settings.get("pad_token"), path, "pad_token", vocabulary)}
    for name in ("bos_token", "eos_token"):
        if name in settings:
            tokens[name] = _token(settings[name], path, name, vocabulary)
        else:
            tokens[name] = _token_of_id(config, f"{name}_id", path, vocabulary)
    return {
        "tokenizer": str(path),
        "start_token": tokens["bos_token"],
        "end_token": tokens["eos_token"],
        "pad_token": tokens["pad_token"],
    }


def preprocessor_config(tokenizer_config: dict, settings: dict) -> dict:
    """Say which of the start and end tokens texts do not get; by default they get both."""
    adds = {
        "add_start_token": tokenizer_config["start_token"] is not None
        and _adds_start_token(tokenizer_config, settings),
        "add_end_token": tokenizer_config["end_token"] is not None,
    }
    return {name: False for name, is_added in adds.items() if not is_added}


def _adds_start_token(tokenizer_config: dict, settings: dict) -> bool:
    """Tell whether texts begin with the start token: by `add_bos_token`, else the post-processor, else the class."""
    if isinstance(settings.get("add_bos_token"), bool):
        return settings["add_bos_token"]
    processor = read_json(Path(tokenizer_config["tokenizer"]), TOKENIZER_LIMIT).get("post_processor") or {}
    templates = [part["single"] for part in processor.get("processors", [processor]) if part.get("single")]
    if templates:
        return any(
            template[0].get("SpecialToken", {}).get("id") == tokenizer_config["start_token"] for template in templates
        )
    return str(settings.get("tokenizer_class", "LlamaTokenizer")).startswith("Llama")


def _read_vocabulary(path: Path, vocabulary_size: int) -> dict[str, int]:
    """Return the ids of a `tokenizer.json` by token, all of them below the number of embedding rows."""
    document = read_json(path, TOKENIZER_LIMIT)
    try:
        entries = document["model"]["vocab"]
        if isinstance(entries, list):  # Unigram: pairs of token and score, the id is the place in the list
            entries = {token: token_id for token_id, (token, _) in enumerate(entries)}
        added = {token["content"]: token["id"] for token in document.get("added_tokens") or ()}
        vocabulary = {**entries, **added}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: expected model.vocab and added_tokens as the tokenizers library writes them."
        ) from error
    wrong = [token for token, token_id in vocabulary.items() if type(token_id) is not int or token_id < 0]
    if wrong:
        raise CheckpointError(f"{path}: ids that are not integers from 0: {listed(map(shown, wrong))}.")
    outside = [f"{shown(token)} = {token_id}" for token, token_id in vocabulary.items() if token_id >= vocabulary_size]
    if outside:
        raise CheckpointError(
            f"{path}: ids without an embedding row: {listed(outside)}; expected below {vocabulary_size}."
        )
    return vocabulary


def _token(value: object, path: Path, name: str, vocabulary: dict[str, int]) -> str | None:
    """Return the text of a special token, which the file spells as a string or as an object with its `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    if text is None or (isinstance(text, str) and text in vocabulary):
        return text
    source = path.with_name("tokenizer_config.json")
    raise CheckpointError(f"{source}: {name} = {shown(value)}; expected a token of {path.name}.")


def _token_of_id(config: dict, name: str, path: Path, vocabulary: dict[str, int]) -> str | None:
    """Return the text of the token that `config.json` names by its id, or by the first id of a list."""
    source = path.with_name("config.json")
    ids = token_ids(config, name, source)
    if not ids:
        return None
    tokens = [token for token, token_id in vocabulary.items() if token_id == ids[0]]
    if not tokens:
        raise CheckpointError(f"{source}: {name} = {ids[0]}; expected an id of {path.name}.")
    return tokens[-1]  # an added token, which stands last, hides the plain one of its id
