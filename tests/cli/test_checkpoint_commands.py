"""`kllama convert`, `inspect` and `verify`: what they write, where, and how they fail."""

import json
import os
import shutil

import numpy as np
import pytest

from kllama import LlamaBackbone, LlamaCausalLM
from kllama.checkpoints.formats import open_checkpoint
from kllama.cli import main
from kllama.cli.convert import FORMATS
from kllama.models import convert as conversion

pytestmark = pytest.mark.backend_independent

GGUF = "gguf/stories260K-f32.gguf"
HUGGING_FACE = "models/stories260K"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", os.environ["KERAS_BACKEND"])  # so that what a command sets is undone
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")


def run(capsys, *arguments) -> tuple[int, str, str]:
    """Run a command in this process: its exit code, stdout and stderr."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def tensors(path) -> dict[str, np.ndarray]:
    return dict(open_checkpoint(path).tensors())


class TestConvert:
    def test_the_formats_are_those_of_the_function(self):
        assert FORMATS == conversion.FORMATS

    @pytest.mark.parametrize("source", [HUGGING_FACE, GGUF, "meta/stories260K-mp2"])
    def test_there_and_back_is_exact(self, assets, tmp_path, capsys, source):
        """From any format through all that are written: every number stays what it was."""
        steps = {"model.gguf": "gguf", "directory": "huggingface", "preset": "preset", "again": "huggingface"}
        expected, last = tensors(assets / HUGGING_FACE), assets / source
        for name, to in steps.items():
            code, out, err = run(capsys, "convert", last, tmp_path / name, "--to", to)
            assert (code, out) == (0, "") and err.endswith(f"wrote {tmp_path / name}\n")
            last = tmp_path / name
            given = tensors(last)
            assert given.keys() == expected.keys()
            for path, array in given.items():
                np.testing.assert_array_equal(array, expected[path], err_msg=f"{name} {path}")
        for old, new in zip((tmp_path / "directory").iterdir(), (tmp_path / "again").iterdir(), strict=True):
            if old.name != "kllama_manifest.json":
                assert old.read_bytes() == (tmp_path / "again" / old.name).read_bytes(), new

    def test_dtype(self, assets, tmp_path, capsys):
        assert (
            run(capsys, "convert", assets / GGUF, tmp_path / "half", "--to", "huggingface", "--dtype", "bfloat16")[0]
            == 0
        )
        assert open_checkpoint(tmp_path / "half").stored_bytes.keys() == {"bfloat16"}
        assert run(capsys, "convert", tmp_path / "half", tmp_path / "q.gguf", "--dtype", "q8_0")[0] == 0
        assert "Q8_0" in open_checkpoint(tmp_path / "q.gguf").stored_bytes

    def test_quiet(self, assets, tmp_path, capsys):
        assert run(capsys, "convert", assets / GGUF, tmp_path / "m.gguf", "--quiet") == (0, "", "")

    def test_what_is_there_stays_without_overwrite(self, assets, tmp_path, capsys):
        (tmp_path / "m.gguf").write_text("precious")
        code, _, err = run(capsys, "convert", assets / GGUF, tmp_path / "m.gguf")
        assert code == 2 and "--overwrite" in err and (tmp_path / "m.gguf").read_text() == "precious"
        assert run(capsys, "convert", assets / GGUF, tmp_path / "m.gguf", "--overwrite")[0] == 0
        assert tensors(tmp_path / "m.gguf")

    @pytest.mark.parametrize(
        ("arguments", "code", "part"),
        [
            (["{gguf}", "{tmp}/out"], 2, "--to is missing"),
            (["{gguf}", "{tmp}/out", "--to", "huggingface", "--dtype", "q8_0"], 2, "q8_0 is for --to gguf"),
            (["{gguf}", "{tmp}/out", "--to", "onnx"], 2, "onnx"),
            (["{tmp}/nothing", "{tmp}/out", "--to", "preset"], 3, "no such preset"),
            (["{copy}", "{copy}/inside", "--to", "preset"], 2, "apart from the source"),
            (["{copy}", "{copy}", "--to", "huggingface", "--overwrite"], 2, "apart from the source"),
        ],
    )
    def test_refusals(self, assets, tmp_path, capsys, arguments, code, part):
        copy = tmp_path / "copy"
        shutil.copytree(assets / "meta/stories260K", copy)
        names = {"gguf": assets / GGUF, "tmp": tmp_path, "copy": copy}
        given, _, err = run(capsys, "convert", *(argument.format(**names) for argument in arguments))
        assert given == code and part in err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]
        assert not (copy / "inside").exists()

    def test_the_factor_of_metas_later_models(self, assets, tmp_path, capsys):
        source = shutil.copytree(assets / "meta/stories260K", tmp_path / "meta")
        parameters = json.loads((source / "params.json").read_text()) | {"use_scaled_rope": True}
        (source / "params.json").write_text(json.dumps(parameters))
        code, _, err = run(capsys, "convert", source, tmp_path / "out", "--to", "huggingface")
        assert code == 3 and "factor" in err
        assert run(capsys, "convert", source, tmp_path / "out", "--to", "huggingface", "--rope-factor", 32)[0] == 0
        assert open_checkpoint(tmp_path / "out").backbone_config["rope_scaling"]["factor"] == 32.0

    @pytest.mark.parametrize("to", FORMATS)
    def test_a_factor_that_nobody_asked_for_is_refused(self, assets, tmp_path, capsys, to):
        code, _, err = run(capsys, "convert", assets / GGUF, tmp_path / "out", "--to", to, "--rope-factor", 8)
        assert code == 2 and "rope_scaling" in err and "must be left out" in err
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
    def test_a_preset_of_a_mixed_policy_has_float32_weights(self, assets, tmp_path, policy):
        LlamaCausalLM.from_preset(assets / HUGGING_FACE, dtype=policy).save_to_preset(tmp_path / "mixed")
        for to in ("huggingface", "gguf"):
            conversion.convert(tmp_path / "mixed", tmp_path / to, to)
            assert open_checkpoint(tmp_path / to).stored_bytes.keys() == {"float32"}

    @pytest.mark.parametrize("to", ["huggingface", "preset"])
    def test_a_base_model_keeps_its_tokenizer_and_gets_no_head(self, assets, tmp_path, capsys, to):
        source = shutil.copytree(assets / HUGGING_FACE, tmp_path / "base", ignore=shutil.ignore_patterns("llama2c"))
        config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": False}
        (source / "config.json").write_text(json.dumps(config))
        code, _, err = run(capsys, "convert", source, tmp_path / "out", "--to", to)
        assert code == 0
        given = open_checkpoint(tmp_path / "out")
        assert given.tokenizer_config is not None
        if to == "huggingface":
            assert not given.has_head
        else:  # whose format cannot say it
            assert err.startswith(f"kllama: warning: {source} has no head, which a preset cannot say.")
            assert LlamaBackbone.from_preset(tmp_path / "out").tie_word_embeddings
        expected = tensors(source)
        for path, array in given.tensors():
            np.testing.assert_array_equal(array, expected[path], err_msg=path)

    def test_warnings_are_notices(self, assets, tmp_path, capsys):
        code, _, err = run(capsys, "convert", assets / "goldens/hf_tiny/llama_gqa", tmp_path / "m.gguf", "--quiet")
        assert code == 0 and err.startswith("kllama: warning: preprocessor = None") and err.count("\n") == 1

    def test_a_preset_is_not_replaced_unasked(self, assets, tmp_path):
        conversion.convert(assets / HUGGING_FACE, tmp_path / "preset", "preset")
        with pytest.raises(ValueError, match="overwrite=True"):
            conversion.convert(assets / GGUF, tmp_path / "preset", "preset")


class TestInspect:
    def test_tables(self, assets, capsys):
        code, out, err = run(capsys, "inspect", assets / GGUF)
        assert (code, err) == (0, "")
        lines = [line.split() for line in out.splitlines()]
        assert out.splitlines()[0] == f"{assets / GGUF}: GGUF"
        assert ["layers", "5"] in lines and ["key/value", "heads", "4"] in lines and ["start", "token", "<s>"] in lines
        assert ["total", "260,032", "100.0", "%"] in lines
        assert all(line == line.rstrip() and len(line) <= 100 for line in out.splitlines()[1:])

    def test_json(self, assets, capsys):
        code, out, _ = run(capsys, "inspect", "--json", assets / "goldens/hf_tiny/mistral_sliding_window")
        summary = json.loads(out)
        assert code == 0 and summary["architecture"]["sliding_window"] == 5 and summary["tokenizer"] is None
        parts = {part: count for part, count in summary["parameters"].items() if part != "total"}
        assert sum(parts.values()) == summary["parameters"]["total"] == summary["stored_bytes"]["total"] // 4
        memory = summary["memory"]
        assert memory["run"]["bfloat16"] < memory["run"]["float32"] < memory["fine-tune all weights"]["float32"]

    def test_memory_is_about_what_was_measured(self, assets, capsys):
        """The growth of a process on PyTorch, in MB, that loads stories15M and fits one row of 1024 tokens."""
        memory = json.loads(run(capsys, "inspect", "--json", assets / "models/stories15M")[1])["memory"]
        assert memory["fine-tune with LoRA"]["float32"] / 1e6 == pytest.approx(850, rel=0.1)
        assert memory["fine-tune all weights"]["float32"] / 1e6 == pytest.approx(974, rel=0.1)

    def test_a_base_model_and_open_questions(self, assets, tmp_path, capsys):
        source = shutil.copytree(assets / "meta/stories260K", tmp_path / "meta")
        parameters = json.loads((source / "params.json").read_text()) | {"use_scaled_rope": True}
        (source / "params.json").write_text(json.dumps(parameters))
        assert "rope_scaling" in run(capsys, "inspect", source)[1].splitlines()[-1]

    def test_the_weights_are_not_read(self, assets, tmp_path, capsys):
        """A file as long as the model of the header, with nothing but zeros after it."""
        data = (assets / GGUF).read_bytes()
        whole = run(capsys, "inspect", assets / GGUF)[1]
        (tmp_path / "holes.gguf").write_bytes(data[:30_000] + bytes(len(data) - 30_000))
        assert run(capsys, "inspect", tmp_path / "holes.gguf")[1].splitlines()[1:12] == whole.splitlines()[1:12]

    def test_a_token_cannot_write_a_line_of_its_own(self, assets, tmp_path, capsys):
        """A hostile vocabulary, whose start token has control characters and line ends."""
        source = shutil.copytree(assets / HUGGING_FACE, tmp_path / "model", ignore=shutil.ignore_patterns("llama2c"))
        evil = "\x1b[2J\nTokenizer\tgood"
        for name in ("tokenizer.json", "tokenizer_config.json"):
            text = (source / name).read_text().replace(json.dumps("<s>"), json.dumps(evil))
            (source / name).write_text(text)
        code, out, _ = run(capsys, "inspect", source)
        assert code == 0 and r"start token     \x1b[2J\nTokenizer\tgood" in out.replace("  start", "start")
        assert out.splitlines().count("Tokenizer") == 1 and "\x1b" not in out
        assert json.loads(run(capsys, "inspect", "--json", source)[1])["tokenizer"]["start_token"] == evil


class TestVerify:
    @pytest.fixture
    def directory(self, assets, tmp_path, capsys):
        run(capsys, "convert", assets / HUGGING_FACE, tmp_path / "model", "--to", "huggingface")
        return tmp_path / "model"

    def test_whole(self, directory, capsys):
        code, out, err = run(capsys, "verify", directory)
        assert (code, err) == (0, "")
        assert "size and SHA-256 as saved" in out and "47 tensors, 260,032 parameters" in out and "512 tokens" in out
        assert run(capsys, "verify", "--quiet", directory) == (0, "", "")

    def test_without_a_manifest(self, assets, capsys):
        code, out, _ = run(capsys, "verify", assets / GGUF)
        assert code == 0 and "no kllama_manifest.json" in out

    def test_the_manifest_beside_a_file_that_it_does_not_list(self, assets, directory, capsys):
        shutil.copy(assets / GGUF, directory / "other.gguf")
        code, out, _ = run(capsys, "verify", directory / "other.gguf")
        assert code == 0 and "as saved" not in out and "no kllama_manifest.json lists it" in out

    def test_one_bit(self, directory, capsys):
        weights = directory / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-100] ^= 1
        weights.write_bytes(data)
        code, out, err = run(capsys, "verify", directory)
        assert (code, out) == (3, "") and "checksum mismatch" in err and "model.safetensors" in err
        (directory / "kllama_manifest.json").unlink()
        assert run(capsys, "verify", directory)[0] == 0
