"""The command line, as a user types it, on a tiny model in a folder."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tiny import tiny_bert, tiny_llama, tiny_llava, tiny_t5, tiny_tokenizer, tiny_vit
from transformers import AutoModelForCausalLM, Wav2Vec2FeatureExtractor
from zoo_models import build

from hf_blr.cli import COMMANDS, main
from hf_blr.cli.options import add_device, block_counts
from hf_blr.linear import blr_modules
from hf_blr.markdown import format_table
from hf_blr.plan import plan_from_layers
from hf_blr.structures.blast.layer import BlastLinear
from hf_blr.targets import find_targets


@pytest.fixture
def dense(tmp_path):
    folder = tmp_path / "dense"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text("A line about one thing, then a line about another. " * 60)
    return str(folder), str(text)


def compress(dense, out, *more):
    folder, text = dense
    common = ["--ratio", "0.5", "--num-blocks", "4x4", "--dataset", text, "--seqlen", "32", "--num-samples", "8"]
    return main(["compress", folder, str(out), *common, *more])


def test_compress_evaluate_finetune_inspect(dense, tmp_path, capsys):
    folder, text = dense
    out, tuned = tmp_path / "out", tmp_path / "tuned"
    assert compress(dense, out, "--json", str(tmp_path / "c.json")) == 0
    result = json.loads((tmp_path / "c.json").read_text())
    report = result["report"]
    assert len(report["layers"]) + len(report["left_dense"]) == 14 and result["config"]["num_blocks"] == [4, 4]
    assert result["environment"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert "2 x q_proj" in printed and f"{len(report['layers'])} layers" in printed

    evaluate = ["evaluate", folder, str(out), "--dataset", text, "--seqlen", "64", "--json", str(tmp_path / "e.json")]
    assert main(evaluate) == 0
    rows = json.loads((tmp_path / "e.json").read_text())["rows"]
    assert rows[1]["parameters"] < rows[0]["parameters"] and rows[1]["ppl"] != rows[0]["ppl"]
    assert "bits a weight" in capsys.readouterr().out
    assert main(["inspect", str(out)]) == 0 and rows[0]["bits"] == 32
    assert f"{rows[1]['bits']:.2f} bits a weight" in capsys.readouterr().out

    train = [
        "--dataset",
        text,
        "--steps",
        "6",
        "--seqlen",
        "32",
        "--lr",
        "3e-3",
        "--teacher",
        folder,
        "--gradient-checkpointing",
    ]
    assert main(["finetune", str(out), str(tuned), *train, "--json", str(tmp_path / "f.json")]) == 0
    history = json.loads((tmp_path / "f.json").read_text())
    assert history["after"]["ppl"] < history["before"]["ppl"]
    assert any("distill_loss" in entry for entry in history["history"])
    loaded = AutoModelForCausalLM.from_pretrained(tuned)
    assert isinstance(loaded.model.layers[0].mlp.up_proj, BlastLinear)

    capsys.readouterr()
    assert main(["inspect", str(tuned)]) == 0
    printed = capsys.readouterr().out
    assert "down_proj" in printed and "4 x 4" in printed and f"{len(report['layers'])} layers hold" in printed
    assert main(["inspect", folder]) == 0
    assert "not compressed" in capsys.readouterr().out


@pytest.fixture
def classifier(dense, tmp_path):
    folder = tmp_path / "classifier"
    model = tiny_bert()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model, (str(folder), dense[1])


def test_a_classifier_keeps_its_head(classifier, tmp_path, capsys):
    model, dense = classifier
    out = tmp_path / "out"
    assert main(["inspect", dense[0]]) == 0
    layers = sum(model.get_submodule(name).weight.numel() for name in find_targets(model))
    assert f"{100 * layers / model.num_parameters():.1f} % of its" in capsys.readouterr().out
    assert compress(dense, out) == 0
    assert f"{type(model).__name__}.from_pretrained" in capsys.readouterr().out
    loaded = type(model).from_pretrained(out)
    assert blr_modules(loaded) and torch.equal(loaded.classifier.weight, model.classifier.weight)
    for command in (["evaluate", str(out)], ["finetune", str(out), str(tmp_path / "tuned")]):
        assert main([*command, "--dataset", dense[1], "--seqlen", "32"]) == 2
        assert "takes causal language models" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["images", "nothing", "text"])
def test_a_model_of_images_keeps_its_class_and_processor(given, tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    # of older releases this is the one without torchvision
    processor = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor
    model, folder, images, out = tiny_vit(), tmp_path / "vit", tmp_path / "images", tmp_path / "out"
    model.save_pretrained(folder)
    processor(size={"height": 16, "width": 16}).save_pretrained(folder)
    images.mkdir()
    for number in range(4):
        image.new("RGB", (16, 16), (60 * number, 40, 250 - 50 * number)).save(images / f"{number}.png")
    options = {"images": ["--images", str(images)], "nothing": [], "text": ["--dataset", "builtin"]}[given]
    found = main(["compress", str(folder), str(out), "--structure", "low_rank", "--ratio", "0.6", *options])
    said = capsys.readouterr()
    if given == "text":
        assert found == 2 and "ViTForImageClassification does not run on text alone" in said.err
        return
    assert found == 0 and ("fitted to activations" if given == "images" else "fitted to weights") in said.out
    loaded = type(model).from_pretrained(out)
    assert blr_modules(loaded) and torch.equal(loaded.classifier.weight, model.classifier.weight)
    assert processor.from_pretrained(out).size == {"height": 16, "width": 16}


@pytest.mark.parametrize("files", ["a feature extractor", "none"])
def test_a_model_of_sounds_keeps_its_class_with_whatever_reads_for_it(files, tmp_path):
    model, folder, out = build("wav2vec2"), tmp_path / "dense", tmp_path / "out"
    model.save_pretrained(folder)
    if files != "none":
        Wav2Vec2FeatureExtractor(sampling_rate=8000).save_pretrained(folder)
    assert main(["compress", str(folder), str(out), "--structure", "low_rank", "--ratio", "0.6"]) == 0
    loaded = type(model).from_pretrained(out)
    assert blr_modules(loaded) and torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    if files != "none":
        assert Wav2Vec2FeatureExtractor.from_pretrained(out).sampling_rate == 8000


def test_an_encoder_decoder_keeps_its_class_and_is_fitted_to_text(dense, tmp_path, capsys):
    folder, out = tmp_path / "t5", tmp_path / "out"
    tiny_t5().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    assert compress((str(folder), dense[1]), out) == 0
    assert "T5ForConditionalGeneration.from_pretrained" in capsys.readouterr().out
    assert blr_modules(type(tiny_t5()).from_pretrained(out))


def test_a_dtype_is_named_as_pytorch_names_it(dense, tmp_path, capsys):
    with pytest.raises(SystemExit):
        compress(dense, tmp_path / "out", "--dtype", "bf16")
    assert "--dtype: expected float32, bfloat16, float16 or auto, got 'bf16'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(dense, tmp_path, capsys):
    assert compress(dense, tmp_path / "out", "--device", "cuda") == 2
    assert "--device cuda: this build of PyTorch sees no GPU here" in capsys.readouterr().err


def test_images_without_a_processor_are_refused(tmp_path, capsys):
    tiny_vit().save_pretrained(tmp_path / "vit")
    command = ["compress", str(tmp_path / "vit"), str(tmp_path / "out"), "--ratio", "0.5", "--images", str(tmp_path)]
    assert main(command) == 2
    assert "go through the model's processor, which lies not beside it" in capsys.readouterr().err


def test_a_program_that_is_not_installed_is_named(capsys):
    assert main(["run", "no_such_program.main", "--flag"]) == 2
    assert "no_such_program.main is no Python module of this environment: install" in capsys.readouterr().err


def test_text_and_images_at_once_are_refused(dense, tmp_path, capsys):
    assert compress(dense, tmp_path / "out", "--images", str(tmp_path)) == 2
    assert "takes the place of --dataset" in capsys.readouterr().err


def test_the_device_is_found_where_none_is_named():
    parser = argparse.ArgumentParser()
    add_device(parser)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    assert parser.parse_args([]).device == parser.parse_args(["--device", "auto"]).device == found
    assert parser.parse_args(["--device", "cuda:1"]).device == "cuda:1"


def test_a_model_of_text_and_images_is_evaluated_on_text(dense, tmp_path):
    folder, text = tmp_path / "llava", dense[1]
    tiny_llava().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    assert main(["evaluate", str(folder), "--dataset", text, "--seqlen", "32"]) == 0


def test_an_encoder_decoder_has_no_perplexity(dense, tmp_path, capsys):
    folder, text = tmp_path / "t5", dense[1]
    tiny_t5().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    assert main(["evaluate", str(folder), "--dataset", text, "--seqlen", "32"]) == 2
    assert "takes causal language models" in capsys.readouterr().err


@pytest.mark.parametrize("stored", [[], ["--factor-format", "int4"]], ids=["numbers", "bits"])
def test_training_stops_where_other_text_gains_nothing_and_keeps_what_was_best(dense, tmp_path, stored, capsys):
    out, tuned, other, file = tmp_path / "out", tmp_path / "tuned", tmp_path / "other.txt", tmp_path / "f.json"
    other.write_text("def power(x, n):\n    return x**n if n else 1\n" * 60)
    assert compress(dense, out, *stored) == 0
    train = ["--dataset", dense[1], "--steps", "40", "--seqlen", "32", "--lr", "30", "--json", str(file)]
    held_out = ["--held-out", str(other), "--teacher", dense[0]]
    assert main(["finetune", str(out), str(tuned), *train, *held_out]) == 0
    found = json.loads(file.read_text())
    seen = {row["step"]: row["held_out_divergence"] for row in found["history"] if "held_out_divergence" in row}
    # three looks, four steps apart, after the one before the training
    assert list(seen) == [0, 4, 8, 12] and seen[0] == min(seen.values())
    assert found["after"]["ppl"] == found["before"]["ppl"]
    assert f"{seen[0]:.4f} before, {seen[0]:.4f} after" in capsys.readouterr().out
    for alone in (held_out[:2], ["--distill-weight", "0.9"]):
        assert main(["finetune", str(out), str(tuned), *train, *alone, "--overwrite"]) == 2
        assert f"{alone[0]} " in (said := capsys.readouterr().err) and "name it as --teacher" in said


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [[], ["--dtype", "bfloat16"]], ids=["default", "bfloat16"])
def test_a_bfloat16_checkpoint_trains_in_float32_and_stays_bfloat16(dense, tmp_path, dtype):
    out, tuned, file = tmp_path / "out", tmp_path / "tuned", tmp_path / "f.json"
    assert compress(dense, out, "--dtype", "bfloat16") == 0
    train = ["--dataset", dense[1], "--steps", "20", "--seqlen", "32", "--lr", "3e-4", "--json", str(file)]
    assert main(["finetune", str(out), str(tuned), *train, *dtype]) == 0
    found = json.loads(file.read_text())
    # factors that round each step to bfloat16 come to 0.65
    assert found["after"]["ppl"] < 0.55 * found["before"]["ppl"]
    assert AutoModelForCausalLM.from_pretrained(tuned, dtype="auto").dtype == torch.bfloat16


def test_weights_alone_need_no_text_and_no_tokenizer(dense, tmp_path, capsys):
    for file in Path(dense[0]).glob("tokenizer*"):
        file.unlink()
    command = ["compress", dense[0], str(tmp_path / "o"), "--structure", "low_rank", "--rank", "4", "--dataset"]
    assert main([*command, dense[1]]) == 2
    assert f"{dense[0]} holds no tokenizer: save the model's there" in capsys.readouterr().err
    assert main([*command, "none"]) == 0
    stored = json.loads((tmp_path / "o" / "config.json").read_text())["quantization_config"]
    assert stored["dataset"] is None and stored["rank"] == 4


BITS = ["--bits-per-weight", "4"]


@pytest.mark.slow
@pytest.mark.parametrize("budget", [["--ratio", "0.5"], ["--parameters", "0.03"], ["--mb", "0.1"], BITS])
def test_a_plan_is_written_edited_and_followed(dense, tmp_path, capsys, budget):
    folder, text = dense
    file = tmp_path / "plan.json"
    on_text = ["--dataset", text, "--seqlen", "32", "--num-samples", "8"]
    assert main(["plan", folder, str(file), "--structure", "auto", *budget, *on_text]) == 0
    assert "Predicted rise of the loss" in capsys.readouterr().out
    plan = json.loads(file.read_text())
    assert plan["predicted_loss"] > 0
    layers = plan_from_layers(plan["layers"])
    specs = {name: layer.spec for name, layer in layers.items()}
    if budget == BITS:
        bits = [8 * layer.storage.num_bytes(layer.spec, torch.float32) for layer in layers.values()]
        assert len(bits) == 14 and sum(bits) <= 4 * sum(spec.dense_parameters for spec in specs.values())
    if budget[0] == "--parameters":
        assert sum(spec.num_parameters for spec in specs.values()) <= 30000
    dropped = next(iter(plan["layers"]))
    del plan["layers"][dropped]
    file.write_text(json.dumps(plan))
    out = tmp_path / "out"
    assert main(["compress", folder, str(out), "--plan", str(file), *on_text]) == 0
    stored = json.loads((out / "config.json").read_text())["quantization_config"]
    assert stored["layers"] == plan["layers"]
    assert main(["plan", folder, str(file), *budget, *on_text]) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    # layers this small are fastest dense
    assert main(["plan", folder, str(tmp_path / "ms.json"), "--ms", "1", *on_text]) == 2
    assert "as they are, dense" in capsys.readouterr().err
    assert main(["plan", folder, str(tmp_path / "ms.json"), *on_text]) == 2
    assert "a plan needs a budget" in capsys.readouterr().err
    file.write_text("{}")
    assert main(["compress", folder, str(tmp_path / "none"), "--plan", str(file), *on_text]) == 2
    assert "is no plan" in capsys.readouterr().err


@pytest.mark.slow
def test_a_plan_within_bits_and_milliseconds(dense, tmp_path, capsys):
    folder, text = dense
    on_text = ["--structure", "auto", "--dataset", text, "--seqlen", "32", "--num-samples", "8", "--target-modules"]
    on_text += ["q_proj", "--rounds", "2", "--bits-per-weight", "9", "--tokens", "1"]
    assert main(["plan", folder, str(tmp_path / "plan.json"), *on_text, "--ms", "1"]) == 0
    assert main(["plan", folder, str(tmp_path / "none.json"), *on_text, "--ms", "1e-9"]) == 2
    assert "fastest options take" in capsys.readouterr().err
    assert main(["plan", folder, str(tmp_path / "third.json"), "--ms", "1", "--mb", "1", *on_text[:8]]) == 2
    assert "--ms stands alone or beside --bits-per-weight" in capsys.readouterr().err


def test_a_budget_of_bits_may_be_named_in_mb(dense, tmp_path, capsys, monkeypatch):
    folder, text = dense
    seen = []

    def stops(model, plan, statistics, config, time):
        seen.append(config.bits_per_weight)
        raise ValueError("that will do")

    monkeypatch.setattr("hf_blr.compression.bits.share_bits", stops)
    on_text = ["--dataset", text, "--seqlen", "32", "--num-samples", "8", "--target-modules", "q_proj"]
    # two matrices of 64 x 64
    budget = ["--structure", "auto", "--stored-mb", "0.004096"]
    assert main(["plan", folder, str(tmp_path / "plan.json"), *budget, *on_text]) == 2
    assert seen == [pytest.approx(4.0)] and "that will do" in capsys.readouterr().err
    assert main(["plan", folder, str(tmp_path / "plan.json"), "--stored-mb", "1", *on_text]) == 2
    assert 'set structure="auto"' in capsys.readouterr().err


def test_an_output_that_holds_a_model_is_kept(dense, tmp_path, capsys):
    out = tmp_path / "out"
    assert compress(dense, out) == 0
    before = (out / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert compress(dense, out, "--structure", "monarch") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == before
    assert compress(dense, out, "--structure", "monarch", "--overwrite") == 0
    assert (out / "model.safetensors").read_bytes() != before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ratio", "1.5"], "ratio"),
        (["--ratio", "0.5", "--target-modules", "query"], "match no linear layer"),
        (["--ratio", "0.5", "--num-blocks", "7"], "choose from"),
        (["--ratio", "0.5", "--dataset", "no-such-file.txt"], "no-such-file.txt"),
        (["--ratio", "0.5", "--max-memory", "6XB"], "6XB"),
    ],
)
def test_mistakes_end_in_one_line(dense, tmp_path, capsys, arguments, message):
    assert main(["compress", dense[0], str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hf-blr compress: error:") and message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["below a file", "no permission"])
@pytest.mark.parametrize(
    "command",
    [
        ["compress", "MODEL", "OUT", "--ratio", "0.5"],
        ["compress", "MODEL", "free", "--ratio", "0.5", "--json", "OUT"],
        ["finetune", "MODEL", "OUT"],
        ["finetune", "MODEL", "free", "--json", "OUT"],
        ["demo", "--model", "MODEL", "--output", "OUT"],
        ["demo", "--model", "MODEL", "--output", "free", "--json", "OUT"],
        ["plan", "MODEL", "OUT", "--ratio", "0.5"],
        ["evaluate", "MODEL", "--json", "OUT"],
        ["bench", "layers", "--json", "OUT"],
        ["report", "MODEL", "--out", "OUT"],
    ],
    ids=" ".join,
)
def test_a_place_that_cannot_be_written_is_noticed_first(command, place, tmp_path, capsys, monkeypatch):
    # neither the model nor the result files are there to be read
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    out = tmp_path / "file" / "out"
    if place == "no permission":
        out = tmp_path / "new" / "out"

        def refuse(path, *args):
            raise PermissionError(13, "Permission denied", str(path))

        # permissions do not stop a superuser, as whom tests often run
        monkeypatch.setattr(Path, "write_bytes", refuse)
        monkeypatch.setattr(Path, "write_text", refuse)
    assert main([str(out) if word == "OUT" else word for word in command]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    why = "Permission denied" if place == "no permission" else "Not a directory"
    assert lines[-1].startswith(f"hf-blr {command[0]}: error: {out} cannot be written")
    assert why in lines[-1] and "name a place that can be" in lines[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_is_no_file_is_not_replaced(tmp_path, capsys):
    for command in (["inspect", "MODEL", "--json"], ["plan", "MODEL", "--ratio", "0.5", "--overwrite"]):
        assert main([*command, str(tmp_path)]) == 2
        assert f"{tmp_path} is no file that could be replaced" in capsys.readouterr().err


def test_no_folder_and_no_hub(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["inspect", str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err


@pytest.mark.parametrize("command", [c.__name__.rpartition(".")[2] for c in COMMANDS])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "usage: hf-blr" in capsys.readouterr().out


@pytest.mark.slow
def test_run_gives_another_program_the_loader(dense, tmp_path):
    out = tmp_path / "out"
    compress(dense, out)
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nfrom transformers import AutoModelForCausalLM\n"
        "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1]).model.layers[0].mlp.up_proj).__name__)\n"
    )
    command = [sys.executable, "-m", "hf_blr", "run", "program", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=None)
    assert done.stdout.strip().endswith("BlastLinear"), done.stderr


def test_block_counts():
    assert block_counts("4") == (4, 4) and block_counts("4x16") == (4, 16)
    with pytest.raises(Exception, match="4x16"):
        block_counts("four")


def test_tables_are_markdown():
    table = format_table([{"model": "a", "ppl": 12.3456}, {"model": "bb", "ppl": None}])
    assert table.splitlines() == ["| model |   ppl |", "| ----- | ----: |", "| a     | 12.35 |", "| bb    |       |"]
