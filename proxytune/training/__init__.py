"""Fine-tuning of an expert or another model.

config.py  the settings of a training
data.py    from rows of text to token ids and labels
train.py   full fine-tuning and LoRA, by transformers' Trainer
"""
