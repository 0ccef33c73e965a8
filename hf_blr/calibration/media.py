"""Images and sounds as calibration batches, read by the model's own processor."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from hf_blr.calibration.calls import Batch

#: samples of one calibration forward
SAMPLES_PER_FORWARD = 8
#: columns of what stands beside an image or a sound, in this order of preference
TEXT_COLUMNS = ("text", "caption", "sentence", "transcription")
#: what tokenizers put out, and processors of images or sounds do not stop at
OF_TEXT = {"input_ids", "attention_mask", "token_type_ids", "position_ids"}
PASS_PROCESSOR = "pass the model's own as tokenizer=AutoProcessor.from_pretrained(name)"


def holds_media(calibration: object) -> bool:
    """Whether this is a folder, or a data set of `datasets` with a column of images or sounds."""
    if isinstance(calibration, Path):
        return True
    if isinstance(calibration, str):
        return len(calibration) < 4096 and "\n" not in calibration and Path(calibration).is_dir()
    return hasattr(calibration, "column_names") and media_column(peeked(calibration)) is not None


def media_batches(
    calibration: str | Path | Any, processor: Any, count: int, seed: int, dtype: torch.dtype = torch.float32
) -> list[Batch]:
    """Batches of at most `count` samples, drawn at random.

    Args:
        calibration: a folder of images, with all folders in it; or a data set of `datasets`, streamed or not, with a
            column of images or sounds. A column of text beside it goes into the processor too, by the chat template
            where that has one: as what is said of an image, and for a sound as the labels.
        processor: `processor(images=..., return_tensors="pt")`, or likewise `audio=` with `sampling_rate=`, and
            `text=`: an image processor, a feature extractor, or a processor of several kinds.
        seed: of the draw.
        dtype: of the model, and so of the numbers in the batches.

    Raises:
        ValueError: without a processor, with one that reads text alone, for a folder without images, and for sounds at
            another rate than the processor's.
    """
    if processor is None:
        raise ValueError(f"calibration= holds images or sounds, which need a processor: {PASS_PROCESSOR}")
    if OF_TEXT.issuperset(getattr(processor, "model_input_names", ())):
        raise ValueError(
            f"calibration= holds images or sounds, and tokenizer= is a {type(processor).__name__}, which reads text: "
            + PASS_PROCESSOR
        )
    folder = isinstance(calibration, (str, Path))
    rows = images_in(Path(calibration), count, seed) if folder else drawn_rows(calibration, count, seed)
    batches = []
    while part := list(islice(rows, SAMPLES_PER_FORWARD)):
        batch = processed(part, processor)
        batches.append({key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()})
    return batches


def images_in(folder: Path, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """{"image": image} for images of a folder, in random order."""
    from PIL import Image

    endings = Image.registered_extensions()
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings) if folder.is_dir() else []
    if not files:
        raise ValueError(f"calibration={str(folder)!r} is no folder with images; give one, or a list of batches")
    for path in random.Random(seed).sample(files, min(count, len(files))):
        with Image.open(path) as image:
            yield {"image": image.convert("RGB")}


def drawn_rows(dataset: Any, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of a data set, in random order; of a stream, of what its buffer holds."""
    return iter(dataset.shuffle(seed=seed).take(count))


def peeked(dataset: Any) -> dict[str, Any]:
    """{column: what kind of thing it holds}, from the features or, where a stream has none, its first row."""
    features = getattr(dataset, "features", None)
    return dict(features) if features else dict(next(iter(dataset), {}))


def media_column(columns: Mapping[str, Any]) -> str | None:
    """The first column of images or sounds, given a value or feature of each."""
    return next((key for key, value in columns.items() if is_image(value) or is_sound(value)), None)


def is_image(value: object) -> bool:
    return any(base.__name__ == "Image" for base in type(value).__mro__)


def is_sound(value: Any) -> bool:
    """A feature of sounds, a decoder of one, or a sound that is decoded already."""
    if type(value).__name__ in ("Audio", "AudioDecoder"):
        return True
    return isinstance(value, Mapping) and {"array", "sampling_rate"} <= value.keys()


def processed(rows: list[dict[str, Any]], processor: Any) -> Batch:
    """What the processor makes of some rows."""
    column = media_column(rows[0])
    assert column is not None
    values = [row[column] for row in rows]
    words = next((key for key in TEXT_COLUMNS if isinstance(rows[0].get(key), str)), None)
    texts = [row[words] for row in rows] if words else None
    several = hasattr(processor, "tokenizer")
    given: dict[str, Any] = {"return_tensors": "pt"}
    if is_sound(values[0]):
        given |= sounds(values, processor, "audio" if several else "raw_speech")
    else:
        given["images"] = [image.convert("RGB") for image in values]
        if several and getattr(processor, "chat_template", None):
            texts = [asked(processor, text) for text in texts or [""] * len(values)]
    if several and texts:
        given["text"] = texts
    if "raw_speech" in given or several:
        given["padding"] = True
    return {key: value for key, value in processor(**given).items() if torch.is_tensor(value)}


def sounds(values: list[Any], processor: Any, argument: str) -> dict[str, Any]:
    """The arguments for sounds, which must have the processor's own rate."""
    wanted = getattr(getattr(processor, "feature_extractor", processor), "sampling_rate", None)
    rates = {int(value["sampling_rate"]) for value in values}
    if wanted is not None and rates != {wanted}:
        raise ValueError(
            f"calibration= holds sounds at {sorted(rates)} Hz, and the processor takes {wanted}: "
            f'resample them with dataset.cast_column("audio", datasets.Audio(sampling_rate={wanted}))'
        )
    return {argument: [as_floats(value["array"]) for value in values], "sampling_rate": wanted}


def as_floats(array: Iterable[float]) -> Any:
    return torch.as_tensor(array, dtype=torch.float32).numpy()


def asked(processor: Any, text: str) -> str:
    """An image and what is said of it, as the model's chat template has it."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    said: str = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    return said
