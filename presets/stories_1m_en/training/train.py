"""Train the embedded preset, a byte-level BPE of 2,048 tokens and a Llama of 1.4 million parameters, from one text.

    KERAS_BACKEND=jax python presets/stories_1m_en/training/train.py tinystories_1mb.txt

The text is 0.94 MB of TinyStories (Eldan and Li, arXiv:2305.07759; CDLA-Sharing-1.0), one story after another. Every
twentieth story is held out. The weights kept are those of the epoch with the lowest held-out loss; `log.csv` beside
this file has every epoch.
"""

import argparse
import csv
import os
import random
import re
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np

import kllama

PRESET = Path(__file__).resolve().parents[1]
SEQUENCE_LENGTH = 256
BATCH_SIZE = 16
PEAK_LEARNING_RATE = 2e-3

# Some stories of the file were decoded with the wrong character set; the last entry is a mark that lost its end.
QUOTATION_MARKS = (
    ("\u00e2\u20ac\u0153", '"'),
    ("\u00e2\u20ac\u2122", "'"),
    ("\u00e2\u20ac\u201c", "-"),
    ("\u00e2\u20ac\u201d", "-"),
    ("\u201c", '"'),
    ("\u201d", '"'),
    ("\u00e2\u20ac", '"'),
)


def main() -> None:
    """Train the tokenizer and the model, and write the preset."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=18, help="stop before the epoch that would end later")
    arguments = parser.parse_args()

    keras.utils.set_random_seed(1)
    stories = read_stories(arguments.text)
    held_out, training = stories[::20], [story for i, story in enumerate(stories) if i % 20]
    tokenizer = kllama.LlamaTokenizer.train(training, 2048, pattern="gpt2")
    preprocessor = kllama.LlamaCausalLMPreprocessor(tokenizer, sequence_length=SEQUENCE_LENGTH)
    model = kllama.LlamaCausalLM(build_backbone(tokenizer.vocabulary_size()), preprocessor)
    print(f"{len(training)} stories to train on, {len(held_out)} held out, {model.count_params():,} parameters")

    train(model, join(training, tokenizer), join(held_out, tokenizer), arguments.epochs, arguments.minutes)
    model.compile(sampler="auto")
    model.save_to_preset(PRESET)
    print(model.generate("Once upon a time", max_new_tokens=150, temperature=0.7, seed=1))


def read_stories(path: Path) -> list[str]:
    """Split the file at single line breaks: inside a story, paragraphs stand apart by an empty line."""
    text = path.read_text("utf-8")
    for wrong, right in QUOTATION_MARKS:
        text = text.replace(wrong, right)
    return [story.strip() for story in re.split(r"(?<!\n)\n(?!\n)", text) if story.strip()]


def build_backbone(vocabulary_size: int) -> kllama.LlamaBackbone:
    """Build a Llama small enough to ship: 1.4 million parameters, grouped heads, a tied head."""
    return kllama.LlamaBackbone(
        vocabulary_size=vocabulary_size,
        num_layers=6,
        num_query_heads=4,
        hidden_dim=128,
        intermediate_dim=352,
        num_key_value_heads=2,
        layer_norm_epsilon=1e-5,
        dropout=0.2,
        tie_word_embeddings=True,
        max_sequence_length=SEQUENCE_LENGTH,
        initializer_range=0.05,
    )


def join(stories: list[str], tokenizer: kllama.LlamaTokenizer) -> np.ndarray:
    """Write the stories one after another, each between its start and end token: one row of ids."""
    rows = [[tokenizer.start_token_id, *ids, tokenizer.end_token_id] for ids in tokenizer(stories)]
    return np.concatenate(rows).astype("int32")


def cut(ids: np.ndarray, offset: int = 0) -> np.ndarray:
    """Cut a row of ids into whole rows (B, SEQUENCE_LENGTH)."""
    num_rows = (len(ids) - offset) // SEQUENCE_LENGTH
    return ids[offset : offset + num_rows * SEQUENCE_LENGTH].reshape(num_rows, SEQUENCE_LENGTH)


def train(model, training: np.ndarray, held_out: np.ndarray, num_epochs: int, minutes: float) -> None:
    """Fit the model, log every epoch, and leave it with the weights of the best one."""
    num_steps = num_epochs * (len(training) // SEQUENCE_LENGTH // BATCH_SIZE)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, num_steps, warmup_target=PEAK_LEARNING_RATE, warmup_steps=num_steps // 20
    )
    model.compile(optimizer=keras.optimizers.AdamW(schedule, weight_decay=0.1, beta_2=0.95, clipnorm=1.0))
    start, best, best_weights = time.monotonic(), float("inf"), None
    with open(Path(__file__).with_name("log.csv"), "w", newline="") as file:
        log = csv.writer(file)
        log.writerow(["epoch", "minutes", "loss", "held_out_loss", "held_out_token_accuracy", "held_out_perplexity"])
        for epoch in range(1, num_epochs + 1):
            # Another cut in each epoch, so that other tokens meet at the borders of the rows.
            rows = cut(training, random.randrange(SEQUENCE_LENGTH))
            history = model.fit(rows, batch_size=BATCH_SIZE, verbose=0, validation_data=cut(held_out)).history
            spent = (time.monotonic() - start) / 60
            values = [
                history[name][0] for name in ("loss", "val_loss", "val_sparse_categorical_accuracy", "val_perplexity")
            ]
            log.writerow([epoch, f"{spent:.1f}", *(f"{value:.4f}" for value in values)])
            file.flush()
            print(f"epoch {epoch}: {spent:.1f} minutes, loss {values[0]:.3f}, held out {values[1]:.3f}", flush=True)
            if values[1] < best:
                best, best_weights = values[1], model.get_weights()
            if spent * (epoch + 1) / epoch > minutes:
                break
    model.set_weights(best_weights)


if __name__ == "__main__":
    main()
