"""vLLM's entry point (`vllm.general_plugins`): registers the config and the model, nothing else.

vLLM calls it in every process, possibly more than once.
"""

_registered = False


def register() -> None:
    """Register Ouro with vLLM by name; nothing heavy is imported that vLLM has not imported."""
    global _registered
    if _registered:
        return
    _registered = True
    from ouro_runtime.engine import pin

    pin.check_version()
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from ouro_runtime.config import OuroConfig
    from ouro_runtime.engine import config_hook, outputs

    _CONFIG_REGISTRY["ouro"] = OuroConfig
    ModelRegistry.register_model("OuroForCausalLM", "ouro_runtime.model.ouro:OuroForCausalLM")
    config_hook.install()
    outputs.install()
