"""A compression that is stopped or killed and begun again: the same to the last bit, and no layer fitted twice."""

import copy
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from resume_cases import CASES, OPTIONS, Killed, inputs, killed_at, same_bits, timeless
from tiny import batches_for, tiny_gpt2, tiny_llama, tiny_tokenizer

from hf_blr import BLRConfig, Statistics, collect_statistics, compress
from hf_blr.calibration import batches as batches_module
from hf_blr.cli import main
from hf_blr.compression import Journal, replace
from hf_blr.compression.allocation import Choice
from hf_blr.compression.journal import files, status_of
from hf_blr.compression.journal import folder as journal_folder
from hf_blr.compression.journal.files import write_tensors
from hf_blr.compression.start import Start
from hf_blr.plan import resolve_plan


def counted_fits(monkeypatch):
    fit, count = replace.factorize, []

    def counting(*args):
        count.append(args[1])
        return fit(*args)

    monkeypatch.setattr(replace, "factorize", counting)
    return count


@pytest.mark.parametrize("case", CASES)
def test_stopped_again_and_again_it_ends_with_the_same_bits(case, tmp_path, monkeypatch):
    make, settings = CASES[case]
    dense = make()
    if case == "whole pass":
        # of blocks that cannot be run alone, all statistics come from the whole model
        monkeypatch.setattr("hf_blr.calibration.trace.MOST_PIECES", 0)
    config, batches = BLRConfig(**{"ratio": 0.6, **settings}), inputs(dense)
    straight, model, stops = copy.deepcopy(dense), None, 0
    wanted = compress(straight, config, calibration=batches, progress=False)
    fits, found = counted_fits(monkeypatch), None
    while found is None:
        model = copy.deepcopy(dense)
        with monkeypatch.context() as patch:
            killed_at(patch, 4, before=stops % 2 == 1)
            try:
                found = compress(model, config, calibration=batches, resume=tmp_path / "journal", progress=False)
            except Killed:
                stops += 1
    assert stops > 1
    assert same_bits(straight, model)
    assert timeless(found.to_dict()) == timeless(wanted.to_dict())
    # what got no name is done again
    assert len(wanted.layers) <= len(fits) <= len(wanted.layers) + stops // 2
    assert not (tmp_path / "journal").exists()


def test_finished_blocks_are_run_through_and_not_looked_at(tmp_path, monkeypatch):
    dense, asked = tiny_llama(), []
    config, batches = BLRConfig("low_rank", ratio=0.6, allocation="uniform", fisher=False), batches_for(dense)
    from hf_blr.calibration.sequential import SequentialChain

    problems = SequentialChain.group_problems
    monkeypatch.setattr(
        SequentialChain, "group_problems", lambda self, *args: asked.append(args[3]) or problems(self, *args)
    )
    with monkeypatch.context() as patch:
        # seven layers and their block, two layers of the next
        killed_at(patch, 10)
        with pytest.raises(Killed):
            compress(copy.deepcopy(dense), config, calibration=batches, resume=tmp_path / "journal", progress=False)
    asked.clear()
    compress(dense, config, calibration=batches, resume=tmp_path / "journal", progress=False)
    second = "model.layers.1."
    assert all(group[0].startswith(second) for group in asked)
    # one of q, k and v was missing
    assert len(asked) == 4


def test_the_file_of_a_refined_block_is_read_once_for_all_of_its_layers(tmp_path, monkeypatch):
    config, batches, paths = BLRConfig("low_rank", ratio=0.6, block_steps=2), batches_for(tiny_llama()), []
    with monkeypatch.context() as patch:
        # a layer of the second block behind the first block
        killed_at(patch, 9)
        with pytest.raises(Killed):
            compress(tiny_llama(), config, calibration=batches, resume=tmp_path, progress=False)
    read = journal_folder.read_tensors
    monkeypatch.setattr(journal_folder, "read_tensors", lambda path: paths.append(path) or read(path))
    compress(tiny_llama(), config, calibration=batches, resume=tmp_path, progress=False)
    # the other time for the report
    assert [path.parent.name for path in paths].count("blocks") == 2


def begun(folder, monkeypatch, **given):
    """A journal with some layers, of a compression that was killed."""
    with monkeypatch.context() as patch:
        killed_at(patch, 2)
        with pytest.raises(Killed):
            compress(given.pop("model"), given.pop("config"), resume=folder, progress=False, **given)


