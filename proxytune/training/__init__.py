"""Training an expert.

config.py  what one training is
data.py    which tokens carry loss
train.py   full fine-tuning and LoRA, by transformers' Trainer
"""
