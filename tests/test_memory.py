"""Calibrations within a limit of memory: the numbers of one without, and what is kept."""

import copy
import weakref

import pytest
import torch
import zoo_inputs
import zoo_models
from resume_cases import CASES, OPTIONS, inputs, reads_disk, same_bits, timeless
from safetensors.torch import load_file
from tiny import batches_for, tiny_llama, tiny_logits, tiny_mixtral, tiny_tokenizer
from transformers import LlamaForCausalLM

from hf_blr import BLRConfig, collect_statistics, compress
from hf_blr.calibration import fisher
from hf_blr.calibration import store as store_module
from hf_blr.calibration.backwards import Backwards
from hf_blr.calibration.fisher import fisher_statistics
from hf_blr.calibration.pieces import in_pieces
from hf_blr.calibration.regression import Regression
from hf_blr.calibration.sequential import SequentialChain
from hf_blr.calibration.store import Kept, Store, StoredTensors, distinct, is_zero, only
from hf_blr.cli import main
from hf_blr.compression import replace
from hf_blr.compression.budget import share_budget
from hf_blr.plan import resolve_plan


# what cannot be run block by block has all of its statistics in memory
@pytest.mark.parametrize("case", [case for case in CASES if case != "whole pass"])
def test_within_a_limit_the_result_is_the_same_to_the_last_bit(case, tmp_path, monkeypatch):
    make, settings = CASES[case]
    model = make()
    config, batches, free = BLRConfig(**{"ratio": 0.6, **settings}), inputs(model), copy.deepcopy(model)
    wanted = compress(free, config, calibration=batches, progress=False)
    passes, files = [], []
    one_pass, write = fisher.statistics_of_piece, torch.save
    monkeypatch.setattr(fisher, "statistics_of_piece", lambda *a, **k: passes.append(a[1]) or one_pass(*a, **k))
    monkeypatch.setattr(torch, "save", lambda tensor, path: files.append(path) or write(tensor, path))
    found = compress(
        model, config, calibration=batches, max_memory="100KB", offload_folder=tmp_path / "files", progress=False
    )
    assert same_bits(free, model) and timeless(found.to_dict()) == timeless(wanted.to_dict())
    if config.fisher:
        # block by block, but where a decoder reads what an encoder puts out
        assert len(passes) > 1 if case == "two chains" else not passes
    assert files and all(str(file).startswith(str(tmp_path / "files")) for file in files)
    assert not any((tmp_path / "files").iterdir())


@pytest.mark.parametrize("fisher", [True, False])
@pytest.mark.parametrize("make", [tiny_llama, tiny_mixtral])
def test_statistics_in_parts_are_those_of_one_pass(make, fisher):
    model = make()
    batches, config = batches_for(model), BLRConfig("low_rank", ratio=0.6, fisher=fisher)
    whole = collect_statistics(model, config, calibration=batches)
    with Store(60_000) as store:
        parts = collect_statistics(model, config, calibration=batches, store=store)
        for one, other in ((whole.grams, parts.grams), (whole.output_grams, parts.output_grams)):
            assert set(one) == set(other)
            assert all(torch.equal(one[name], other[name]) for name in one)
        assert (parts.tokens, parts.unreached, parts.rows) == (whole.tokens, whole.unreached, whole.rows)
        assert store.used == 0


# blocks that run twice, outputs that are views and are written to, stages of other shapes, and plain ones with padding
@pytest.mark.parametrize("name", ["albert", "longformer", "swin", "llama"])
def test_statistics_within_a_limit_have_the_bits_of_those_without(name):
    model, config = zoo_models.build(name), BLRConfig("low_rank", ratio=0.5)
    batches = zoo_inputs.padded_batches(name, zoo_inputs.samples(name, 6), (2, 3, 1))
    free = collect_statistics(model, config, calibration=batches)
    assert set(free.output_grams) == set(free.grams)
    with Store(60_000) as store:
        limited = collect_statistics(model, config, calibration=batches, store=store)
        for one, other in ((free.grams, limited.grams), (free.output_grams, limited.output_grams)):
            assert set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)
        assert (limited.tokens, limited.unreached, limited.rows) == (free.tokens, free.unreached, free.rows)


