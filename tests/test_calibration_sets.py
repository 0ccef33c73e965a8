"""Windows of a mixture are drawn as its shares and the seed say."""

import protocol
import pytest
import torch
from calibration_sets import Calibration, Mixture
from tiny import tiny_llama

#: parts whose tokens say whose they are, and which window
PARTS = {name: 100 * i + torch.arange(20)[:, None].expand(20, 8) for i, name in enumerate(("web", "own"))}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(protocol, "BATCH", 4)


def draw(*shares, seed=0, parts=PARTS):
    return Calibration.draw(tiny_llama(), parts, Mixture.parse(list(shares)), seed, 16, 8)


def test_shares_decide_how_many_windows_come_from_each_part():
    drawn = draw("web=0.25", "own=0.75")
    assert drawn.counts == {"web": 4, "own": 12} and drawn.windows.shape == (16, 8)
    assert (drawn.windows[:, 0] < 100).sum() == 4
    # no window twice, and parts are mixed
    assert len(set(drawn.windows[:, 0].tolist())) == 16
    assert drawn.windows[:, 0].tolist() != sorted(drawn.windows[:, 0].tolist())
    assert torch.equal(torch.cat(drawn.batches), drawn.windows)


def test_the_seed_decides_which():
    assert torch.equal(draw("web").windows, draw("web").windows)
    assert draw("web").facts()["calibration_sha256"] == draw("web").facts()["calibration_sha256"]
    assert set(draw("web").windows[:, 0].tolist()) != set(draw("web", seed=1).windows[:, 0].tolist())


def test_a_short_part_gives_what_it_has_and_only_whole_batches_are_kept():
    drawn = draw("web=0.5", "own=0.5", parts={"web": PARTS["web"][:5], "own": PARTS["own"].flatten()[:-3]})
    assert drawn.counts["web"] + drawn.counts["own"] == 12 == len(drawn.windows)
    assert drawn.facts()["calibration_tokens"] == 96


def test_mixtures_have_one_name_whatever_their_order():
    assert Mixture.parse(["web=0.25", "own=0.75"]).label == Mixture.parse(["own=0.75", "web=0.25"]).label
    assert Mixture.parse(["web"]).label == Mixture.parse(["web=1"]).label == "web"


@pytest.mark.parametrize("items", [["web=0.5"], ["web", "own"], ["web=1.5", "own=-0.5"], ["web=half"]])
def test_shares_that_are_none_are_refused(items):
    with pytest.raises(ValueError, match="calibration set"):
        Mixture.parse(items)


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="no calibration part 'code'; there are .'own', 'web'."):
        draw("code")
    with pytest.raises(ValueError, match=r"windows \[n, 8\] or ids \[tokens\], got shape \[2, 9\]"):
        draw("web", parts={"web": torch.zeros(2, 9)})
    with pytest.raises(ValueError, match="'web' needs 4 windows of 8 tokens at least, got 3"):
        draw("web", parts={"web": PARTS["web"][:3]})


def test_held_out_windows_are_in_neither_the_fit_nor_the_training():
    mixture = Mixture.parse(["web=0.5", "own=0.5"])
    drawn = Calibration.draw(tiny_llama(), PARTS, mixture, 0, 16, 8, training=64, held_out=8)
    first = [set(windows[:, 0].tolist()) for windows in (drawn.windows, drawn.training, drawn.held_out)]
    assert len(first[2]) == 8 and sum(i < 100 for i in first[2]) == 4
    assert not first[2] & (first[0] | first[1])
    # nothing else is missing, and the fit is what it is without them
    assert first[0] | first[1] | first[2] == {*range(20), *range(100, 120)}
    assert torch.equal(drawn.windows, draw(*("web=0.5", "own=0.5")).windows)
