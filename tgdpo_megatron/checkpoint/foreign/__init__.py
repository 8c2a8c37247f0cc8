"""Megatron checkpoints of other programs: Megatron-Bridge, Megatron-LM and NeMo 2.

folder.py    which program saved a folder, and where in it the weights, the settings and the tokenizer lie
settings.py  whether its settings describe the model that a config.json describes
tensors.py   which of its tensors is which of ours
reading.py   all of this, to a HuggingFace folder
writing.py   from a HuggingFace folder to a checkpoint that Megatron-Bridge and Megatron-LM load
"""
