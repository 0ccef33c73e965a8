"""Everything that knows how transformers and PEFT work inside, and what other packages are told of ours.

`register()` is what `import hf_blr` calls. It imports neither package's machinery: the quantizer, the
`blr_config=` keyword, the attention of fused models and the LoRA layer are put in place when transformers' model loader
and PEFT are imported, what the ops cost when PyTorch's counter is.
"""

from types import ModuleType

from hf_blr.checkpoint.layout import match_plan, swap_in
from hf_blr.checkpoint.record import forget_plan, record_plan
from hf_blr.integration.linears import to_linears
from hf_blr.integration.loading import from_config, to_dense, to_format
from hf_blr.integration.on_import import when_imported
from hf_blr.integration.patch import MODELING, disable, enable
from hf_blr.integration.peft import enable_peft, lora_targets
from hf_blr.integration.refit import merge_adapters
from hf_blr.linear import blr_modules

__all__ = [
    "blr_modules",
    "disable",
    "enable",
    "enable_peft",
    "forget_plan",
    "from_config",
    "lora_targets",
    "match_plan",
    "merge_adapters",
    "record_plan",
    "register",
    "swap_in",
    "to_dense",
    "to_format",
    "to_linears",
]


#: where transformers keeps its quantizers by name
QUANTIZERS = "transformers.quantizers.auto"
#: where its configs are read
CONFIGS = "transformers.configuration_utils"
#: where diffusers does
DIFFUSERS_QUANTIZERS = "diffusers.quantizers.auto"


def register() -> None:
    """Make transformers and PEFT know BLR models. A second call changes nothing."""
    # before the model loader is: programs ask the quantizers alone what a checkpoint's config means
    when_imported(QUANTIZERS, register_quantizer)
    when_imported(CONFIGS, register_configs)
    when_imported(MODELING, register_models)
    when_imported(DIFFUSERS_QUANTIZERS, register_with_diffusers)
    when_imported("torch.utils.flop_counter", register_flops)
    enable()
    enable_peft()


def register_with_diffusers(auto: ModuleType) -> None:
    """Tell diffusers which classes serve `quant_method: "hf_blr"`."""
    from hf_blr.integration.diffusers import register_diffusers

    register_diffusers(auto)


def register_configs(configs: ModuleType) -> None:
    """Let no plan that cannot be get as far as transformers' configs."""
    from hf_blr.integration.config_files import check_config_files

    check_config_files(configs)


def register_flops(counter: ModuleType) -> None:
    """Tell PyTorch's counter what the ops cost."""
    from hf_blr.ops import flops

    flops.register(counter)


def register_models(modeling: ModuleType) -> None:
    """Tell transformers' models the attention function of fused ones, and what compressed checkpoints say and get."""
    from hf_blr.inference import attention
    from hf_blr.integration import hub, notice

    attention.register_attention()
    notice.pass_notice(modeling)
    hub.write_cards(modeling)


def register_quantizer(auto: ModuleType) -> None:
    """Tell transformers which classes serve `quant_method: "hf_blr"`."""
    from hf_blr.config import QUANT_METHOD, BLRConfig
    from hf_blr.integration.quantizer import BLRHfQuantizer

    # not through transformers' decorators: they refuse a second import of this package in one process
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = BLRConfig
    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = BLRHfQuantizer
