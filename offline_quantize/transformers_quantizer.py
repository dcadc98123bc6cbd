"""Import this, and transformers loads QAM-W checkpoints.

The loader itself is in :mod:`qamw_kernels.integrations.transformers`.
"""

from qamw_kernels.integrations.transformers import (
    QamwHfQuantizer,
    QamwLinear,
    QamwTransformersConfig,
)

__all__ = ["QamwHfQuantizer", "QamwLinear", "QamwTransformersConfig"]
