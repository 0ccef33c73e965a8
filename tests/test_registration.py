"""The format is known as soon as `import hf_blr` has run, whether quantizers of transformers came before or not.

`test_integration_use.py` does so with the loader of models.
"""

import subprocess
import sys

import pytest

KNOWN = "AutoQuantizationConfig.from_dict({'quant_method': 'hf_blr', 'ratio': 0.5})"


@pytest.mark.parametrize(
    "lines",
    [
        # what lm_eval does before it loads a model
        "import hf_blr\nfrom transformers.quantizers import AutoQuantizationConfig",
        "from transformers.quantizers import AutoQuantizationConfig\nimport hf_blr",
    ],
    ids=["ours first", "quantizers first"],
)
def test_the_format_is_known_in_any_order_of_imports(lines):
    code = f"{lines}\nprint(type({KNOWN}).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "BLRConfig", done.stderr
