"""Tiny transformers models with random weights."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZES = {"hidden_size": 80, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 96}


@cache
def model(name: str) -> Any:
    """A tiny model with random weights; K = 80 is a multiple of no block but NVFP4's."""
    torch.manual_seed(0)
    made = {
        "llama": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**SIZES, **IDS, num_key_value_heads=2, tie_word_embeddings=True)
        ),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**IDS, n_embd=80, n_layer=1, n_head=4, vocab_size=96, n_positions=32)
        ),
        "bert": lambda: transformers.BertForMaskedLM(
            transformers.BertConfig(**SIZES, pad_token_id=None, max_position_embeddings=32)
        ),
    }[name]()
    return made.eval()
