"""The offline quantizer: Hugging Face checkpoints to QAM-W checkpoints. Command line: ``qamw``."""