def test_parts_take_what_is_allowed_and_no_layer_is_left_out():
    model = tiny_llama()
    names = list(resolve_plan(model, BLRConfig("low_rank", ratio=0.6)))
    pieces = in_pieces(model, names, {}, 60_000, output_grams=True)
    assert [name for piece in pieces for name in piece] == names and len(pieces) > 2
    sizes = {name: 4 * (m.in_features**2 + m.out_features**2) for name, m in model.named_modules() if name in names}
    totals = [sum(sizes[name] for name in piece) for piece in pieces]
    assert all(total <= 60_000 for total in totals)
    # the next layer would not have gone in
    assert all(total + sizes[following[0]] > 60_000 for total, following in zip(totals, pieces[1:], strict=False))
    assert len(in_pieces(model, names, {}, 1, output_grams=True)) == len(names)
    labels = dict.fromkeys(names, "one tensor")
    assert in_pieces(model, names, labels, 1, output_grams=True) == [names]


class Held:
    """How many numbers autograd holds on to at once, at most."""

    def __init__(self):
        self.now = self.most = 0

    def keep(self, tensor):
        kept = tensor.detach()
        self.now += tensor.numel()
        self.most = max(self.most, self.now)
        weakref.finalize(kept, self.release, tensor.numel())
        return kept

    def release(self, size):
        self.now -= size


def test_activations_are_not_kept_for_the_backward(monkeypatch):
    model, batches, sizes = tiny_llama(num_hidden_layers=6), [{"input_ids": torch.randint(0, 256, (1, 64))}], {}
    statistics = {}
    names = list(resolve_plan(model, BLRConfig("low_rank", ratio=0.6)))
    for way in ("all", "blocks", "passes"):
        held = Held()
        if way == "passes":
            monkeypatch.setattr(Backwards, "of", lambda *args: None)
        with Store(None if way == "all" else 10**9) as store:
            with torch.autograd.graph.saved_tensors_hooks(held.keep, lambda kept: kept):
                found = fisher_statistics(model, names, batches, store=store)
            statistics[way] = {name: found.output_grams[name].clone() for name in names}
        sizes[way] = held.most
    assert max(sizes["blocks"], sizes["passes"]) < 0.3 * sizes["all"]
    for way in ("blocks", "passes"):
        assert all(torch.equal(statistics[way][name], statistics["all"][name]) for name in names)
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_a_regression_has_read_is_gone_before_it_is_solved(monkeypatch):
    model, reached, left = tiny_llama(), [], []
    inputs_of, targets = SequentialChain.inputs_of, Regression.targets

    def watched(*args):
        found, written = inputs_of(*args)
        reached.extend(weakref.ref(tensor) for tensor in (found, *written.values()))
        return found, written

    def solved(*args):
        left.append(sum(each() is not None for each in reached))
        return targets(*args)

    monkeypatch.setattr(SequentialChain, "inputs_of", watched)
    monkeypatch.setattr(Regression, "targets", solved)
    compress(model, BLRConfig("low_rank", ratio=0.6), calibration=batches_for(model), progress=False)
    assert left and not any(left)


