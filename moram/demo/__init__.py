"""The demo: a real language model learns several tasks in a row, with MoRAM and with LoRA."""
