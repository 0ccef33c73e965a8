"""How many sequences of a batch go through one backward."""

import pytest
import torch
from tiny import tiny_llama

from hf_blr import BLRConfig
from hf_blr.calibration import collect_statistics, sequences


@pytest.mark.parametrize(
    ("batch", "sizes"),
    [
        ({"input_ids": torch.zeros(80, 30).long()}, [34, 34, 12]),
        ({"input_ids": torch.zeros(3, 2048).long()}, [1, 1, 1]),
        ({"input_ids": torch.zeros(5, 400).long(), "position_ids": torch.arange(400)[None]}, [2, 2, 1]),
        ({"pixel_values": torch.zeros(3, 3, 8, 8)}, [1, 1, 1]),
        # an image's patches are not a row for each sequence
        ({"input_ids": torch.zeros(80, 30).long(), "pixel_values": torch.zeros(7, 3)}, [80]),
    ],
)
def test_short_sequences_go_together(batch, sizes):
    parts = list(sequences.parts_of([batch], torch.nn.Linear(2, 2)))
    assert [sequences.sequences_in(part) for part in parts] == sizes
    for name in batch.keys() - {"position_ids"}:
        assert torch.equal(torch.cat([part[name] for part in parts]), batch[name])


def test_statistics_do_not_depend_on_how_many_go_together(monkeypatch):
    model, ids = tiny_llama(), torch.randint(0, 256, (12, 8), generator=torch.Generator().manual_seed(0))
    config = BLRConfig(ratio=0.5)
    together = collect_statistics(model, config, calibration=[ids])
    monkeypatch.setattr(sequences, "TOKENS", 8)
    alone = collect_statistics(model, config, calibration=[ids])
    assert together.tokens == alone.tokens
    for found, wanted in ((together.grams, alone.grams), (together.output_grams, alone.output_grams)):
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)
