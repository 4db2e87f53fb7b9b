"""Writes an untrained model of GPT-2 medium's shape, with the tokenizer of the demo's model.

    python docs/examples/random_gpt2_medium.py build/gpt2_medium

355 million parameters, 1.4 GB. It serves to measure time and memory; it has learnt nothing.
"""

import sys

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained("demo/model")
end = tokenizer.eos_token_id
torch.manual_seed(0)
config = GPT2Config(n_embd=1024, n_layer=24, n_head=16, bos_token_id=end, eos_token_id=end)
GPT2LMHeadModel(config).save_pretrained(folder)
tokenizer.save_pretrained(folder)
