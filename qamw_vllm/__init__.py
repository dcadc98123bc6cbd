"""QAM-W checkpoints in vLLM. The entry point ``vllm.general_plugins: qamw`` is :func:`register`."""


def register() -> None:
    """Make ``qamw`` known to vLLM.

    vLLM calls this in the main process, the engine core, every worker and the model-inspection
    subprocess: it may run again, touches no device and imports no kernel.
    """
    from vllm.model_executor.layers.quantization import (
        get_quantization_config,
        register_quantization_config,
    )

    from qamw_vllm.config import QamwConfig

    try:
        known = get_quantization_config("qamw")
    except ValueError:
        known = None
    if known is not QamwConfig:
        register_quantization_config("qamw")(QamwConfig)
