"""Images and sounds to calibrate with: data sets, streams, folders, loaders, through the model's processor."""

import pytest
import torch
from tiny import tiny_bert, tiny_llama, tiny_llava, tiny_tokenizer, tiny_vit
from transformers import (
    BatchFeature,
    CLIPImageProcessorPil,
    LlavaProcessor,
    ViTImageProcessorPil,
    Wav2Vec2FeatureExtractor,
)
from zoo_inputs import samples
from zoo_models import build

from hf_blr import BLRConfig, collect_statistics, compress
from hf_blr.calibration.given import given_batches
from hf_blr.calibration.media import media_batches

Image = pytest.importorskip("PIL.Image")
CONFIG = BLRConfig("low_rank", ratio=0.6, num_samples=10)
SIZE = {"height": 16, "width": 16}


def pictures(count=12):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 20, 24, 3), dtype=torch.uint8, generator=generator)
    return [Image.fromarray(each.numpy()) for each in pixels]


def image_set(**columns):
    datasets = pytest.importorskip("datasets")
    features = {"image": datasets.Image(), **{key: datasets.Value("string") for key in columns}}
    return datasets.Dataset.from_dict({"image": pictures(), **columns}, features=datasets.Features(features))


def sound_set(rate=16000, count=10):
    datasets = pytest.importorskip("datasets")
    generator = torch.Generator().manual_seed(0)
    sounds = [torch.randn(100 + 20 * i, generator=generator).tolist() for i in range(count)]
    return datasets.Dataset.from_dict({"sound": [{"array": each, "sampling_rate": rate} for each in sounds]})


def vit_processor():
    return ViTImageProcessorPil(size=SIZE)


@pytest.mark.parametrize("form", ["data set", "stream", "folder", "path"])
def test_images_are_those_that_the_processor_makes(form, tmp_path):
    for i, picture in enumerate(pictures()):
        (tmp_path / str(i % 2)).mkdir(exist_ok=True)
        picture.save(tmp_path / str(i % 2) / f"{i}.PNG")
    (tmp_path / "notes.txt").write_text("no image")
    given = {"folder": str(tmp_path), "path": tmp_path}.get(form)
    if given is None:
        given = image_set() if form == "data set" else image_set().to_iterable_dataset()
    batches = media_batches(given, vit_processor(), 10, seed=0)
    assert [len(batch["pixel_values"]) for batch in batches] == [8, 2]
    found = torch.cat([batch["pixel_values"] for batch in batches])
    right = vit_processor()(images=pictures(), return_tensors="pt")["pixel_values"]
    # each of the ten is another one of the twelve
    nearest = torch.cdist(found.flatten(1), right.flatten(1)).min(1)
    assert nearest.values.max() < 1e-3 and len(set(nearest.indices.tolist())) == 10
    other = media_batches(given, vit_processor(), 10, seed=1)[0]["pixel_values"]
    assert not torch.equal(other, batches[0]["pixel_values"])


def test_a_model_of_images_is_compressed_with_them():
    report = compress(tiny_vit(), CONFIG, tokenizer=vit_processor(), calibration=image_set(), progress=False)
    assert report.fitted_to == "activations" and report.predicted_loss > 0
    half = collect_statistics(tiny_vit().half(), CONFIG, tokenizer=vit_processor(), calibration=image_set())
    assert not half.unreached


def test_images_come_with_what_is_said_of_them():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.image_token, tokenizer.image_token_id = "<image>", 257
    template = "{% for m in messages %}{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}"
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=SIZE, crop_size=SIZE),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template + "{% endfor %}{% endfor %}",
    )
    batches = media_batches(image_set(caption=["one", "another"] * 6), processor, 4, seed=0)
    ids = batches[0]["input_ids"]
    assert (ids == 257).sum(1).tolist() == [4] * 4 and batches[0]["attention_mask"].shape == ids.shape
    assert "one" in tokenizer.decode(ids[0]) or "another" in tokenizer.decode(ids[0])
    model = tiny_llava()
    model.config.image_token_id = 256
    model.resize_token_embeddings(258)
    model.config.image_token_id = 257
    statistics = collect_statistics(
        model, CONFIG, tokenizer=processor, calibration=image_set(caption=["one", "another"] * 6)
    )
    assert not statistics.unreached


def test_sounds_are_padded_and_masked():
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    batches = media_batches(sound_set(), extractor, 10, seed=0)
    assert [len(batch["input_values"]) for batch in batches] == [8, 2]
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in batches])
    assert sorted(lengths.tolist()) == [100 + 20 * i for i in range(10)]
    statistics = collect_statistics(build("wav2vec2"), CONFIG, tokenizer=extractor, calibration=sound_set())
    assert not statistics.unreached and statistics.output_grams


REFUSED = {
    "no processor": (image_set, None, r"need a processor: pass the model's own as tokenizer=AutoProcessor"),
    "a tokenizer": (image_set, tiny_tokenizer, "tokenizer= is a .*, which reads text: pass the model's own"),
    "another rate": (lambda: sound_set(8000), Wav2Vec2FeatureExtractor, r"at \[8000\] Hz.*takes 16000: resample"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_with_what_to_do(case):
    given, processor, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        compress(tiny_vit(), CONFIG, tokenizer=processor and processor(), calibration=given())


def test_a_folder_without_images_and_a_set_of_text_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is no folder with images"):
        compress(tiny_vit(), CONFIG, tokenizer=vit_processor(), calibration=tmp_path)
    datasets = pytest.importorskip("datasets")
    text = datasets.Dataset.from_dict({"text": ["some", "words"]})
    with pytest.raises(TypeError, match=r"holds text under 'text': give text as BLRConfig\(dataset="):
        compress(tiny_bert(), CONFIG, tokenizer=tiny_tokenizer(), calibration=text)


def test_loaders_generators_and_features_are_read_once():
    ids = torch.arange(32).view(4, 8)
    loader = torch.utils.data.DataLoader([{"input_ids": row} for row in ids], batch_size=2)
    for given in (loader, ({"input_ids": part} for part in ids.split(2)), [BatchFeature({"input_ids": ids})]):
        batches = given_batches(given)
        assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), ids)
    report = compress(tiny_llama(), CONFIG, calibration=iter(ids.split(2)), progress=False)
    assert report.calibration_tokens == 32
    (one, *_), model = samples("clip"), build("clip")
    assert not collect_statistics(model, CONFIG, calibration=(each for each in [one])).unreached
