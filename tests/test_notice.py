"""Without this package, a compressed checkpoint ends in an error that says what to do; with it, nobody sees that."""

import subprocess
import sys

import pytest
import transformers
from packaging.version import Version
from tiny import tiny_bert, tiny_llama, tiny_llava, tiny_t5, tiny_vit
from transformers import AutoConfig, AutoModel

import hf_blr
from hf_blr import BLRConfig
from hf_blr.checkpoint.notice import NOTICE

ADVICE = "pip install hf-blr, and import hf_blr before it is loaded"
MODELS = (tiny_llama, tiny_bert, tiny_vit, tiny_t5, tiny_llava)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{class: folder} of compressed models."""
    found = {}
    for make in MODELS:
        model = make()
        hf_blr.compress(model, BLRConfig("low_rank", ratio=0.5), progress=False)
        folder = found[type(model)] = tmp_path_factory.mktemp(make.__name__)
        model.save_pretrained(folder)
    return found


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.4"), reason="this release overwrites the notice")
def test_without_the_package_a_load_says_what_to_do(folders):
    loads = "".join(
        f"try: transformers.{name}.from_pretrained({str(folder)!r}); print('loaded')\n"
        "except ValueError as error: print(error)\n"
        for model_class, folder in folders.items()
        for name in (model_class.__name__, "AutoModel")
    )
    done = subprocess.run([sys.executable, "-c", f"import transformers\n{loads}"], capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 2 * len(folders) and all(ADVICE in line for line in lines), done.stderr


def attentions(config):
    return [config._attn_implementation, *(getattr(config, key)._attn_implementation for key in config.sub_configs)]


def test_with_the_package_models_choose_their_attention_as_ever(folders):
    for make, (model_class, folder) in zip(MODELS, folders.items(), strict=True):
        # releases differ in which families have which
        chosen = attentions(make().config)
        assert set(chosen) <= {"sdpa", "eager"}
        assert attentions(model_class.from_pretrained(folder).config) == chosen
        assert set(attentions(model_class.from_pretrained(folder, attn_implementation="eager").config)) == {"eager"}
        built = AutoModel.from_config(AutoConfig.from_pretrained(folder))
        assert attentions(built.config) == chosen
        assert attentions(hf_blr.from_config(AutoConfig.from_pretrained(folder)).config) == chosen


def test_a_dense_model_says_nothing_of_it(folders, tmp_path):
    for number, (model_class, folder) in enumerate(folders.items()):
        dense = hf_blr.to_dense(model_class.from_pretrained(folder))
        dense.save_pretrained(tmp_path / str(number))
        assert NOTICE not in (tmp_path / str(number) / "config.json").read_text()
        assert NOTICE in (folder / "config.json").read_text()


def test_a_model_that_puts_out_attentions_loads(tmp_path):
    model = tiny_llama(attn_implementation="eager", output_attentions=True)
    hf_blr.compress(model, BLRConfig("low_rank", ratio=0.5), progress=False)
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path, attn_implementation="eager").config.output_attentions
