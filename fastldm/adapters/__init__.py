"""Adapters: a file of LoRA or one of its relatives -> the change of each module that it names (`read.read_adapter`)."""
