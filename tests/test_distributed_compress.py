"""Compressions of which several processes do a part each end as that of one process."""

import os

import pytest
import torch
import torch.distributed as dist
from joined import PROCESSES, join, start_together
from resume_cases import OPTIONS
from tiny import batches_for, tiny_gpt2, tiny_llama, tiny_logits, tiny_mixtral, tiny_t5, tiny_tokenizer
from transformers import LlamaForCausalLM

from hf_blr import BLRConfig, compress
from hf_blr.cli import main
from hf_blr.compression import Journal
from hf_blr.processes import Processes

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

#: three batches of eight, so that the parts differ
CASES = {
    "pivoted": (tiny_llama, {"structure": "pivoted"}),
    "conv1d": (tiny_gpt2, {"structure": "blast", "fit_rounds": 2, "fisher": False, "allocation": "uniform"}),
    "blockwise": (tiny_llama, {"structure": "monarch", "fit_rounds": 2, "sequential": False}),
    "experts": (tiny_mixtral, {"structure": "low_rank"}),
    "two chains": (tiny_t5, {"structure": "low_rank"}),
    "float8": (tiny_llama, {"structure": "low_rank", "factor_format": "fp8", "allocation": "uniform"}),
    "turned": (tiny_llama, {"structure": "low_rank", "turned": True, "allocation": "uniform"}),
}


def inputs(model):
    batches = batches_for(model)
    # an expert that the text of one process does not reach, perhaps
    batches[2] = {"input_ids": batches[2]["input_ids"][:1]}
    if model.config.is_encoder_decoder:
        return [{**batch, "decoder_input_ids": batch["input_ids"][:, :9]} for batch in batches]
    return batches


def compressed(case, **given):
    make, settings = CASES[case]
    model = make()
    report = compress(model, BLRConfig(ratio=0.6, **settings), calibration=inputs(model), progress=False, **given)
    return model, report


def refused(**given):
    try:
        compress(tiny_llama(), **given, distributed=True, progress=False)
    except ValueError as error:
        return str(error)
    return ""


def work(rank, folder):
    join(rank, folder)
    found = {}
    for case in CASES:
        model, report = compressed(case, distributed=True)
        found[case] = model.state_dict(), tiny_logits(model), report.to_dict()
    found["limited"] = compressed("pivoted", distributed=True, max_memory="30KB")[0].state_dict()
    model, config = tiny_llama(), BLRConfig("low_rank", ratio=0.6)
    batches = batches_for(model)
    found["refused"] = [
        refused(config=config, calibration=batches, resume=Journal(f"{folder}/journal")),
        refused(config=BLRConfig("low_rank", ratio=0.6, block_steps=2), calibration=batches),
        refused(config=config, calibration=batches[rank:]),
        refused(config=config, calibration=[batches[0]["input_ids"][:1]]),
    ]
    found["sums"] = sums(rank)
    # as torchrun says it
    os.environ.update(WORLD_SIZE=str(PROCESSES), RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(PROCESSES))
    found["command"] = main(["compress", f"{folder}/dense", f"{folder}/out", *OPTIONS, "--device", "cpu"])
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def sums(rank):
    """What processes make of numbers of their own."""
    together = Processes(joined=True)
    total, column = torch.full((2, 3), float(rank + 1)), torch.arange(6.0).view(2, 3).T * (rank + 1)
    together.add(total)
    together.add(column)
    sent = torch.full((2, 3), float(rank)).to(torch.float8_e4m3fn).T
    together.send(sent, 1)
    return total, column, sent.float(), together.gathered(rank)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each process ended with."""
    folder = str(tmp_path_factory.mktemp("processes"))
    tiny_llama().save_pretrained(f"{folder}/dense")
    tiny_tokenizer().save_pretrained(f"{folder}/dense")
    start_together(work, folder)
    return folder, [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_compress_as_one(case, processes):
    model, report = compressed(case)
    dense = CASES[case][0]()
    (first, logits, said), (second, _, _) = (found[case] for found in processes[1])
    assert list(first) == list(second) == list(model.state_dict())
    assert all(torch.equal(first[name], second[name]) for name in first)
    lost = (tiny_logits(model) - tiny_logits(dense)).norm()
    # rounding in sums, which codes of few bits can turn into other codes
    assert (logits - tiny_logits(model)).norm() < (0.1 if case == "float8" else 2e-3) * lost
    assert {layer["name"] for layer in said["layers"]} == {layer.name for layer in report.layers}
    assert said["calibration_tokens"] == report.calibration_tokens


@pytest.mark.slow
def test_within_a_limit_they_end_with_the_same_bits(processes):
    for found in processes[1]:
        assert all(torch.equal(value, found["limited"][key]) for key, value in found["pivoted"][0].items())


@pytest.mark.slow
def test_what_processes_cannot_share_is_refused_by_all(processes):
    for found in processes[1]:
        journal, steps, other, little = found["refused"]
        assert journal.startswith("resume works in one process alone, got 2")
        assert steps.startswith("block_steps works in one process alone")
        assert "must be the same text in each process" in other
        assert "2 processes share 1 sequences" in little


@pytest.mark.slow
def test_sums_and_what_an_owner_sends(processes):
    for found in processes[1]:
        total, column, sent, ranks = found["sums"]
        assert (total == 3).all() and torch.equal(column, 3 * torch.arange(6.0).view(2, 3).T)
        assert (sent == 1).all() and ranks == [0, 1]


@pytest.mark.slow
def test_the_command_line_writes_one_checkpoint(processes, tmp_path):
    folder, found = processes
    assert [each["command"] for each in found] == [0, 0]
    assert main(["compress", f"{folder}/dense", str(tmp_path / "alone"), *OPTIONS, "--device", "cpu"]) == 0
    alone, together = (LlamaForCausalLM.from_pretrained(place) for place in (tmp_path / "alone", f"{folder}/out"))
    lost = (tiny_logits(alone) - tiny_logits(tiny_llama())).norm()
    assert (tiny_logits(together) - tiny_logits(alone)).norm() < 2e-3 * lost


def test_without_a_group_of_processes_it_is_refused():
    with pytest.raises(ValueError, match="start one process per GPU with torchrun"):
        compress(tiny_llama(), BLRConfig("low_rank", ratio=0.6), distributed=True)


def test_things_are_shared_out_evenly():
    together = Processes()
    together.count = 3
    parts = []
    for together.rank in range(3):
        parts += range(8)[together.share(8)]
    assert parts == list(range(8))
    assert together.owners([1, 8, 2, 3, 3]) == [2, 0, 1, 1, 2]