def test_a_journal_of_something_else_is_refused_by_name(tmp_path, monkeypatch):
    folder, dense, config = tmp_path / "journal", tiny_llama(), BLRConfig("low_rank", ratio=0.6)
    batches = batches_for(dense)
    begun(folder, monkeypatch, model=copy.deepcopy(dense), config=config, calibration=batches)

    def refused(match, model=dense, config=config, **given):
        with pytest.raises(ValueError, match=match):
            compress(copy.deepcopy(model), config, resume=folder, progress=False, **{"calibration": batches, **given})

    refused("journal of a compression with another model .weights was '", model=tiny_llama(seed=1))
    refused("with another model .class was 'LlamaForCausalLM', is 'GPT2LMHeadModel'; weights", model=tiny_gpt2())
    refused("with another config .ratio was 0.6, is 0.5.; give the same", config=BLRConfig("low_rank", ratio=0.5))
    refused("with another batches", calibration=batches[:2])
    refused("with another statistics", statistics=collect_statistics(dense, config, calibration=batches))
    monkeypatch.setattr("hf_blr.compression.journal.folder.SOFTWARE", {"journal": 1, "torch": "2.0"})
    refused("with another software .torch was")


def test_text_is_drawn_once_and_text_in_memory_is_known_by_its_content(tmp_path, monkeypatch):
    folder, dense, drawn = tmp_path / "journal", tiny_llama(), []
    text = ["The quick brown fox jumps over the lazy dog, again and again. " * 40]
    load = batches_module.load_windows
    monkeypatch.setattr(batches_module, "load_windows", lambda *a, **k: drawn.append(a) or load(*a, **k))
    settings = {"structure": "low_rank", "ratio": 0.6, "num_samples": 17, "seqlen": 64}
    config, given = BLRConfig(dataset=text, **settings), {"tokenizer": tiny_tokenizer(), "progress": False}
    straight = copy.deepcopy(dense)
    wanted = compress(straight, config, **given)
    drawn.clear()
    begun(folder, monkeypatch, model=copy.deepcopy(dense), config=config, tokenizer=given["tokenizer"])
    other = BLRConfig(dataset=[text[0].upper()], **settings)
    with pytest.raises(ValueError, match="another config .dataset was"):
        compress(copy.deepcopy(dense), other, resume=folder, **given)
    found = compress(dense, config, resume=folder, **given)
    assert len(drawn) == 1 and same_bits(straight, dense)
    assert found.divergence == wanted.divergence and found.held_out_tokens == wanted.held_out_tokens > 0


def test_where_the_fits_begin_is_read_back_as_it_was(tmp_path):
    model, shared = tiny_llama(), torch.randn(4, 4)
    plan = resolve_plan(model, BLRConfig("low_rank", ratio=0.6))
    statistics = Statistics({"q": shared, "k": shared}, {"q": torch.randn(2, 3, 3)}, 7, frozenset({"x"}), {"q": 9})
    start = Start(plan, 0.5, {"q": Choice("low_rank plain", 4.5, 0.1, None, None)}, statistics)
    for find in (lambda: start, None):
        journal = Journal(tmp_path / "journal")
        journal.begin(model, BLRConfig("low_rank", ratio=0.6))
        found = journal.start(find)
        assert (found.plan, found.predicted_loss, found.choices) == (plan, 0.5, start.choices)
        read = found.statistics
        assert (read.tokens, read.unreached, read.rows) == (7, {"x"}, {"q": 9})
        assert torch.equal(read.output_grams["q"], statistics.output_grams["q"])
        assert read.grams.kept["q"] is read.grams.kept["k"] and torch.equal(read.grams["k"], shared)


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else than a journal"):
        Journal(tmp_path)
    (tmp_path / "notes.txt").rename(tmp_path / ".notes")
    with pytest.raises(ValueError, match="holds something else than a journal"):
        Journal(tmp_path)
    with pytest.raises(ValueError, match="holds no journal"):
        status_of(tmp_path)
    with pytest.raises(ValueError, match="cannot keep a journal"):
        Journal(tmp_path / ".notes" / "journal")


