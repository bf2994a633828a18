"""vLLM's entry point (`vllm.general_plugins`): registers the config, the model and the reasoning
parser, nothing else.

vLLM calls it in every process, possibly more than once.
"""

MODEL = "ouro_runtime.engine.cpu.model:OuroStepModel"
CUDA_MODEL = "ouro_runtime.engine.cuda.model:OuroLaneModel"
REASONING = "ouro_runtime.engine.reasoning:OuroReasoningParser"

_registered = False


def register() -> None:
    """Register Ouro with vLLM by name; nothing heavy is imported that vLLM has not imported."""
    global _registered
    if _registered:
        return
    _registered = True
    from ouro_runtime.engine import pin

    pin.check_version()
    from vllm.platforms import current_platform
    from vllm.reasoning import ReasoningParserManager
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from ouro_runtime.checkpoint_config import OuroConfig
    from ouro_runtime.engine import admission, config_hook, core_process, outputs
    from ouro_runtime.engine.cpu import kernel_scan, registry

    _CONFIG_REGISTRY["ouro"] = OuroConfig
    model = CUDA_MODEL if current_platform.is_cuda() else MODEL
    registry.register_model("OuroForCausalLM", model, current_platform.is_cpu())
    ReasoningParserManager.register_lazy_module("ouro", *REASONING.split(":"))
    config_hook.install()
    if current_platform.is_cpu():
        kernel_scan.install()
    admission.install()
    core_process.install()
    outputs.install()
