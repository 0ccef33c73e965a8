"""A training step of two processes, each with half of the batch, equals one process's step on all of it: DDP, FSDP2."""

import pytest
import torch
import torch.distributed as dist
from joined import PROCESSES, join, start_together
from tiny import tiny_llama
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_blr import BLRConfig, compress
from hf_blr.integration import blr_modules
from hf_blr.structures import structures

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

BATCH = torch.randint(0, 256, (2 * PROCESSES, 12), generator=torch.Generator().manual_seed(0))


def model_for(structure):
    """The same in each process, float64 as far as the model computes in it."""
    model = tiny_llama()
    compress(model, BLRConfig(structure, ratio=0.6, fit_rounds=2), progress=False)
    return model.double().train()


def step(model, batch):
    """One step of gradient descent: unlike Adam's, it is as long as the gradient."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
    optimizer.step()


def factors_of(model):
    return {
        f"{name}.{factor}": value.detach().clone()
        for name, module in blr_modules(model).items()
        for factor, value in module.factors().items()
    }


def indices_of(model):
    return {name: {k: v.clone() for k, v in module.indices().items()} for name, module in blr_modules(model).items()}


def work(rank, folder):
    """One of the processes; the factors and indices of all its models go to a file."""
    join(rank, folder)
    found = {}
    for structure in structures():
        model = model_for(structure)
        if rank:
            # what is not the first process's must not count
            with torch.no_grad():
                for module in blr_modules(model).values():
                    for tensor in module.tensors().values():
                        tensor.zero_()
        step(DistributedDataParallel(model), BATCH.chunk(PROCESSES)[rank])
        found[structure] = factors_of(model), indices_of(model), sharded_step(structure, rank)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def sharded_step(structure, rank):
    """The factors after a step on parameters of which each process holds a part."""
    model, mesh = model_for(structure), init_device_mesh("cpu", (PROCESSES,))
    for block in (*model.model.layers, model):
        fully_shard(block, mesh=mesh)
    step(model, BATCH.chunk(PROCESSES)[rank])
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {name: whole[name] for name in factors_of(model)}


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """{structure: (factors, indices)} of each process after its step."""
    folder = str(tmp_path_factory.mktemp("processes"))
    start_together(work, folder)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(PROCESSES)]


def largest_error(before, steps, expected):
    """Of any factor's change, relative to the size of the change that is expected."""
    return max(
        ((steps[name] - expected[name]).norm() / (expected[name] - before[name]).norm()).item() for name in expected
    )


@pytest.mark.slow
@pytest.mark.parametrize("structure", structures())
def test_two_processes_step_as_one(structure, processes):
    model = model_for(structure)
    before, indices = factors_of(model), indices_of(model)
    step(model, BATCH)
    expected = factors_of(model)
    for found in processes:
        factors, found_indices, sharded = found[structure]
        assert factors.keys() == sharded.keys() == expected.keys()
        # the model's norms and rotations round to float32
        assert max(largest_error(before, after, expected) for after in (factors, sharded)) < 1e-5
        for name, of_module in indices.items():
            assert all(torch.equal(found_indices[name][k], v) for k, v in of_module.items())
    # bit for bit the same in both, or they would drift apart
    for name in expected:
        assert torch.equal(*(found[structure][0][name] for found in processes))
    # half of the batch alone is another step
    alone = model_for(structure)
    step(alone, BATCH.chunk(PROCESSES)[0])
    assert largest_error(before, factors_of(alone), expected) > 0.1