def test_a_callers_journal_is_removed_when_the_model_is_saved(tmp_path):
    model = tiny_llama()
    with pytest.raises(OSError, match="disk"), Journal(tmp_path / "journal") as journal:
        compress(model, BLRConfig("low_rank", ratio=0.6), resume=journal, progress=False)
        raise OSError("disk full")
    (tmp_path / "journal" / "notes.txt").write_text("mine")
    with Journal(tmp_path / "journal") as journal:
        again = tiny_llama()
        compress(again, BLRConfig("low_rank", ratio=0.6), resume=journal, progress=False)
    assert same_bits(model, again)
    assert [path.name for path in (tmp_path / "journal").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["start.json", "journal.json", "layers/model.layers.0.self_attn.q_proj.safetensors"])
def test_a_damaged_file_is_named(name, tmp_path, monkeypatch):
    folder, dense, config = tmp_path / "journal", tiny_llama(), BLRConfig("low_rank", ratio=0.6, fisher=False)
    batches = batches_for(dense)
    begun(folder, monkeypatch, model=copy.deepcopy(dense), config=config, calibration=batches)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{name}: cannot be read .*remove"):
        compress(dense, config, calibration=batches, resume=folder, progress=False)


@pytest.mark.parametrize("name", ["start.json", "journal.json"])
@pytest.mark.parametrize(
    "text", ["[]", "{}", "null", "[" * 10_000, '{"plan": 1}'], ids=["list", "dict", "null", "deep", "key"]
)
def test_a_file_that_says_something_else_is_named_by_whoever_reads_it(name, text, tmp_path, monkeypatch):
    folder, dense, config = tmp_path / "journal", tiny_llama(), BLRConfig("low_rank", ratio=0.6, fisher=False)
    begun(folder, monkeypatch, model=copy.deepcopy(dense), config=config, calibration=batches_for(dense))
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}: cannot be read"):
        compress(dense, config, calibration=batches_for(dense), resume=folder, progress=False)
    with pytest.raises(ValueError, match=f"{name}: cannot be read"):
        status_of(folder)


def test_a_full_disk_ends_in_an_error_of_the_system_and_the_rest_stays(tmp_path, monkeypatch):
    folder, dense, config = tmp_path / "journal", tiny_llama(), BLRConfig("low_rank", ratio=0.6)

    def full(*args):
        raise RuntimeError("unexpected pos 64 vs 0")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="grams-0.pt cannot be written .unexpected pos"):
            compress(copy.deepcopy(dense), config, calibration=batches_for(dense), resume=folder, progress=False)
    assert sorted(path.name for path in folder.iterdir()) == ["journal.json", "statistics"]
    # a device that is always full
    monkeypatch.setattr(files, "replacing", lambda path: nullcontext(Path("/dev/full")))
    with pytest.raises(OSError, match="No space left"):
        write_tensors(folder / "text.safetensors", {"x": torch.zeros(2)}, {})


@pytest.fixture
def checkpoint(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    return tmp_path


#: the command line in a process that kills itself with the n-th file it writes
DYING = """
import os, signal, sys
rename, left = os.replace, [int(sys.argv[1])]
def dying(*paths):
    rename(*paths)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = dying
from hf_blr.cli import main
main(sys.argv[2:])
"""


def command(folder, out="out", *more):
    return ["compress", str(folder / "dense"), str(folder / out), *OPTIONS, *more]


def test_the_command_line_goes_on_where_a_process_was_killed(checkpoint, capsys):
    assert main(command(checkpoint, "straight")) == 0
    resume = ["--resume", str(checkpoint / "journal")]
    dying = [sys.executable, "-c", DYING, "18", *command(checkpoint, "out", *resume)]
    assert subprocess.run(dying, capture_output=True).returncode == -signal.SIGKILL
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["compress", "--status", str(checkpoint / "journal")])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "LlamaForCausalLM to low_rank, fitted to builtin" in said and "text: drawn" in said
    assert "3 of " in said and "0 blocks are complete" in said
    assert main(command(checkpoint, "out", *resume)) == 0
    straight, out = (checkpoint / name / "model.safetensors" for name in ("straight", "out"))
    assert straight.read_bytes() == out.read_bytes()
    assert not (checkpoint / "journal").exists()
    with pytest.raises(SystemExit):
        main(["compress", "--status", str(checkpoint / "journal")])
    assert "holds no journal: none was begun there, or its compression is complete" in capsys.readouterr().err