PLACES = {
    "disk": {"": "disk"},
    "mixed": {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    | {f"model.layers.{i}": "disk" for i in range(2)},
}


@pytest.mark.parametrize("place", [pytest.param("disk", marks=reads_disk), "mixed"])
def test_weights_are_read_from_the_checkpoint_as_their_turn_comes(place, tmp_path, monkeypatch):
    tiny_llama().save_pretrained(tmp_path / "dense")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    config, batches = BLRConfig("low_rank", ratio=0.6), batches_for(loaded)
    wanted = compress(loaded, config, calibration=batches, progress=False)
    model = LlamaForCausalLM.from_pretrained(
        tmp_path / "dense", device_map=PLACES[place], offload_folder=tmp_path / "offload"
    )
    names, held, fit = list(resolve_plan(model, config)), [], replace.factorize

    def watched(*args):
        dense = [module for name in names if type(module := model.get_submodule(name)) is torch.nn.Linear]
        held.append(sum(not module.weight.is_meta for module in dense))
        return fit(*args)

    monkeypatch.setattr(replace, "factorize", watched)
    found = compress(model, config, calibration=batches, max_memory="100KB", resume=tmp_path / "run", progress=False)
    assert timeless(found.to_dict()) == timeless(wanted.to_dict())
    # the layer at work, and those that stay dense and were moved
    assert max(held) <= 1 + len(found.left_dense)
    assert torch.equal(tiny_logits(model), tiny_logits(loaded))
    model.save_pretrained(tmp_path / "out")
    assert same_bits(LlamaForCausalLM.from_pretrained(tmp_path / "out"), loaded)


@reads_disk
def test_the_command_line_leaves_weights_in_their_files(tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    limits = ["--max-memory", "100KB", "--offload-folder", str(tmp_path / "files"), "--offload-weights"]
    for out, more in (("plain", []), ("limited", limits)):
        assert main(["compress", str(tmp_path / "dense"), str(tmp_path / out), *OPTIONS, "--device", "cpu", *more]) == 0
    files = [tmp_path / out / "model.safetensors" for out in ("plain", "limited")]
    one, other = map(load_file, files)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert main(["compress", str(tmp_path / "dense"), str(tmp_path / "x"), *OPTIONS, "--device", "cuda", *limits]) == 2
    assert "--offload-weights reads them on the CPU: pass --device cpu" in capsys.readouterr().err


def test_a_store_keeps_as_much_in_memory_as_it_may(tmp_path):
    with Store(100, tmp_path) as store:
        tensors = store.list(torch.full((10,), float(i)) for i in range(4))
        files = list(tmp_path.rglob("*.pt"))
        assert store.used == 80 and len(files) == 2
        assert [int(tensor[0]) for tensor in tensors] == [0, 1, 2, 3]
        assert tensors[0] is tensors[0] and tensors[3] is not tensors[3]
        # the room of what is replaced is there again, and so is that of its file
        tensors[0] = torch.zeros(5)
        tensors[3] = torch.ones(10)
        assert store.used == 100 and len(list(tmp_path.rglob("*.pt"))) == 1
        del tensors[2], tensors
        assert store.used == 0 and not list(tmp_path.rglob("*.pt"))
    assert not any(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("room", [True, False])
def test_what_a_gpu_has_no_room_for_goes_to_the_host_first(room, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "host_has_room", lambda size: room)
    tensors = [torch.full((10,), float(i), device="cuda") for i in range(4)]
    with Store(100, tmp_path) as store:
        kept = store.list(tensors)
        assert store.used == 80 and len(list(tmp_path.rglob("*.pt"))) == (0 if room else 2)
        held = [each._place for each in kept._kept if torch.is_tensor(each._place)]
        assert [place.device.type for place in held] == ["cuda", "cuda"] + ["cpu"] * 2 * room
        assert all(torch.equal(one, other) for one, other in zip(kept, tensors, strict=True))


def test_names_of_one_tensor_share_its_file(tmp_path):
    shared = torch.randn(3, 3)
    with Store(0, tmp_path) as store:
        kept = StoredTensors(store.keep_all({"q": shared, "o": shared + 1, "k": shared}))
        assert len(list(tmp_path.rglob("*.pt"))) == 2
        assert [names for names, _ in distinct(kept)] == [["q", "k"], ["o"]]
        assert list(kept) == ["q", "o", "k"] and torch.equal(kept["k"], shared)
        assert list(only(kept, {"k"})) == list(only(dict(kept), {"k"})) == ["k"]


def test_a_full_disk_is_an_error_of_the_system(tmp_path, monkeypatch):
    def full(*args):
        raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with Store(0, tmp_path) as store, pytest.raises(OSError, match="0.pt cannot be written .unexpected pos"):
        store.keep(torch.zeros(3))


def test_a_budget_reads_each_matrix_from_its_file_once_a_layer(tmp_path, monkeypatch):
    """Of a large model reading is most of the time: 190 GB instead of 50 for one of 8 billion parameters."""
    model, config, read, load = tiny_llama(), BLRConfig("low_rank", ratio=0.6), [], torch.load
    monkeypatch.setattr(torch, "load", lambda path, **how: read.append(path) or load(path, **how))
    with Store(0, tmp_path) as store:
        found = collect_statistics(model, config, calibration=batches_for(model), store=store)
        read.clear()
        share_budget(model, resolve_plan(model, config), found, config)
        kept = [*found.grams.kept.values(), *found.output_grams.kept.values()]
        assert sorted(read) == sorted(each._place for each in kept)


def test_what_a_store_knows_to_be_zero_is_not_read_for_it(tmp_path, monkeypatch):
    with Store(0, tmp_path) as store:
        kept = StoredTensors(store.keep_all({"q": torch.zeros(3), "k": torch.ones(3)}))
        from_elsewhere = StoredTensors({name: Kept(each._place, each._device) for name, each in kept.kept.items()})
        assert [is_zero(from_elsewhere, name) for name in kept] == [True, False]
        monkeypatch.setattr(torch, "load", None)
        assert [is_zero(kept, name) for name in kept] == [True, False]
